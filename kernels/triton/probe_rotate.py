"""Probes of embeddings and of latents in one launch: directions drawn, projected and turned in registers.

Body of `fused.probe_rotate` and `fused.probe_latents`. One program makes one vector, a token of a probe or
the latents of one; only z, or nothing, is read and only the probe is written. A vector longer than a block is
passed over several times and drawn again each time, which costs arithmetic but no memory.
Grid sizes: vectors (L, or 1), probes, requests.
"""
# The parameters of jitted functions are Triton values, which have no types here.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-return"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from safelight.kernels.fused import Directions
from safelight.kernels.philox import Stream
from safelight.kernels.triton.checks import FLOATS, dense, row_strides, shaped, together, typed
from safelight.kernels.triton.kernel import Constant, Kernel, Variant
from safelight.kernels.triton.launch import Argument, launch, tuned
from safelight.kernels.triton.normals import normals, philox_words, turn_radians, turn_word
from safelight.kernels.triton.tuning import setting

_LATENT = tl.constexpr(int(Stream.LATENT))
_PHASE = tl.constexpr(int(Stream.PHASE))


@triton.jit
def _over(numerator, denominator):
    """Numerator / denominator, and 0 where the denominator is 0."""
    return tl.where(denominator == 0, 0.0, numerator / tl.where(denominator == 0, 1.0, denominator))


