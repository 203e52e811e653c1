"""Clean latents of a one-step model, as the decoder or the latent checker takes them, in one launch.

Body of `fused.latent_to_x0`. Latents may be expanded over the probes, and are then read from cache after the
first. Grid sizes: n elements of a probe, probes, requests.
"""
# The parameters of jitted functions are Triton values, which have no types here.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-return"

import torch
import triton
import triton.language as tl
from torch import Tensor

from safelight.kernels.triton.checks import FLOATS, dense, row_strides, shaped, together, typed
from safelight.kernels.triton.kernel import Kernel, Variant
from safelight.kernels.triton.launch import Argument, launch, tuned
from safelight.kernels.triton.tuning import setting


@triton.jit(do_not_specialize=["probes"])
def _latent_to_x0(
    latents,
    answers,
    out,
    finite,
    n,
    probes,
    latent_request,
    latent_probe,
    answer_request,
    answer_probe,
    x0_z,
    x0_out,
    factor,
    CHECKED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    probe, request = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    inside, row = at < n, request * probes + probe
    z = tl.load(latents + request * latent_request + probe * latent_probe + at, inside, other=0.0)
    answer = tl.load(answers + request * answer_request + probe * answer_probe + at, inside, other=0.0)
    x0 = x0_z * z.to(tl.float32) + x0_out * answer.to(tl.float32)
    tl.store(out + row * n + at, (x0 / factor).to(out.dtype.element_ty), inside)
    if CHECKED:
        odd = tl.sum((~(tl.abs(x0) < float("inf"))).to(tl.int32))
        if odd > 0:
            tl.store(finite + row, False)


_NUMBERS = ("n", "probes", "latent_request", "latent_probe", "answer_request", "answer_probe")
_SCALARS = ("x0_z", "x0_out", "factor")


def _variant(element: str) -> Variant:
    """As the engine uses it: latents are float32, what the networks make and take is of their dtype."""
    chosen = setting("latent_to_x0")
    pointers = {"latents": "*fp32", "answers": f"*{element}", "out": f"*{element}", "finite": "*i1"}
    kinds = dict.fromkeys(_NUMBERS, "i32") | dict.fromkeys(_SCALARS, "fp32")
    return Variant(
        name=f"latent_to_x0_{element}",
        signature=pointers | kinds | {"CHECKED": "constexpr", "BLOCK": "constexpr"},
        constants={"CHECKED": True, "BLOCK": chosen.block},
        aligned=("latents", "answers", "out", "n", *_NUMBERS[2:]),
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )


KERNEL = Kernel(
    name="latent_to_x0",
    function=_latent_to_x0,
    variants=tuple(_variant(element) for element in ("fp16", "bf16", "fp32")),
    grid="(ceil(n / BLOCK), probes, requests)",
)


def latent_to_x0(
    latents: Tensor,
    answers: Tensor,
    *,
    x0_z: float,
    x0_out: float,
    scaling_factor: float = 1.0,
    finite: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`fused.latent_to_x0`. The first two axes may have any stride; the others must be in one memory order:
    contiguous, or channels-last in all tensors.
    """
    name = "latent_to_x0"
    if answers.dim() < 3:
        raise ValueError(f"{name}: answers must be (R, P, ...); got {tuple(answers.shape)}")
    last = answers.dim() == 5 and answers.numel() > 0 and not answers[0, 0].is_contiguous()
    if last:
        latents, answers = latents.movedim(-3, -1), answers.movedim(-3, -1)
        out = None if out is None else out.movedim(-3, -1)
    made = torch.empty(answers.shape, dtype=answers.dtype, device=answers.device) if out is None else out
    requests, probes = answers.shape[:2]
    shaped(name, {"latents": (latents, tuple(answers.shape)), "out": (made, tuple(answers.shape))})
    typed(name, {"latents": (latents, FLOATS), "answers": (answers, FLOATS), "out": (made, FLOATS)})
    if finite is not None:
        shaped(name, {"finite": (finite, (requests, probes))})
        typed(name, {"finite": (finite, (torch.bool,))})
    together(name, latents=latents, answers=answers, out=made, finite=finite)
    dense(name, out=made, finite=finite)
    strides = (*row_strides(name, "latents", latents, 2), *row_strides(name, "answers", answers, 2))
    n, chosen = answers[0, 0].numel() if answers.numel() else 0, tuned(name, answers)
    arguments: dict[str, Argument] = {"latents": latents, "answers": answers, "out": made}
    arguments |= {"finite": made if finite is None else finite}
    arguments |= dict(zip(_NUMBERS, (n, probes, *strides), strict=True))
    scalars = (float(x0_z), float(x0_out), float(scaling_factor))
    constants = {"CHECKED": finite is not None, "BLOCK": chosen.block}
    constants |= {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    grid = (-(-n // chosen.block), probes, requests)
    launch(KERNEL, grid, arguments | dict(zip(_SCALARS, scalars, strict=True)), constants)
    return made.movedim(-1, -3) if last else made
