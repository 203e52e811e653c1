"""A decoder's pictures to the checker's input: levels, antialiased bicubic, crop, normalisation; two passes.

Body of `fused.clip_input`: one pass along each axis, in Pillow's order, with its rounding to 8 bits between
them. Levels go from pass to pass in float16, which holds 0 .. 255 exactly and, unlike a byte, also what is
not finite. Pictures come in any memory order. Taps are those of `kernels.resize`, and are made once a size.

A plane is a channel of a picture or, in a pass down where channels lie last on both sides, all three, whose
columns are the channels in turn. Along a row the pixels under a filter begin anywhere; down a column each tap
is a run of memory, which `resize_runs` moves 16 bytes at once where start and pitch of the rows allow it.
Grid sizes of a pass: rows and columns of its result (these in units), pictures, planes of a picture.
"""
# The parameters of jitted functions are Triton values, which have no types here.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-return"

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from safelight.kernels.resize import crop_window, resize_matrix, vertical_first
from safelight.kernels.triton.checks import FLOATS, dense, shaped, together, typed
from safelight.kernels.triton.kernel import Kernel, Variant
from safelight.kernels.triton.launch import Argument, launch, tuned
from safelight.kernels.triton.tuning import setting

CHANNELS = 3
EIGHT = 8  # float16s in 16 bytes; on one side of every pass are float16s


@triton.jit
def _level(value):
    """The 8-bit level of a decoder's value in about [-1, 1]; NaN where it is not finite."""
    known = tl.abs(value) < float("inf")
    picture = tl.minimum(tl.maximum(tl.where(known, value, 0.0) * 0.5 + 0.5, 0.0), 1.0)
    exact = picture * 255.0  # only converted and compared, so that no compiler fuses its rounding away
    whole = exact.to(tl.int32)
    half = whole.to(tl.float32) + 0.5
    up = (exact > half) | ((exact == half) & ((whole & 1) == 1))  # halves to even
    return tl.where(known, (whole + up.to(tl.int32)).to(tl.float32), float("nan"))


@triton.jit
def _of(values, channel):
    """The value of each channel: three loads for all, instead of one for each."""
    last = tl.where(channel == 1, tl.load(values + 1), tl.load(values + 2))
    return tl.where(channel == 0, tl.load(values), last)


