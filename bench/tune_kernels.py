"""Try block sizes and warps of the kernels on this GPU, and print the entry for `kernels/triton/tuning.py`.

Needs a GPU. Each kernel runs at the sizes of one 512 px request of 8 probes, in a graph, by one setting after
another; what is fastest is kept. Nothing is written: a person looks at the entry and commits it.

    python -P -m safelight.bench.tune_kernels
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from typing import Any

import torch

from safelight.errors import BackendUnavailable
from safelight.kernels import fused
from safelight.kernels.philox import Stream
from safelight.kernels.triton.tuning import Setting, use_setting

Call = Callable[[], Any]
REQUESTS, PROBES, TOKENS, WIDTH, LATENTS = 1, 8, 77, 1024, (4, 64, 64)


def cases(device: str, dtype: torch.dtype) -> Iterator[tuple[str, int, list[Setting], Call]]:
    """Each kernel: its name, the size of its rows, the settings to try, and a call that launches it."""
    from safelight.kernels.dispatch import load

    bodies = {name: load(name, "triton") for name in ("probe_rotate", "probe_latents", "guidance_step")}
    bodies |= {name: load(name, "triton") for name in ("latent_to_x0", "clip_input", "concept_vote")}
    seeds, angle = (
        torch.zeros(REQUESTS, dtype=torch.int64, device=device),
        torch.ones(REQUESTS, device=device),
    )
    drawn = {"seeds": seeds, "angle": angle, "numbers": torch.arange(PROBES, device=device)}
    hidden = torch.randn(REQUESTS, TOKENS, WIDTH, device=device).to(dtype)
    turn = partial(bodies["probe_rotate"], hidden, directions=fused.Directions(Stream.PROMPT_U), **drawn)
    yield "probe_rotate", WIDTH, _settings((WIDTH,), (1, 2, 4, 8)), turn
    start = fused.Directions(Stream.LATENT_U)
    latents = partial(bodies["probe_latents"], shape=LATENTS, directions=start, **drawn)
    yield "probe_rotate", 16384, _settings((2048, 4096), (8, 16, 32)), latents

    x, x0 = (torch.randn(REQUESTS, *LATENTS, device=device) for _ in range(2))
    answers = torch.randn(3, REQUESTS, *LATENTS, device=device).to(dtype)
    table, step = torch.ones(25, 6, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    sampled = {"scale": angle, "strength": angle, "threshold": angle, "table": table, "step": step}
    safely = partial(bodies["guidance_step"], x, answers, x0, **sampled)
    for name in ("guidance_moments", "guidance_step"):
        yield name, 16384, _settings((256, 512, 1024, 2048), (1, 2, 4, 8)), safely
    noise = torch.randn(REQUESTS, PROBES, *LATENTS, device=device)
    clean = partial(bodies["latent_to_x0"], noise, noise.to(dtype), x0_z=1.0, x0_out=1.0)
    yield "latent_to_x0", 16384, _settings((256, 512, 1024, 2048), (1, 2, 4, 8)), clean

    pictures = torch.randn(REQUESTS * PROBES, 3, 512, 512, device=device).to(dtype)
    normal = {"mean": torch.zeros(3, device=device), "deviation": torch.ones(3, device=device)}
    checked = partial(bodies["clip_input"], pictures, 224, **normal)
    yield "resize_axis", 224, _settings((64, 128, 256), (1, 2, 4)), checked
    yield "resize_runs", 224, _settings((256, 512, 1024), (1, 2, 4)), checked
    known = fused.Concepts(
        *(torch.ones(shape, device=device) for shape in ((17, 768), (17,), (3, 768), (3,)))
    )
    embeds = torch.randn(REQUESTS, PROBES, 768, device=device).to(dtype)
    finite = torch.ones(REQUESTS, PROBES, dtype=torch.bool, device=device)
    voted = partial(bodies["concept_vote"], embeds, finite, torch.ones_like(seeds), concepts=known)
    yield "concept_margins", 768, _settings((64, 128, 256, 512), (2, 4, 8)), voted
    yield "margin_vote", 0, _settings((0,), (1, 2)), voted


def _settings(blocks: tuple[int, ...], warps: tuple[int, ...]) -> list[Setting]:
    return [Setting(block, count) for block, count in product(blocks, warps)]


def fastest(kernel: str, settings: list[Setting], call: Call, measure: Callable[[Call], float]) -> Setting:
    """The setting with which `measure` finds the least time; the first of equals."""
    times: dict[Setting, float] = {}
    for tried in settings:
        with use_setting(kernel, tried):
            times[tried] = measure(call)
    return min(settings, key=times.__getitem__)


def entry(gpu: str, found: Mapping[str, Mapping[int, Setting]]) -> str:
    """The lines of the table for a GPU."""
    lines = [f'    "{kernel}": {dict(sorted(sizes.items()))},' for kernel, sizes in found.items()]
    return "\n".join([f'"{gpu}": {{', *lines, "},"])


def main() -> None:
    """Measure, and print the entry. Raises BackendUnavailable without a GPU."""
    if not torch.cuda.is_available():
        raise BackendUnavailable("tuning measures kernels on an NVIDIA GPU, and torch finds none here")
    from triton.testing import do_bench_cudagraph

    found: dict[str, dict[int, Setting]] = {}
    for kernel, size, settings, call in cases("cuda", torch.bfloat16):
        best = fastest(kernel, settings, call, lambda made: float(do_bench_cudagraph(made, rep=20)))
        found.setdefault(kernel, {})[best.block or size] = best
    print(entry(torch.cuda.get_device_name(), found))


if __name__ == "__main__":
    main()
