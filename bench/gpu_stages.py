"""One detection taken apart: the time of each stage in a CUDA graph of its own, beside its physical floor.

The floor is max(FLOP / matrix peak, weight bytes / copy bandwidth), both measured on the same GPU in the same
run; what lies between the networks has the time of its bytes, which is nothing: there the launch is the
limit. Draws the waterfall.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safelight.bench.gpu_models import TinyDecoder
from safelight.bench.gpu_timing import copy_bytes_per_second, in_graph
from safelight.bench.rows import percentiles
from safelight.engine.bundle import Bundle
from safelight.engine.graphs.backend import GraphBackend
from safelight.engine.graphs.placed import Placement, Precision
from safelight.engine.graphs.runner import Runner
from safelight.engine.graphs.screening import LatentScreening, PictureScreening, Screening
from safelight.engine.model_folder import ModelFolder
from safelight.kernels import ops
from safelight.probe import ProbeConfig

Call = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a detection. `weights` are read and `flops` done once; `moved` bytes are read and written."""

    name: str
    call: Call
    flops: int
    weights: int
    moved: int

    def floor_ms(self, flops_per_s: float, bytes_per_s: float) -> float:
        """The least time that the device needs for it, in ms."""
        return 1e3 * max(self.flops / flops_per_s, (self.weights + self.moved) / bytes_per_s)


def stages(screening: Screening, *, probes: int) -> list[Stage]:
    """The stages of one request, each on the answers of the one before, in the order of a detection."""
    part, device = screening._probing, screening.device
    unet: Any = part.unet
    given = {
        name: torch.zeros(shape, dtype=dtype, device=device)
        for name, (dtype, shape) in screening.drawn_inputs(1, probes).items()
    }
    given["angle"].fill_(0.6)
    given["rotate_mask"].fill_(True)
    given["numbers"].copy_(torch.arange(probes))
    made = {
        name: torch.zeros(shape, dtype=dtype, device=device)
        for name, (dtype, shape) in (
            ("block", screening.block(1, probes)),
            ("shown", screening.shown(1, probes)),
            ("whole", (torch.bool, (1, probes))),
        )
    }
    text: Any = part.text_encoder

    def encode() -> Tensor:
        hidden: Tensor = text(given["input_ids"]).last_hidden_state
        return hidden

    hidden = encode()

    def draw() -> tuple[Tensor, Tensor]:
        return screening.probes.draw(hidden, given, made["whole"], ProbeConfig())

    turned, latents = draw()
    sample = (part.one_step.input_scale * latents).to(screening.dtype).flatten(0, 1)
    embeds = turned.flatten(0, 1)

    def denoise() -> Tensor:
        out: Tensor = unet(sample, screening._timestep, embeds, return_dict=False)[0]
        return out

    answers = denoise().contiguous().view(1, probes, *sample.shape[1:])
    found = [
        _network("text encoder", encode, part.text_encoder),
        _between("probes", draw, hidden, turned, latents[:, :1]),
        _network("UNet", denoise, part.unet),
    ]
    if isinstance(screening, PictureScreening):
        return found + _pictures(screening, latents, answers, given, made)
    assert isinstance(screening, LatentScreening)
    checker = screening._checker

    def settle() -> Tensor:
        step = part.one_step
        return ops.latent_to_x0(latents, answers, x0_z=step.x0_z, x0_out=step.x0_out, finite=made["whole"])

    x0 = settle().flatten(0, 1)
    margins = checker(x0).view(1, probes, -1)
    return [
        *found,
        _between("x0", settle, latents, answers, x0),
        _network("latent checker", lambda: checker(x0), checker),
        _between(
            "vote", lambda: ops.margin_vote(margins, made["whole"], given["need"], out=made["block"]), margins
        ),
    ]


