"""A decoder's pictures to the checker's input: levels, antialiased bicubic, crop and normalisation, two
launches.

Body of `fused.clip_input`: one pass along each axis, in Pillow's order, with its rounding to 8 bits between
them. Levels go from pass to pass in float16, which holds 0 .. 255 exactly and, unlike a byte, also what is
not finite. Pictures come in any memory order. Taps are those of `kernels.resize`, and are made once a size.
Grid sizes of a pass: rows and columns of its result, pictures.
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


@triton.jit(do_not_specialize=["rows", "columns", "height", "width", "most"])
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
    BLOCK: tl.constexpr,  # noqa: N803
):
    row, plane, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    picture, channel = (plane // 3).to(tl.int64), plane % 3
    source += picture * source_picture + channel * source_channel
    out += picture * out_picture + channel * out_channel + row * out_row
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
        place, places, stride = at * 0 + row, rows, source_row
        source += at * source_column
    first, count = tl.load(firsts + place, inside, other=0), tl.load(counts + place, inside, other=0)
    total = tl.zeros((BLOCK,), tl.float32)
    for tap in range(0, most):
        used = inside & (tap < count)
        value = tl.load(source + (first + tap) * stride, used, other=0.0).to(tl.float32)
        if DECODED:
            value = tl.where(used, _level(value), 0.0)
        total += tl.load(weights + tap * places + place, used, other=0.0) * value
    level = tl.floor(total + 0.5)
    level = tl.where(level < 0.0, 0.0, tl.where(level > 255.0, 255.0, level))
    if not DECODED:
        level = (level / 255.0 - tl.load(mean + channel)) / tl.load(deviation + channel)
    tl.store(out + at * out_column, level.to(out.dtype.element_ty), inside)


_POINTERS = ("source", "out", "finite", "firsts", "counts", "weights", "mean", "deviation")
_SIZES = ("height", "width", "rows", "columns", "most")
_STRIDES = tuple(
    f"{side}_{axis}" for side in ("source", "out") for axis in ("picture", "channel", "row", "column")
)
_CONSTANTS = ("ACROSS", "DECODED", "CHECKED", "BLOCK")


def _variant(element: str, *, across: bool, decoded: bool) -> Variant:
    """First passes read the decoder's dtype and write levels; last ones read levels and write that dtype."""
    chosen = setting("resize_axis")
    kinds = (element, "fp16") if decoded else ("fp16", element)
    types = (*kinds, "i1" if decoded else element, "i32", "i32", "fp32", "fp32", "fp32")
    pointers = {name: f"*{kind}" for name, kind in zip(_POINTERS, types, strict=True)}
    name = f"resize_axis_{element}_{'first' if decoded else 'last'}_{'across' if across else 'down'}"
    return Variant(
        name=name,
        signature=pointers
        | dict.fromkeys((*_SIZES, *_STRIDES), "i32")
        | dict.fromkeys(_CONSTANTS, "constexpr"),
        constants=dict(zip(_CONSTANTS, (across, decoded, decoded, chosen.block), strict=True)),
        aligned=("source", "out", "firsts", "counts", "weights"),
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )


KERNEL = Kernel(
    name="resize_axis",
    function=_resize_axis,
    variants=tuple(
        _variant(element, across=across, decoded=decoded)
        for element in ("fp16", "bf16", "fp32")
        for across in (True, False)
        for decoded in (True, False)
    ),
    grid="(rows, 3 * pictures, ceil(columns / BLOCK))",
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
        order = torch.channels_last if _last(decoded) else torch.contiguous_format
        out = torch.empty(whole, dtype=decoded.dtype, device=decoded.device, memory_format=order)
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
    levels = torch.empty(between, dtype=torch.float16, device=decoded.device)
    first, second = (down, across) if down_first else (across, down)
    _pass(decoded, levels, first, across=not down_first, finite=finite, mean=mean, deviation=deviation)
    _pass(levels, out, second, across=down_first, finite=None, mean=mean, deviation=deviation, last=True)
    return out


def _last(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and not tensor[0].is_contiguous() and tensor[0].movedim(0, -1).is_contiguous()


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
    chosen = tuned("resize_axis", out, size=out.shape[3])
    tensors = (source, out, out if finite is None else finite, taps.firsts, taps.counts, taps.weights)
    sizes = (*source.shape[2:], *out.shape[2:], len(taps.weights))
    arguments: dict[str, Argument] = dict(zip(_POINTERS, (*tensors, mean, deviation), strict=True))
    arguments |= dict(zip((*_SIZES, *_STRIDES), (*sizes, *source.stride(), *out.stride()), strict=True))
    constants = dict(zip(_CONSTANTS, (across, not last, finite is not None, chosen.block), strict=True))
    constants |= {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    grid = (out.shape[2], CHANNELS * len(source), -(-out.shape[3] // chosen.block))
    launch(KERNEL, grid, arguments, constants)
