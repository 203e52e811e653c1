"""What guidance must know of a whole request before any of its elements: distance and spreads, in parts.

First launch of `guidance_step` where SafeCFG or the rescaling of guidance is on. A program reduces a block of
the branches to `SUMS` numbers; the second launch puts the blocks together. With c the conditional answer, d
= c - free and a = redirected - free, the guided answer is c + (s - 1) (d - w a) for scale s and strength w,
so that its variance is a quadratic form in the covariances of c, d and a, known before w is.
Grid sizes: n elements of a request, requests.
"""
# The parameters of jitted functions are Triton values, which have no types here.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-return"

import torch
import triton
import triton.language as tl
from torch import Tensor

from safelight.kernels.triton.kernel import Kernel, Variant
from safelight.kernels.triton.launch import Argument, launch, tuned
from safelight.kernels.triton.tuning import setting

SUMS = 10  # the square of a, then means of c, d, a, then centred products cc, dd, aa, cd, ca, da
_SUMS = tl.constexpr(SUMS)


@triton.jit(do_not_specialize=["chunks"])
def _guidance_moments(
    answers,
    moments,
    n,
    chunks,
    branch_stride,
    answer_request,
    BRANCHES: tl.constexpr,  # noqa: N803
    RESCALED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    chunk, request = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    spot = answers + request * answer_request + at
    into = moments + (request * _SUMS) * chunks + chunk
    free = tl.load(spot, inside, other=0.0).to(tl.float32)
    a = tl.zeros((BLOCK,), tl.float32)
    if BRANCHES == 3:
        a = tl.load(spot + branch_stride, inside, other=0.0).to(tl.float32) - free
    tl.store(into, tl.sum(a * a))
    if RESCALED:
        count = tl.minimum(n - chunk * BLOCK, BLOCK).to(tl.float32)
        c = tl.load(spot + (BRANCHES - 1) * branch_stride, inside, other=0.0).to(tl.float32)
        d = c - free
        mean_c, mean_d, mean_a = tl.sum(c) / count, tl.sum(d) / count, tl.sum(a) / count
        c = tl.where(inside, c - mean_c, 0.0)
        d = tl.where(inside, d - mean_d, 0.0)
        a = tl.where(inside, a - mean_a, 0.0)
        tl.store(into + chunks, mean_c)
        tl.store(into + 2 * chunks, mean_d)
        tl.store(into + 3 * chunks, mean_a)
        tl.store(into + 4 * chunks, tl.sum(c * c))
        tl.store(into + 5 * chunks, tl.sum(d * d))
        tl.store(into + 6 * chunks, tl.sum(a * a))
        tl.store(into + 7 * chunks, tl.sum(c * d))
        tl.store(into + 8 * chunks, tl.sum(c * a))
        tl.store(into + 9 * chunks, tl.sum(d * a))


@triton.jit
def part(moments, request, chunks, which, PARTS: tl.constexpr):  # noqa: N803
    """The `which`th number of every block of a request, 0 beyond the last."""
    at = tl.arange(0, PARTS)
    return tl.load(moments + (request * _SUMS + which) * chunks + at, at < chunks, other=0.0)


@triton.jit
def _product(means_i, means_j, counts, inner):
    """Sum of centred products of two quantities over all blocks (Chan, Golub & LeVeque 1979)."""
    total = tl.sum(counts)
    mean_i, mean_j = tl.sum(counts * means_i) / total, tl.sum(counts * means_j) / total
    return tl.sum(inner + counts * (means_i - mean_i) * (means_j - mean_j))


@triton.jit
def spreads(
    moments,
    request,
    n,
    chunks,
    scale,
    strength,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Standard deviations of the guided answer and of the conditional one, over all elements of a request."""
    at = tl.arange(0, PARTS)
    counts = tl.where(at < chunks, tl.minimum(n - at * BLOCK, BLOCK), 0).to(tl.float32)
    c, d = part(moments, request, chunks, 1, PARTS), part(moments, request, chunks, 2, PARTS)
    a = part(moments, request, chunks, 3, PARTS)
    cc = _product(c, c, counts, part(moments, request, chunks, 4, PARTS))
    dd = _product(d, d, counts, part(moments, request, chunks, 5, PARTS))
    aa = _product(a, a, counts, part(moments, request, chunks, 6, PARTS))
    cd = _product(c, d, counts, part(moments, request, chunks, 7, PARTS))
    ca = _product(c, a, counts, part(moments, request, chunks, 8, PARTS))
    da = _product(d, a, counts, part(moments, request, chunks, 9, PARTS))
    k = scale - 1.0
    guided = cc + k * (2.0 * (cd - strength * ca) + k * (dd - strength * (2.0 * da - strength * aa)))
    return tl.sqrt(tl.where(guided < 0, 0.0, guided) / n), tl.sqrt(cc / n)


_CONSTANTS = ("BRANCHES", "RESCALED", "BLOCK")


def _variant(element: str, branches: int, *, rescaled: bool) -> Variant:
    chosen = setting("guidance_moments")
    numbers = dict.fromkeys(("n", "chunks", "branch_stride", "answer_request"), "i32")
    return Variant(
        name=f"guidance_moments_{element}_{branches}{'_rescaled' if rescaled else ''}",
        signature={"answers": f"*{element}", "moments": "*fp32"}
        | numbers
        | dict.fromkeys(_CONSTANTS, "constexpr"),
        constants=dict(zip(_CONSTANTS, (branches, rescaled, chosen.block), strict=True)),
        aligned=("answers", "moments", "n", "branch_stride", "answer_request"),
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )


KERNEL = Kernel(
    name="guidance_moments",
    function=_guidance_moments,
    variants=tuple(
        _variant(element, branches, rescaled=rescaled)
        for element in ("fp16", "bf16", "fp32")
        for branches, rescaled in ((3, False), (3, True), (2, True))
    ),
    grid="(ceil(n / BLOCK), requests, 1)",
)


def guidance_moments(answers: Tensor, n: int, strides: tuple[int, int], *, rescaled: bool) -> Tensor:
    """The numbers of every block: float32 (R, SUMS, blocks), of which only the first of SUMS is written where
    nothing is rescaled.

    answers (B, R, ...) of n elements a request, with the strides of its first two axes; checked by
    `guidance_step`.
    """
    chosen = tuned("guidance_moments", answers, size=n)
    chunks = -(-n // chosen.block)
    moments = torch.empty((answers.shape[1], SUMS, chunks), device=answers.device)
    arguments: dict[str, Argument] = {"answers": answers, "moments": moments, "n": n, "chunks": chunks}
    arguments |= {"branch_stride": strides[0], "answer_request": strides[1]}
    constants = {"BRANCHES": len(answers), "RESCALED": rescaled, "BLOCK": chosen.block}
    constants |= {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    launch(KERNEL, (chunks, answers.shape[1], 1), arguments, constants)
    return moments