def _pictures(
    screening: PictureScreening,
    latents: Tensor,
    answers: Tensor,
    given: dict[str, Tensor],
    made: dict[str, Tensor],
) -> list[Stage]:
    """The second half, by way of pictures."""
    detector, step = screening._detector, screening._probing.one_step
    vae: Any = detector.vae
    finite = made["whole"]

    def settle() -> Tensor:
        return ops.latent_to_x0(
            latents,
            answers,
            x0_z=step.x0_z,
            x0_out=step.x0_out,
            scaling_factor=detector.scaling_factor,
            finite=finite,
        )

    unscaled = settle().flatten(0, 1).to(next(vae.parameters()).dtype)

    def decode() -> Tensor:
        out: Tensor = vae.decode(unscaled, return_dict=False)[0]
        return out

    decoded = decode().to(screening.dtype)

    def resize() -> Tensor:
        return ops.clip_input(
            decoded, detector.size, mean=detector.mean, deviation=detector.std, finite=finite
        )

    checked = resize()
    embeds = detector.checker.embed(checked)[None]

    def vote() -> Tensor:
        need, concepts = given["need"], screening._concepts
        return ops.concept_vote(embeds, finite, need, concepts=concepts, out=made["block"])

    return [
        _between("x0", settle, latents, answers, unscaled),
        _network("decoder", decode, vae.decoder),
        _between("clip_input", resize, decoded, checked),
        _network("image checker", lambda: detector.checker.embed(checked), detector.checker.vision_model),
        _between("vote", vote, embeds, made["block"]),
    ]


def _network(name: str, call: Call, network: Any) -> Stage:
    """A stage that is a network: its FLOPs are counted in one call."""
    from torch.utils.flop_counter import FlopCounterMode

    module: nn.Module = network
    with FlopCounterMode(display=False) as counter:
        call()
    weights = sum(value.numel() * value.element_size() for value in module.parameters())
    return Stage(name, call, int(counter.get_total_flops()), weights, 0)


def _between(name: str, call: Call, *moved: Tensor) -> Stage:
    return Stage(name, call, 0, 0, sum(value.numel() * value.element_size() for value in moved))


def staged(
    runner: Runner, bundle: Bundle, model: Path, *, precision: Precision, probes: int, peak: int
) -> dict[str, list[tuple[str, float, float]]]:
    """By variant, (stage, measured ms, floor ms) of each stage. `peak` is the edge of the matrices whose
    product is the matrix peak. Without a GPU the copy bandwidth is not measured, and the floors mean nothing.
    """
    on_gpu, placement = runner.device.type == "cuda", Placement(precision)
    flops = matrix_peak(placement.dtype, runner.device, peak)
    copy = copy_bytes_per_second() if on_gpu else 1e10
    found: dict[str, list[tuple[str, float, float]]] = {}
    for name, kind, latent in (
        ("full decoder", ModelFolder, False),
        ("tiny decoder", TinyDecoder, False),
        ("latent checker", ModelFolder, True),
    ):
        backend = GraphBackend(bundle, kind.open(model), placement, runner)
        chosen = torch.backends.cudnn.flags(enabled=True, benchmark=True) if on_gpu else nullcontext()
        with torch.inference_mode(), chosen:
            parts = stages(backend.screening(latent=latent), probes=probes)
            found[name] = [(part.name, _ms(part.call, on_gpu), part.floor_ms(flops, copy)) for part in parts]
    return found


def _ms(call: Call, on_gpu: bool) -> float:
    if on_gpu:
        return float(percentiles(in_graph(call, calls=4, repeats=20))["p50_ms"]) / 1e3  # of microseconds
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def matrix_peak(dtype: torch.dtype, device: torch.device, size: int) -> float:
    """FLOP per second of a square matrix product on random data, the best of a few."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def waterfall(parts: dict[str, list[tuple[str, float, float]]], path: Path, title: str) -> None:
    """Draw each variant's stages one after the other, in ms, with the floor of each inside its bar.

    `parts` holds, by variant, (stage, measured ms, floor ms).
    """
    from matplotlib.figure import Figure

    rows = sum(len(found) + 1 for found in parts.values())
    figure = Figure(figsize=(8, 0.32 * rows + 1.2), layout="constrained")
    axes = figure.subplots()
    names: list[str] = []
    for variant, found in parts.items():
        start = 0.0
        for name, took, floor in found:
            axes.barh(len(names), took, left=start, color="#c9ccd6")
            axes.barh(len(names), min(took, floor), left=start, color="#b3402e")
            axes.text(start + took, len(names), f" {took:.2f} ({floor:.2f})", va="center", fontsize=8)
            names.append(name)
            start += took
        names.append(f"{variant}: {start:.1f} ms")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel="ms; in red and in brackets the floor of each stage", title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
