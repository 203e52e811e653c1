"""A step of the sampler between two calls of the denoiser: guidance, the solver's update, and the next input.

Body of `fused.guidance_step`, in one launch; a second one before it reduces each request where SafeCFG's
distance or the rescaling of guidance needs that (`guidance_moments`). Both read the step's number, and its
row of the table, from memory, so that one captured graph serves every step.
Grid sizes: n elements of a request, requests.
"""
# The parameters of jitted functions are Triton values, which have no types here.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-return"

import torch
import triton
import triton.language as tl
from torch import Tensor

from safelight.kernels.fused import Step
from safelight.kernels.triton.checks import FLOATS, dense, row_strides, shaped, together, typed
from safelight.kernels.triton.guidance_moments import guidance_moments, part, spreads
from safelight.kernels.triton.kernel import Kernel, Variant
from safelight.kernels.triton.launch import Argument, launch, tuned
from safelight.kernels.triton.tuning import setting

_COLUMNS = tl.constexpr(6)


@triton.jit(do_not_specialize=["steps", "chunks"])
def _guidance_step(
    x,
    answers,
    x0_prev,
    scale,
    strength,
    threshold,
    rescale,
    table,
    step,
    moments,
    x_out,
    x0_out,
    model_in,
    distance,
    n,
    requests,
    steps,
    chunks,
    x_request,
    x0_request,
    branch_stride,
    answer_request,
    BRANCHES: tl.constexpr,  # noqa: N803
    RESCALED: tl.constexpr,  # noqa: N803
    PARTS: tl.constexpr,  # noqa: N803
    MOMENT_BLOCK: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    chunk, request = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    number = tl.load(step)
    known = (number >= 0) & (number < steps)  # past the table nothing is known, and all becomes NaN
    row = table + number * _COLUMNS
    after = table + tl.minimum(number + 1, steps - 1) * _COLUMNS

    spot = answers + request * answer_request + at
    conditional = tl.load(spot + (BRANCHES - 1) * branch_stride, inside, other=0.0).to(tl.float32)
    guided = conditional
    if BRANCHES > 1:
        free = tl.load(spot, inside, other=0.0).to(tl.float32)
        weight, amount = tl.load(scale + request), 0.0
        if BRANCHES == 3:
            apart = tl.load(spot + branch_stride, inside, other=0.0).to(tl.float32) - free
            away = tl.sqrt(tl.sum(part(moments, request, chunks, 0, PARTS)) / n)
            share = away / tl.load(threshold + request)
            share = tl.where(share > 1.0, 1.0, share)
            amount = tl.load(strength + request) * tl.where(tl.abs(away) < float("inf"), share, 1.0)
            free = free + amount * apart
            if chunk == 0:
                tl.store(distance + request, away)
        guided = free + weight * (conditional - free)
        if RESCALED:
            spread, own = spreads(moments, request, n, chunks, weight, amount, PARTS, MOMENT_BLOCK)
            quotient = tl.where(spread == 0, 1.0, own / tl.where(spread == 0, 1.0, spread))
            guided = guided * (1.0 + tl.load(rescale + request) * (quotient - 1.0))

    old = tl.load(x + request * x_request + at, inside, other=0.0).to(tl.float32)
    before = tl.load(x0_prev + request * x0_request + at, inside, other=0.0).to(tl.float32)
    nan = float("nan")
    from_x, from_answer = tl.load(row + 1, known, other=nan), tl.load(row + 2, known, other=nan)
    next_x, next_x0 = tl.load(row + 3, known, other=nan), tl.load(row + 4, known, other=nan)
    next_x0_prev = tl.load(row + 5, known, other=nan)
    clean = from_x * old + from_answer * guided
    moved = next_x * old + next_x0 * clean + next_x0_prev * before
    following = (tl.load(after, known, other=nan) * moved).to(model_in.dtype.element_ty)
    tl.store(x_out + request * n + at, moved.to(x_out.dtype.element_ty), inside)
    tl.store(x0_out + request * n + at, clean.to(x0_out.dtype.element_ty), inside)
    for branch in tl.static_range(BRANCHES):
        tl.store(model_in + (branch * requests + request) * n + at, following, inside)


_NUMBERS = ("n", "requests", "steps", "chunks", "x_request", "x0_request", "branch_stride", "answer_request")
_CONSTANTS = ("BRANCHES", "RESCALED", "PARTS", "MOMENT_BLOCK", "BLOCK")


def _variant(element: str, branches: int, parts: int, *, rescaled: bool) -> Variant:
    """As the engine uses it: x and x0 are float32, the denoiser's tensors of its own dtype."""
    chosen = setting("guidance_step")
    pointers = dict.fromkeys(
        ("x", "answers", "x0_prev", "scale", "strength", "threshold", "rescale", "table", "step", "moments"),
        "*fp32",
    )
    pointers |= dict.fromkeys(("x_out", "x0_out", "model_in", "distance"), "*fp32")
    pointers |= {"answers": f"*{element}", "model_in": f"*{element}", "step": "*i64"}
    reduced = parts > 1
    values = (branches, rescaled, parts, setting("guidance_moments").block, chosen.block)
    name = f"guidance_step_{element}_{branches}{'_rescaled' if rescaled else ''}"
    return Variant(
        name=f"{name}_{parts}" if reduced else name,
        signature=pointers | dict.fromkeys(_NUMBERS, "i32") | dict.fromkeys(_CONSTANTS, "constexpr"),
        constants=dict(zip(_CONSTANTS, values, strict=True)),
        aligned=("x", "answers", "x0_prev", "x_out", "x0_out", "model_in")
        + ("n", "x_request", "x0_request", "branch_stride", "answer_request"),
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )


KERNEL = Kernel(
    name="guidance_step",
    function=_guidance_step,
    variants=tuple(
        _variant(element, branches, parts, rescaled=rescaled)
        for element in ("fp16", "bf16", "fp32")
        for branches, rescaled in ((1, False), (2, False), (2, True), (3, False), (3, True))
        # latents of 8 x 8, 32 x 32, 64 x 64 and 128 x 128
        for parts in ((1, 4, 16, 64) if branches == 3 or rescaled else (1,))
    ),
    grid="(ceil(n / BLOCK), requests, 1)",
)


def guidance_step(
    x: Tensor,
    answers: Tensor,
    x0_prev: Tensor,
    *,
    scale: Tensor,
    table: Tensor,
    step: Tensor,
    strength: Tensor | None = None,
    threshold: Tensor | None = None,
    rescale: Tensor | None = None,
    out: Step | None = None,
) -> Step:
    """`fused.guidance_step`. All of (R, ..., c, h, w) must be in one memory order: contiguous, or all of them
    channels-last; first axes may have any stride.
    """
    name, branches = "guidance_step", len(answers)
    if branches not in (1, 2, 3):
        raise ValueError(f"{name}: answers must be of 1, 2 or 3 branches; got {branches}")
    if branches == 3 and (strength is None or threshold is None):
        raise ValueError(f"{name}: three branches need strength and threshold, float32 (R,); give both")
    rescale = rescale if branches > 1 else None
    last = x.dim() == 4 and len(x) > 0 and not x[0].is_contiguous()
    x, x0_prev, answers = (tensor.movedim(-3, -1) if last else tensor for tensor in (x, x0_prev, answers))
    made = _outputs(x, answers) if out is None else _ordered(out, last)
    amounts = {"scale": scale, "strength": strength, "threshold": threshold, "rescale": rescale}
    amounts |= {"distance": made.distance}
    given = {key: value for key, value in amounts.items() if value is not None}
    _check(name, x, answers, x0_prev, made, given=given, table=table, step=step)
    x_request, x0_request = row_strides(name, "x", x, 1)[0], row_strides(name, "x0_prev", x0_prev, 1)[0]
    branch_stride, answer_request = row_strides(name, "answers", answers, 2)
    requests, n = len(x), x[0].numel() if len(x) else 0
    reduced, moments, chunks = branches == 3 or rescale is not None, scale, 1
    if reduced and x.numel():
        moments = guidance_moments(answers, n, (branch_stride, answer_request), rescaled=rescale is not None)
        chunks = moments.shape[-1]
    chosen = tuned(name, x, size=n)
    arguments: dict[str, Argument] = {"x": x, "answers": answers, "x0_prev": x0_prev}
    arguments |= {key: given.get(key, scale) for key in ("scale", "strength", "threshold", "rescale")}
    arguments |= {"table": table, "step": step, "moments": moments}
    arguments |= {"x_out": made.x, "x0_out": made.x0, "model_in": made.model_in}
    sizes = (n, requests, len(table), chunks, x_request, x0_request, branch_stride, answer_request)
    arguments |= {"distance": given.get("distance", scale)} | dict(zip(_NUMBERS, sizes, strict=True))
    values = (
        branches,
        rescale is not None,
        triton.next_power_of_2(chunks),
        tuned("guidance_moments", x, size=n).block,
        chosen.block,
    )
    constants = dict(zip(_CONSTANTS, values, strict=True))
    constants |= {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    launch(KERNEL, (-(-n // chosen.block), requests, 1), arguments, constants)
    return _ordered(made, last, back=True) if out is None else out


def _outputs(x: Tensor, answers: Tensor) -> Step:
    distance = x.new_empty(len(x), dtype=torch.float32) if len(answers) == 3 else None
    fresh, fresh_x0 = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    model_in = torch.empty(answers.shape, dtype=answers.dtype, device=x.device)
    return Step(fresh, fresh_x0, model_in, distance)


def _ordered(step: Step, last: bool, *, back: bool = False) -> Step:
    """The step with channels moved to the last axis, or back, where they are last in memory."""
    if not last:
        return step
    there, here = (-1, -3) if back else (-3, -1)
    x, x0, model_in = (tensor.movedim(there, here) for tensor in (step.x, step.x0, step.model_in))
    return Step(x, x0, model_in, step.distance)


def _check(
    name: str,
    x: Tensor,
    answers: Tensor,
    x0_prev: Tensor,
    made: Step,
    *,
    given: dict[str, Tensor],
    table: Tensor,
    step: Tensor,
) -> None:
    """Shapes, dtypes, devices and orders of everything that goes into a step."""
    whole, requests = tuple(x.shape), len(x)
    shaped(name, {"answers": (answers, (len(answers), *whole)), "x0_prev": (x0_prev, whole)})
    shaped(name, {"x of out": (made.x, whole), "x0 of out": (made.x0, whole)})
    shaped(name, {"model_in of out": (made.model_in, tuple(answers.shape)), "step": (step, (1,))})
    shaped(name, {key: (value, (requests,)) for key, value in given.items()})
    shaped(name, {"table": (table, (len(table), _COLUMNS.value))})
    floats = {"x": x, "answers": answers, "x0_prev": x0_prev, "x of out": made.x, "x0 of out": made.x0}
    typed(name, {key: (value, FLOATS) for key, value in floats.items()})
    typed(name, {key: (value, (torch.float32,)) for key, value in (given | {"table": table}).items()})
    typed(name, {"step": (step, (torch.int64,)), "model_in of out": (made.model_in, FLOATS)})
    together(name, **floats, **given, model_in=made.model_in, table=table, step=step)
    dense(name, x_of_out=made.x, x0_of_out=made.x0, model_in_of_out=made.model_in, table=table, **given)