@triton.jit
def _vector(z, seed, base, start, shift, width, DRAWN: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """A block of z as float32, 0 outside of the vector, and where it lies inside."""
    at = start + tl.arange(0, BLOCK) - shift
    inside = (at >= 0) & (at < width)
    if DRAWN:
        drawn = normals(seed, _LATENT, 0, (base + start) // 4 + tl.arange(0, BLOCK // 4))
        return tl.where(inside, drawn, 0.0), inside
    return tl.load(z + at, inside, other=0.0).to(tl.float32), inside


@triton.jit
def _direction(seed, stream, probe, base, start, inside, BLOCK: tl.constexpr):  # noqa: N803
    """A block of a direction's normals, 0 outside of the vector."""
    drawn = normals(seed, stream, probe, (base + start) // 4 + tl.arange(0, BLOCK // 4))
    return tl.where(inside, drawn, 0.0)


@triton.jit(do_not_specialize=["vectors", "probes", "stream", "circle"])
def _probe_rotate(
    z,
    out,
    seeds,
    angle,
    numbers,
    mask,
    finite,
    vectors,
    width,
    probes,
    z_request,
    z_vector,
    stream,
    circle,
    DRAWN: tl.constexpr,  # noqa: N803
    CIRCULAR: tl.constexpr,  # noqa: N803
    MASKED: tl.constexpr,  # noqa: N803
    CHECKED: tl.constexpr,  # noqa: N803
    QUADS: tl.constexpr,  # noqa: N803
    LENGTH: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    vector, at, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = request.to(tl.int64) * probes + at
    base = vector * width  # number of the vector's first normal; four are drawn at once
    shift = 0 if QUADS else base % 4
    base = base - shift
    z += request.to(tl.int64) * z_request + vector.to(tl.int64) * z_vector
    out += (row * vectors + vector) * width
    seed, number = tl.load(seeds + request), tl.load(numbers + at)
    turn = tl.load(angle + request)
    probe = 0 if CIRCULAR else number.to(tl.int32)

    moved = (number != 0) & (turn != 0)
    if MASKED:
        moved = moved & (tl.load(mask + request.to(tl.int64) * vectors + vector) != 0)
    square, along_u, along_v, bad = 0.0, 0.0, 0.0, 0
    for start in range(0, LENGTH, BLOCK):
        value, inside = _vector(z, seed, base, start, shift, width, DRAWN, BLOCK)
        square += tl.sum(value * value)
        if CHECKED:
            bad += tl.sum((tl.abs(value) == float("inf")).to(tl.int32) + (value != value).to(tl.int32))
    moved = moved & (square > 0)
    if moved:
        for start in range(0, LENGTH, BLOCK):
            value, inside = _vector(z, seed, base, start, shift, width, DRAWN, BLOCK)
            along_u += tl.sum(_direction(seed, stream, probe, base, start, inside, BLOCK) * value)
            if CIRCULAR:
                along_v += tl.sum(_direction(seed, stream + 1, 0, base, start, inside, BLOCK) * value)
        on_u, on_v = along_u / square, along_v / square
        first_square, both, second_square, on_first = 0.0, 0.0, 0.0, 0.0
        for start in range(0, LENGTH, BLOCK):
            value, inside = _vector(z, seed, base, start, shift, width, DRAWN, BLOCK)
            first = _direction(seed, stream, probe, base, start, inside, BLOCK) - on_u * value
            first_square += tl.sum(first * first)
            if CIRCULAR:
                second = _direction(seed, stream + 1, 0, base, start, inside, BLOCK) - on_v * value
                both += tl.sum(second * first)
        cosine, sine = turn_radians(turn)
        norm = tl.sqrt(square)
        to_first, to_second = sine * _over(norm, tl.sqrt(first_square)), 0.0
        if CIRCULAR:
            on_first = _over(both, first_square)
            for start in range(0, LENGTH, BLOCK):
                value, inside = _vector(z, seed, base, start, shift, width, DRAWN, BLOCK)
                first = _direction(seed, stream, probe, base, start, inside, BLOCK) - on_u * value
                second = _direction(seed, stream + 1, 0, base, start, inside, BLOCK) - on_v * value
                second -= on_first * first
                second_square += tl.sum(second * second)
            word, _, _, _ = philox_words(seed, _PHASE, 0, tl.zeros((1,), tl.int32))
            # place / circle of a turn in units of 2**-32 turns: exact, where float32 would round
            place = (number - 1) * 4294967296 + tl.sum(word.to(tl.int64))
            cosine_phase, sine_phase = turn_word((place // circle).to(tl.uint32))
            to_second = sine * sine_phase * _over(norm, tl.sqrt(second_square))
            to_first *= cosine_phase
        for start in range(0, LENGTH, BLOCK):
            value, inside = _vector(z, seed, base, start, shift, width, DRAWN, BLOCK)
            first = _direction(seed, stream, probe, base, start, inside, BLOCK) - on_u * value
            turned = cosine * value + to_first * first
            if CIRCULAR:
                second = _direction(seed, stream + 1, 0, base, start, inside, BLOCK) - on_v * value
                turned += to_second * (second - on_first * first)
            spot = start + tl.arange(0, BLOCK) - shift
            tl.store(out + spot, turned.to(out.dtype.element_ty), inside)
    else:
        for start in range(0, LENGTH, BLOCK):
            value, inside = _vector(z, seed, base, start, shift, width, DRAWN, BLOCK)
            spot = start + tl.arange(0, BLOCK) - shift
            tl.store(out + spot, value.to(out.dtype.element_ty), inside)
    if CHECKED:
        unknown = (turn != turn) | (tl.abs(turn) == float("inf"))
        if unknown | (bad > 0):
            tl.store(finite + row, False)


_NUMBERS = ("vectors", "width", "probes", "z_request", "z_vector", "stream", "circle")
_CONSTANTS = ("DRAWN", "CIRCULAR", "MASKED", "CHECKED", "QUADS", "LENGTH", "BLOCK")


def _variant(element: str, length: int, *, drawn: bool, circular: bool) -> Variant:
    """As the engine uses it: tokens are masked and checked, latents are drawn; widths are multiples of 16."""
    pointers = dict.fromkeys(("z", "out"), f"*{element}")
    pointers |= {"seeds": "*i64", "angle": "*fp32", "numbers": "*i64", "mask": "*i1", "finite": "*i1"}
    if drawn:  # nothing is read, and any pointer will do
        pointers |= dict.fromkeys(("z", "mask", "finite"), f"*{element}")
    chosen = setting("probe_rotate", size=length)
    values = (drawn, circular, not drawn, not drawn, True, length, min(chosen.block, length))
    name = f"{'probe_latents' if drawn else 'probe_rotate'}_{element}_{length}"
    return Variant(
        name=f"{name}_circular" if circular else name,
        signature=pointers | dict.fromkeys(_NUMBERS, "i32") | dict.fromkeys(_CONSTANTS, "constexpr"),
        constants=dict(zip(_CONSTANTS, values, strict=True)),
        aligned=("z", "out", "width", "z_request", "z_vector"),
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )


KERNEL = Kernel(
    name="probe_rotate",
    function=_probe_rotate,
    variants=tuple(
        _variant(element, length, drawn=drawn, circular=circular)
        for drawn, lengths, elements in (
            (False, (64, 256, 1024, 2048), ("fp16", "bf16", "fp32")),
            (True, (256, 4096, 16384, 65536), ("fp32",)),
        )
        for element in elements
        for length in lengths
        for circular in (False, True)
    ),
    grid="(vectors, probes, requests)",
)


def probe_rotate(
    z: Tensor,
    seeds: Tensor,
    angle: Tensor,
    *,
    numbers: Tensor,
    directions: Directions,
    mask: Tensor | None = None,
    finite: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`fused.probe_rotate`. Z may be a slice of a larger tensor as long as its last axis is contiguous."""
    name = "probe_rotate"
    if z.dim() not in (2, 3):
        raise ValueError(f"{name}: z must be (R, L, D) or (R, D); got {tuple(z.shape)}")
    shape = (len(z), len(numbers), *z.shape[1:])
    out = torch.empty(shape, dtype=z.dtype, device=z.device) if out is None else out
    strides = row_strides(name, "z", z, z.dim() - 1)
    if mask is not None:
        shaped(name, {"mask": (mask, tuple(z.shape[:-1]))})
        typed(name, {"mask": (mask, (torch.bool,))})
    if finite is not None:
        shaped(name, {"finite": (finite, shape[:2])})
        typed(name, {"finite": (finite, (torch.bool,))})
    together(name, z=z, mask=mask, finite=finite, out=out)
    dense(name, mask=mask, finite=finite)
    typed(name, {"z": (z, FLOATS)})
    vectors = z.shape[1] if z.dim() == 3 else 1
    sizes = {"vectors": vectors, "z_request": strides[0], "z_vector": strides[1] if z.dim() == 3 else 0}
    _start(name, z, out, seeds, angle, numbers, directions, shape, sizes, mask=mask, finite=finite)
    return out


def probe_latents(
    seeds: Tensor,
    angle: Tensor,
    *,
    shape: tuple[int, ...],
    numbers: Tensor,
    directions: Directions,
    out: Tensor | None = None,
) -> Tensor:
    """`fused.probe_latents`."""
    whole = (len(seeds), len(numbers), *shape)
    out = torch.empty(whole, device=seeds.device) if out is None else out
    sizes = {"vectors": 1, "z_request": 0, "z_vector": 0}
    _start("probe_latents", None, out, seeds, angle, numbers, directions, whole, sizes)
    return out


def _start(
    name: str,
    z: Tensor | None,
    out: Tensor,
    seeds: Tensor,
    angle: Tensor,
    numbers: Tensor,
    directions: Directions,
    shape: tuple[int, ...],
    sizes: dict[str, int],
    *,
    mask: Tensor | None = None,
    finite: Tensor | None = None,
) -> None:
    """Check what both have in common, and launch. `sizes` are the rows and strides of z."""
    requests, probes = shape[:2]
    width = math.prod(shape[2:]) // max(1, sizes["vectors"])
    of_requests = {"seeds": (seeds, (requests,)), "angle": (angle, (requests,))}
    shaped(name, of_requests | {"numbers": (numbers, (probes,)), "out": (out, shape)})
    typed(name, {"seeds": (seeds, (torch.int64,)), "numbers": (numbers, (torch.int64,))})
    typed(name, {"angle": (angle, (torch.float32,)), "out": (out, FLOATS)})
    together(name, out=out, seeds=seeds, angle=angle, numbers=numbers)
    dense(name, out=out, seeds=seeds, angle=angle, numbers=numbers)
    if out.numel() == 0:
        return
    quads, unused = width % 4 == 0, out if z is None else z
    length = max(16, triton.next_power_of_2(width if quads else width + 3))
    chosen = tuned("probe_rotate", out, size=length)
    modes = (z is None, directions.circle is not None, mask is not None, finite is not None)
    values: tuple[Constant, ...] = (*modes, quads, length, min(chosen.block, length))
    constants: dict[str, Constant] = dict(zip(_CONSTANTS, values, strict=True))
    constants |= {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    arguments: dict[str, Argument] = {"z": unused, "out": out, "seeds": seeds, "angle": angle}
    arguments |= {"numbers": numbers, "mask": unused if mask is None else mask}
    arguments |= {"finite": unused if finite is None else finite}
    strides = (sizes["z_request"], sizes["z_vector"])
    numbered = (sizes["vectors"], width, probes, *strides, int(directions.first), directions.circle or 1)
    arguments |= dict(zip(_NUMBERS, numbered, strict=True))
    launch(KERNEL, (sizes["vectors"], probes, requests), arguments, constants)
