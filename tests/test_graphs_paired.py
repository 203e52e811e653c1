"""Two text encoders on the GPU's way, on the processor: what only they have. All that they share with one is
held by the tests of the graphs, which run on both.
"""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from safelight.bench.bare_bundle import bare_bundle
from safelight.engine.bundle import Bundle
from safelight.engine.detect import Detector
from safelight.engine.eager import load_graph
from safelight.engine.graphs.backend import GraphBackend
from safelight.engine.graphs.placed import PRECISIONS, PlacedFolder, Placement
from safelight.engine.graphs.probes import DeviceProbes, probe_values
from safelight.engine.graphs.runner import Processor
from safelight.engine.model_folder import ModelFolder
from safelight.engine.neighbourhood import Neighbourhood, Request
from safelight.engine.tokenizer import open_tokenizer
from safelight.kernels import host
from safelight.kernels.dispatch import use_backend
from safelight.probe import ProbeConfig

PROMPTS = ["a red star", "hello! a circle?! on a square"]
ROWS, WIDTH, POOLED = 33, 160, 80


@pytest.fixture(scope="module")
def folder(paired_model: Path) -> ModelFolder:
    return ModelFolder.open(paired_model)


@pytest.fixture(scope="module")
def bundle(paired_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bare_bundle(paired_model, tmp_path_factory.mktemp("bundles") / "bare")


def drawn(
    bundle: Bundle, config: ProbeConfig, seeds: list[int], numbers: range
) -> tuple[np.ndarray, np.ndarray, list[torch.Tensor]]:
    """Probes of prompts with conditionings of random numbers: those of the host, its latents, and embeddings,
    latents and finiteness as the device draws them.
    """
    tokenizer = open_tokenizer(bundle)
    requests = [Request(tokenizer.encode(text)[0], seed) for text, seed in zip(PROMPTS, seeds, strict=False)]
    neighbourhood = Neighbourhood(bundle.manifest, config, WIDTH)
    hidden = np.random.default_rng(0).standard_normal((len(seeds), ROWS, WIDTH), dtype=np.float32)
    hidden[:, -1, POOLED:] = 0
    probes = neighbourhood.draw(requests, numbers)
    turned = host.probe_rotate(hidden, probes.u, probes.v, probes.angle, probes.phase)
    turned = np.where(probes.mask[:, None, :, None], turned, hidden[:, None])
    values = probe_values(neighbourhood, requests, numbers)
    given = {name: torch.from_numpy(value) for name, value in values.items()}
    finite = torch.zeros(len(seeds), len(numbers), dtype=torch.bool)
    made = DeviceProbes(bundle.manifest).draw(torch.from_numpy(hidden), given, finite, config)
    return turned, probes.latents, [*made, finite]


KINDS = [
    ProbeConfig(count=4, angle_rad=0.7),
    ProbeConfig(count=4, angle_rad=0.7, kind="circular", target="both"),
    ProbeConfig(count=4, angle_rad=0.7, target="latent"),
]


@pytest.mark.parametrize("config", KINDS, ids=lambda config: f"{config.kind}-{config.target}")
def test_a_conditioning_turns_on_the_device_as_on_the_host(
    bundle: Bundle, config: ProbeConfig, tol: dict
) -> None:
    turned, latents, (found, starts, finite) = drawn(bundle, config, [9, 2**64 - 1], range(4))
    torch.testing.assert_close(found, torch.from_numpy(turned), **tol[torch.float32])
    torch.testing.assert_close(starts, torch.from_numpy(latents.copy()), **tol[torch.float32])
    pooled = found[:, :, -1]
    assert not pooled[..., POOLED:].any() and finite.all()
    moved = (pooled[:, 1:] - pooled[:, :1]).abs().amax(-1) > 0.1
    assert moved.all() == moved.any() == (config.target != "latent")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU compiles the kernels; tests marked gpu run them")
@pytest.mark.parametrize("config", KINDS[:2], ids=lambda config: f"{config.kind}-{config.target}")
def test_compiled_bodies_take_a_conditioning_s_parts(bundle: Bundle, config: ProbeConfig, tol: dict) -> None:
    """Rows and columns of it that lie apart in memory."""
    pytest.importorskip("triton", reason="the kernels need triton, which this machine has not")
    with use_backend("triton"):
        turned, latents, (found, starts, _) = drawn(bundle, config, [9], range(1, 2))
    torch.testing.assert_close(found, torch.from_numpy(turned), **tol[torch.float32])
    torch.testing.assert_close(starts, torch.from_numpy(latents.copy()), **tol[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("config", KINDS, ids=lambda config: f"{config.kind}-{config.target}")
def test_a_full_size_conditioning_needs_no_kernel_that_was_not_built_ahead(
    bundle: Bundle, config: ProbeConfig, dtype: torch.dtype
) -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which this machine has not")
    from safelight.kernels.triton.launch import use_runner

    second = bundle.manifest.second_text
    assert second is not None
    picture = replace(bundle.manifest.picture, latents=(4, 128, 128))
    manifest = replace(bundle.manifest, second_text=replace(second, pooled=1280), picture=picture)
    given = {
        "rotate_mask": torch.ones(2, 78, dtype=torch.bool),
        "seeds": torch.zeros(2, dtype=torch.int64),
        "angle": torch.ones(2),
        "numbers": torch.arange(4),
    }
    started: list[str] = []
    hidden, finite = torch.empty(2, 78, 2048, dtype=dtype), torch.ones(2, 4, dtype=torch.bool)
    with use_backend("triton"), use_runner(lambda kernel, variant, *_: started.append(variant.name)):
        turned, latents = DeviceProbes(manifest).draw(hidden, given, finite, config)
    assert turned.shape == (2, 4, 78, 2048) and turned.dtype == dtype and latents.shape == (2, 4, 4, 128, 128)
    assert len(started) == (1 if config.target == "latent" else 3)


def test_a_pooled_embedding_and_a_token_turn_along_different_directions(bundle: Bundle) -> None:
    """The planes are drawn apart: whoever knows one does not know the other."""
    config = ProbeConfig(count=4, angle_rad=math.pi / 2)
    requests = [Request(open_tokenizer(bundle).encode(PROMPTS[0])[0], 9)]
    u = Neighbourhood(bundle.manifest, config, WIDTH).draw(requests, range(4)).u[0, 1:]
    rows = u[:, :, :POOLED] / np.linalg.norm(u[:, :, :POOLED], axis=-1, keepdims=True)
    alike = np.abs(np.einsum("ptd,pd->pt", rows[:, :-1], rows[:, -1]))
    assert alike.max() < 0.6 and not u[:, -1, POOLED:].any()


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("target", ["prompt", "latent"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_pooled_embedding_that_is_not_finite_blocks(
    bundle: Bundle, folder: ModelFolder, steps: int, target: Any, value: float
) -> None:
    """It alone: no hidden state passes through the projection."""
    backend = GraphBackend(bundle, folder, Placement("float32"), Processor())
    with torch.inference_mode():
        backend._folder.load("text_encoder_2").text_projection.weight.data.fill_(value)
    probe = ProbeConfig(count=2, target=target, threshold=1.0)
    with Detector(bundle, backend, probe, steps=steps) as detector:
        verdict = detector.check(PROMPTS[0], seed=0)
    assert verdict.blocked and verdict.reason == "non_finite"


def test_stages_that_share_a_tower_leave_out_one_layer_of_it(folder: ModelFolder) -> None:
    """A placed folder loads each network once; the tower was cut when the first of them was made."""
    placed = PlacedFolder.place(folder, torch.device("cpu"), Placement("float32"))
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 700, (2, 2 * (ROWS - 1))))
    wanted = load_graph(folder, "text_encoder")(ids)
    for graph in ("text_encoder", "detector", "text_encoder"):
        module = load_graph(placed, graph)
    assert all(torch.equal(*pair) for pair in zip(module(ids), wanted, strict=True))


def test_all_of_every_network_lies_on_the_device(bundle: Bundle, folder: ModelFolder) -> None:
    """The sizes of the picture too, which are no weight of the UNet: a capture cannot fetch them."""
    runner = Processor()
    runner.device = torch.device("meta")
    backend = GraphBackend(bundle, folder, Placement("float16"), runner)

    def networks() -> Iterator[torch.nn.Module]:
        yield backend.sampler()._steps._denoiser  # type: ignore[attr-defined]
        yield backend.screening(latent=False)._probing
        for graph in ("text_encoder", "unet"):
            yield backend._module(graph)

    for network in networks():
        parts = list(chain(network.parameters(), network.buffers()))
        assert parts and {part.device.type for part in parts} == {"meta"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_autoencoder_that_passes_float16_s_range_still_draws(
    bundle: Bundle, folder: ModelFolder, precision: Any
) -> None:
    """As SDXL's own does, and says by `force_upcast`: else all that it draws would be blocked."""
    backend = GraphBackend(bundle, folder, Placement(precision), Processor())
    vae: Any = backend._folder.load("vae")
    first = vae.decoder.conv_in
    with torch.inference_mode():
        first.weight.data.mul_(2e5)
        seen = first(torch.ones(1, 4, 8, 8, dtype=first.weight.dtype))
    assert seen.isfinite().all() and not seen.half().isfinite().all()
    for steps in (1, 2):
        with Detector(bundle, backend, ProbeConfig(count=2), steps=steps) as detector:
            verdict = detector.check(PROMPTS[0], seed=1)
        assert verdict.detail is None and verdict.reason != "non_finite" and verdict.margins
    assert {part.dtype for part in backend._folder.load("unet").parameters()} == {Placement(precision).dtype}


def test_an_autoencoder_that_keeps_to_the_range_is_as_short_as_the_rest(
    paired_model: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """One that says so, and those of the other class, whose pipelines do not ask."""
    mended = Path(shutil.copytree(paired_model, tmp_path / "mended"))
    path = mended / "vae/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"force_upcast": False}))
    for model, wanted in (
        (mended, torch.float16),
        (tiny_model, torch.float16),
        (paired_model, torch.float32),
    ):
        placed = PlacedFolder.place(ModelFolder.open(model), torch.device("cpu"), Placement("float16"))
        assert {part.dtype for part in placed.load("vae").parameters()} == {wanted}
