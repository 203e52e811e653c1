"""The fused operations as cases: their inputs, the same work in plain torch, and the reference.

Plain torch is written so that a graph can capture it and torch.compile fuse it: without waiting for the GPU,
and with torch's own random numbers where the operation draws.
"""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from safelight.bench.kernel_case import NORM_CHECK, Case, Sizes, body, difference, ends, traffic
from safelight.kernels import fused, reference
from safelight.kernels.fused import Concepts, Directions, Step
from safelight.kernels.philox import Stream
from safelight.kernels.resize import crop_window, resize_matrix

ANGLE = 0.35  # radians
STEPS = 25
CLIP_MEAN, CLIP_DEVIATION = (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)
# one of 255 levels, where sums just above and just below a half are rounded apart; over the largest value
LEVEL = 1 / 255 / min(CLIP_DEVIATION) / 2.14


def _rows(sizes: Sizes, device: str) -> tuple[Tensor, Tensor, Tensor]:
    seeds = torch.arange(sizes.requests, device=device) * 7919 + 11
    return (
        seeds,
        torch.full((sizes.requests,), ANGLE, device=device),
        torch.arange(sizes.probes, device=device),
    )


def _turned_plain(
    z: Tensor, angle: Tensor, numbers: Tensor, mask: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The reference's rotation along directions of torch's own generator, spherical: v is not used."""
    shape = (len(z), len(numbers), *z.shape[1:])
    u = torch.randn(shape, device=z.device)
    angles = torch.where(numbers == 0, 0.0, angle[:, None])
    return reference.probe_rotate(z, u, torch.zeros_like(u), angles, torch.zeros_like(angles), mask).to(dtype)


def _norm_error(made: Tensor, z: Tensor | None) -> float:
    """How far the probes' norms are from that of probe 0, or of z."""
    norms = made.float().norm(dim=-1)
    wanted = norms[:, :1] if z is None else z.float().norm(dim=-1)[:, None]
    return float(((norms - wanted).abs() / wanted).max())


def probe_rotate(sizes: Sizes, dtype: torch.dtype, device: str) -> Case:
    """Embeddings of a prompt, the tokens up to its end rotated."""
    shape = (sizes.requests, sizes.tokens, sizes.width)
    z = torch.randn(shape, device=device).to(dtype)
    seeds, angle, numbers = _rows(sizes, device)
    mask = (torch.arange(sizes.tokens, device=device) < sizes.tokens - 2).expand(shape[:2]).contiguous()
    out = torch.empty(sizes.requests, sizes.probes, *shape[1:], dtype=dtype, device=device)
    finite = torch.ones(sizes.requests, sizes.probes, dtype=torch.bool, device=device)
    given: dict[str, Any] = {"numbers": numbers, "directions": Directions(Stream.PROMPT_U)}
    call = body("probe_rotate")
    return Case(
        "probe_rotate",
        f"R{sizes.requests} P{sizes.probes} {sizes.tokens}x{sizes.width}",
        traffic(z, out, mask),
        lambda: call(z, seeds, angle, mask=mask, finite=finite, out=out, **given),
        lambda: _turned_plain(z, angle, numbers, mask, dtype),
        lambda: difference(
            [ends(out)],
            [fused.probe_rotate(ends(z), ends(seeds), ends(angle), mask=ends(mask), **given)],
        ),
        lambda made: _norm_error(made, z),
        NORM_CHECK,
    )


def probe_latents(sizes: Sizes, dtype: torch.dtype, device: str) -> Case:
    """Starting latents, drawn and rotated as a whole."""
    size = sizes.latents[0] * sizes.latents[1] * sizes.latents[2]
    seeds, angle, numbers = _rows(sizes, device)
    out = torch.empty(sizes.requests, sizes.probes, *sizes.latents, device=device)
    given: dict[str, Any] = {"numbers": numbers, "directions": Directions(Stream.LATENT_U)}
    given |= {"shape": sizes.latents}

    def plain() -> Tensor:
        z = torch.randn(sizes.requests, size, device=device)
        return _turned_plain(z, angle, numbers, None, torch.float32)

    call = body("probe_latents")
    return Case(
        "probe_latents",
        f"R{sizes.requests} P{sizes.probes} {'x'.join(map(str, sizes.latents))}",
        traffic(out),
        lambda: call(seeds, angle, out=out, **given),
        plain,
        lambda: difference([ends(out)], [fused.probe_latents(ends(seeds), ends(angle), **given)]),
        lambda made: _norm_error(made, None),
        NORM_CHECK,
    )


def guidance_step(sizes: Sizes, dtype: torch.dtype, device: str, *, branches: int = 2) -> Case:
    """A step of the sampler with guidance; with three branches SafeCFG's, which first reduces."""
    shape = (sizes.requests, *sizes.latents)
    x, x0_prev = torch.randn(shape, device=device), torch.randn(shape, device=device)
    answers = torch.randn(branches, *shape, device=device).to(dtype)
    table = torch.rand(STEPS, 6, device=device) + 0.1
    step = torch.tensor([7], device=device)
    amounts: dict[str, Any] = {"scale": torch.full((sizes.requests,), 7.5, device=device)}
    if branches == 3:
        amounts |= {
            name: torch.rand(sizes.requests, device=device) + 0.5 for name in ("strength", "threshold")
        }
    distance = torch.empty(sizes.requests, device=device) if branches == 3 else None
    out = Step(torch.empty_like(x), torch.empty_like(x), torch.empty_like(answers), distance)

    def plain() -> list[Tensor]:
        free = answers[0]
        if branches == 3:
            free, _ = reference.safe_branch(
                answers[0], answers[1], strength=amounts["strength"], threshold=amounts["threshold"]
            )
        guided = reference.guide(free, answers[-1], amounts["scale"])
        row, after = table.index_select(0, step)[0], table.index_select(0, step + 1)[0]
        moved, x0 = reference.scheduler_step(x, guided, x0_prev, row)
        return [moved, x0, (after[0] * moved).to(dtype).expand(answers.shape).contiguous()]

    def wanted() -> list[Tensor]:
        made = fused.guidance_step(x, answers, x0_prev, table=table, step=step, **amounts)
        return [made.x, made.x0, made.model_in]

    call = body("guidance_step")
    return Case(
        f"guidance_step, {branches} branches",
        f"R{sizes.requests} {'x'.join(map(str, sizes.latents))}",
        traffic(x, x0_prev, answers, out.x, out.x0, out.model_in),
        lambda: call(x, answers, x0_prev, table=table, step=step, out=out, **amounts),
        plain,
        lambda: difference([out.x, out.x0, out.model_in], wanted()),
        lambda made: difference(made, wanted()),
    )


def latent_to_x0(sizes: Sizes, dtype: torch.dtype, device: str) -> Case:
    """Clean latents of a one-step model."""
    shape = (sizes.requests, sizes.probes, *sizes.latents)
    latents, answers = torch.randn(shape, device=device), torch.randn(shape, device=device).to(dtype)
    finite = torch.ones(shape[:2], dtype=torch.bool, device=device)
    out = torch.empty_like(answers)
    given: dict[str, Any] = {"x0_z": 14.6, "x0_out": -14.5, "scaling_factor": 0.18215}
    call = body("latent_to_x0")

    def plain() -> Tensor:
        return fused.latent_to_x0(latents, answers, finite=finite, **given)

    return Case(
        "latent_to_x0",
        f"R{sizes.requests} P{sizes.probes} {'x'.join(map(str, sizes.latents))}",
        traffic(latents, answers, out),
        lambda: call(latents, answers, finite=finite, out=out, **given),
        plain,
        lambda: difference([out], [plain()]),
        lambda made: difference([made], [fused.latent_to_x0(latents.cpu(), answers.cpu(), **given)]),
    )


def clip_input(sizes: Sizes, dtype: torch.dtype, device: str) -> Case:
    """A decoder's pictures to the checker's input; the plain form has its two matrices ready on the GPU."""
    count, px = sizes.requests * sizes.probes, sizes.picture
    decoded = (torch.rand(count, 3, px, px, device=device) * 2.4 - 1.2).to(dtype)
    finite = torch.ones(sizes.requests, sizes.probes, dtype=torch.bool, device=device)
    mean, deviation = (torch.tensor(values, device=device) for values in (CLIP_MEAN, CLIP_DEVIATION))
    out = torch.empty(count, 3, sizes.clip, sizes.clip, dtype=dtype, device=device)
    window, _ = crop_window(px, px, sizes.clip)
    matrix = torch.from_numpy(resize_matrix(px, window.length, size=sizes.clip, offset=window.offset)).to(
        device
    )

    def plain() -> Tensor:
        values = decoded.float()
        torch.isfinite(values).flatten(1).all(-1)
        levels = ((values / 2 + 0.5).clamp(0, 1) * 255).round()
        levels = (levels @ matrix.T + 0.5).floor().clamp(0, 255)
        levels = (matrix @ levels + 0.5).floor().clamp(0, 255)
        return ((levels / 255 - mean.view(-1, 1, 1)) / deviation.view(-1, 1, 1)).to(dtype)

    def wanted() -> Tensor:
        return fused.clip_input(ends(decoded).cpu(), sizes.clip, mean=mean.cpu(), deviation=deviation.cpu())

    call = body("clip_input")
    return Case(
        "clip_input",
        f"N{count} {px}x{px} -> {sizes.clip}",
        traffic(decoded, out),
        lambda: call(decoded, sizes.clip, mean=mean, deviation=deviation, finite=finite, out=out),
        plain,
        lambda: difference([ends(out)], [wanted()]),
        lambda made: difference([ends(made)], [wanted()]),
        slack=LEVEL,
    )


def concept_vote(sizes: Sizes, dtype: torch.dtype, device: str) -> Case:
    """Image embeddings to the block that goes back to the host."""
    embeds = torch.randn(sizes.requests, sizes.probes, sizes.embed, device=device).to(dtype)
    finite = torch.ones(sizes.requests, sizes.probes, dtype=torch.bool, device=device)
    need = torch.ones(sizes.requests, dtype=torch.int64, device=device)
    concepts = Concepts(
        torch.randn(sizes.concepts, sizes.embed, device=device),
        torch.rand(sizes.concepts, device=device) * 0.3,
        torch.randn(sizes.special, sizes.embed, device=device),
        torch.rand(sizes.special, device=device) * 0.3,
    )

    def plain() -> Tensor:
        return fused.concept_vote(embeds, finite, need, concepts=concepts)

    out = torch.empty_like(plain())
    call = body("concept_vote")
    return Case(
        "concept_vote",
        f"R{sizes.requests} P{sizes.probes} C{sizes.concepts} D{sizes.embed}",
        traffic(embeds, concepts.embeds, out),
        lambda: call(embeds, finite, need, concepts=concepts, out=out),
        plain,
        lambda: difference([out], [plain()]),
        lambda made: difference([made], [_on_cpu(embeds, finite, need, concepts)]),
    )


def _on_cpu(embeds: Tensor, finite: Tensor, need: Tensor, concepts: Concepts) -> Tensor:
    moved = Concepts(*(getattr(concepts, item.name).cpu() for item in fields(concepts)))
    return fused.concept_vote(embeds.cpu(), finite.cpu(), need.cpu(), concepts=moved)


Build = Callable[[Sizes, torch.dtype, str], Case]
# name -> builder, and how many requests make at least 256 MB of traffic
BUILDERS: dict[str, tuple[Build, int]] = {
    "probe_rotate": (probe_rotate, 256),
    "probe_latents": (probe_latents, 512),
    "guidance_step, 2 branches": (guidance_step, 1024),
    "guidance_step, 3 branches": (partial(guidance_step, branches=3), 1024),
    "latent_to_x0": (latent_to_x0, 512),
    "clip_input": (clip_input, 32),
    "concept_vote": (concept_vote, 24_000),
}