# lengths of rows, and strides but those along a row, come in units of UNIT elements
@triton.jit(do_not_specialize=["rows", "columns", "height", "width", "most", "planes"])
def _resize_axis(
    source,
    out,
    finite,
    firsts,
    counts,
    weights,
    mean,
    deviation,
    height,
    width,
    rows,
    columns,
    most,
    planes,
    source_picture,
    source_channel,
    source_row,
    source_column,
    out_picture,
    out_channel,
    out_row,
    out_column,
    ACROSS: tl.constexpr,  # noqa: N803
    DECODED: tl.constexpr,  # noqa: N803
    CHECKED: tl.constexpr,  # noqa: N803
    UNIT: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    row, plane, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    picture, channel = (plane // planes).to(tl.int64), plane % planes
    width, columns, source_row = width * UNIT, columns * UNIT, source_row * UNIT
    if UNIT > 1:  # rows without gaps
        source_column, out_column = 1, 1
    source += (picture * source_picture + channel * source_channel) * UNIT
    out += (picture * out_picture + channel * out_channel + row * out_row) * UNIT
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    if CHECKED:  # every row has its program, also where the crop leaves it out
        odd = 0
        for line in range(row, height, rows):
            for start in range(block * BLOCK, width, BLOCK * tl.num_programs(2)):
                spot = start + tl.arange(0, BLOCK)
                step = line * source_row + spot * source_column
                value = tl.load(source + step, spot < width, other=0.0).to(tl.float32)
                odd += tl.sum((~(tl.abs(value) < float("inf"))).to(tl.int32))
        if odd > 0:
            tl.store(finite + picture, False)

    if ACROSS:  # along a row: each column has taps of its own
        place, places, stride = at, columns, source_column
        source += row * source_row
    else:
        place, places, stride = row + tl.arange(0, 1), rows, source_row
        source += at * source_column
    placed = place < places
    first, count = tl.load(firsts + place, placed, other=0), tl.load(counts + place, placed, other=0)
    total = tl.zeros((BLOCK,), tl.float32)
    for tap in range(0, most):
        used = inside & (tap < count)
        value = tl.load(source + (first + tap) * stride, used, other=0.0).to(tl.float32)
        if DECODED:
            value = tl.where(used, _level(value), 0.0)
        total += tl.load(weights + tap * places + place, placed & (tap < count), other=0.0) * value
    level = tl.floor(total + 0.5)
    level = tl.where(level < 0.0, 0.0, tl.where(level > 255.0, 255.0, level))
    if not DECODED:
        own = channel + tl.where(planes == 1, at % 3, 0)
        level = (level / 255.0 - _of(mean, own)) / _of(deviation, own)
    tl.store(out + at * out_column, level.to(out.dtype.element_ty), inside)


_POINTERS = ("source", "out", "finite", "firsts", "counts", "weights", "mean", "deviation")
_SIZES = ("height", "width", "rows", "columns", "most", "planes")
_STRIDES = tuple(
    f"{side}_{axis}" for side in ("source", "out") for axis in ("picture", "channel", "row", "column")
)
_CONSTANTS = ("ACROSS", "DECODED", "CHECKED", "UNIT", "BLOCK")


def _variant(kernel: str, element: str, *, across: bool, decoded: bool, unit: int = 1) -> Variant:
    """First passes read the decoder's dtype and write levels; last ones read levels and write that dtype."""
    chosen = setting(kernel)
    kinds = (element, "fp16") if decoded else ("fp16", element)
    types = (*kinds, "i1" if decoded else element, "i32", "i32", "fp32", "fp32", "fp32")
    pointers = {name: f"*{kind}" for name, kind in zip(_POINTERS, types, strict=True)}
    values = (across, decoded, decoded, unit, chosen.block)
    name = f"{kernel}_{element}_{'first' if decoded else 'last'}"
    return Variant(
        name=name if unit > 1 else f"{name}_{'across' if across else 'down'}",
        signature=pointers
        | dict.fromkeys((*_SIZES, *_STRIDES), "i32")
        | dict.fromkeys(_CONSTANTS, "constexpr"),
        constants=dict(zip(_CONSTANTS, values, strict=True)),
        aligned=(*(("source", "out") if unit > 1 else ()), "firsts", "counts", "weights"),
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )


KERNEL = Kernel(
    name="resize_axis",
    function=_resize_axis,
    variants=tuple(
        _variant("resize_axis", element, across=across, decoded=decoded)
        for element in ("fp16", "bf16", "fp32")
        for across in (True, False)
        for decoded in (True, False)
    ),
    grid="(rows, planes * pictures, ceil(UNIT * columns / BLOCK))",
)
RUNS = Kernel(
    name="resize_runs",
    function=_resize_axis,
    variants=tuple(
        _variant("resize_runs", element, across=False, decoded=decoded, unit=EIGHT)
        for element in ("fp16", "bf16", "fp32")
        for decoded in (True, False)
    ),
    grid=KERNEL.grid,
)


@dataclass(frozen=True, slots=True)
class _Taps:
    """One axis of a resize: for each of its places the first source element, how many of them count, and
    their weights (taps, places).
    """

    firsts: Tensor
    counts: Tensor
    weights: Tensor

    @classmethod
    def of(cls, matrix: NDArray[np.float32], device: torch.device) -> "_Taps":
        """The taps of a matrix of `resize_matrix`, of which each row is 0 but for one run."""
        used = matrix != 0
        firsts, ends = used.argmax(1), matrix.shape[1] - used[:, ::-1].argmax(1)
        counts = ends - firsts
        weights = np.zeros((int(counts.max()), len(matrix)), dtype=np.float32)
        for place, (begin, end) in enumerate(zip(firsts, ends, strict=True)):
            weights[: end - begin, place] = matrix[place, begin:end]
        first, count, weight = (
            torch.from_numpy(part).to(device)
            for part in (firsts.astype(np.int32), counts.astype(np.int32), weights)
        )
        return cls(first, count, weight)


@cache  # never let go: captured graphs hold the addresses of these tensors
def _taps(height: int, width: int, size: int, device: torch.device) -> tuple[_Taps, _Taps, bool]:
    """Taps down and across, and whether those down come first."""
    rows, columns = crop_window(height, width, size)
    down = resize_matrix(height, rows.length, size=size, offset=rows.offset)
    across = resize_matrix(width, columns.length, size=size, offset=columns.offset)
    return _Taps.of(down, device), _Taps.of(across, device), vertical_first(height, width, rows)


def clip_input(
    decoded: Tensor,
    size: int,
    *,
    mean: Tensor,
    deviation: Tensor,
    finite: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`fused.clip_input`. Decoded and out may have any strides; a new result has decoded's memory order.

    The first call of a picture size copies its taps to the device, which cannot happen while a graph is
    captured.
    """
    name = "clip_input"
    if decoded.dim() != 4 or decoded.shape[1] != CHANNELS or 0 in decoded.shape[2:] or size < 1:
        raise ValueError(
            f"{name}: decoded must be (N, 3, H, W) with pixels, and size at least 1; got "
            f"{tuple(decoded.shape)} and {size}"
        )
    count, _, height, width = decoded.shape
    whole = (count, CHANNELS, size, size)
    if out is None:
        out = torch.empty(whole, dtype=decoded.dtype, device=decoded.device, memory_format=_order(decoded))
    shaped(name, {"mean": (mean, (CHANNELS,)), "deviation": (deviation, (CHANNELS,)), "out": (out, whole)})
    typed(name, {"mean": (mean, (torch.float32,)), "deviation": (deviation, (torch.float32,))})
    typed(name, {"decoded": (decoded, FLOATS), "out": (out, FLOATS)})
    if finite is not None:
        typed(name, {"finite": (finite, (torch.bool,))})
        if finite.numel() != count:
            raise ValueError(f"{name}: finite must have {count} entries; got {tuple(finite.shape)}")
    together(name, decoded=decoded, mean=mean, deviation=deviation, finite=finite, out=out)
    dense(name, mean=mean, deviation=deviation, finite=finite)
    down, across, down_first = _taps(height, width, size, decoded.device)
    between = (count, CHANNELS, size, width) if down_first else (count, CHANNELS, height, size)
    order = _order(decoded if down_first else out)  # of the other side of the pass down
    levels = torch.empty(between, dtype=torch.float16, device=decoded.device, memory_format=order)
    first, second = (down, across) if down_first else (across, down)
    _pass(decoded, levels, first, across=not down_first, finite=finite, mean=mean, deviation=deviation)
    _pass(levels, out, second, across=down_first, finite=None, mean=mean, deviation=deviation, last=True)
    return out


def _interleaved(tensor: Tensor) -> bool:
    """Whether the channels of a pixel, and the pixels of a row, lie beside each other."""
    return tensor.stride(3) == CHANNELS * tensor.stride(1)


def _order(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if _interleaved(tensor) else torch.contiguous_format


def _runs(tensor: Tensor) -> Tensor:
    """An interleaved (N, 3, H, W) as one plane a picture, (N, 1, H, 3 W); a view."""
    return tensor.permute(0, 2, 3, 1).flatten(2).unsqueeze(1)


def _in_eights(tensor: Tensor) -> bool:
    """Whether rows have no gaps, and they and the steps between them are multiples of 16 bytes of float16."""
    eights = all(n % EIGHT == 0 for n in (tensor.shape[3], *tensor.stride()[:3]))
    return eights and tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0


def _pass(
    source: Tensor,
    out: Tensor,
    taps: _Taps,
    *,
    across: bool,
    finite: Tensor | None,
    mean: Tensor,
    deviation: Tensor,
    last: bool = False,
) -> None:
    if not across and _interleaved(source) and _interleaved(out):
        source, out = _runs(source), _runs(out)
    kernel, unit = (RUNS, EIGHT) if not across and _in_eights(source) and _in_eights(out) else (KERNEL, 1)
    chosen = tuned(kernel.name, out, size=out.shape[3])
    (_, planes, height, width), (rows, columns) = source.shape, out.shape[2:]
    tensors = (source, out, out if finite is None else finite, taps.firsts, taps.counts, taps.weights)
    sizes = (height, width // unit, rows, columns // unit, len(taps.weights), planes)
    strides = [n // unit if axis < 3 else n for side in (source, out) for axis, n in enumerate(side.stride())]
    arguments: dict[str, Argument] = dict(zip(_POINTERS, (*tensors, mean, deviation), strict=True))
    arguments |= dict(zip((*_SIZES, *_STRIDES), (*sizes, *strides), strict=True))
    constants = dict(zip(_CONSTANTS, (across, not last, finite is not None, unit, chosen.block), strict=True))
    constants |= {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    launch(kernel, (rows, planes * len(source), -(-columns // chosen.block)), arguments, constants)
