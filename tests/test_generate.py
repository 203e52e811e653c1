"""The generator: what is blocked is not drawn, what is flagged is not shown, and what is drawn is what
diffusers would draw.
"""

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from safelight.engine.backends import open_backend
from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.detect import Detector
from safelight.engine.generate import Generation, Generator
from safelight.engine.sampler import to_pictures
from safelight.errors import SafelightError
from safelight.kernels import reference
from safelight.kernels.philox import Stream
from safelight.manifest import Manifest
from safelight.schedule import SOLVERS
from safelight.verdict import Verdict


class Guard:
    """A detector that says what it is told to."""

    def __init__(self, reason: Any = None) -> None:
        self.reason = reason
        self.asked: list[tuple[str, int | None]] = []
        self.closed = 0

    def check(self, prompt: str, *, seed: int | None = None) -> Verdict:
        self.asked.append((prompt, seed))
        drawn = 77 if seed is None else seed
        return Verdict(
            self.reason is not None, self.reason, 0.0, 0.25, drawn, probes=1, timings_ms={"total": 1.0}
        )

    def close(self) -> None:
        self.closed += 1


class Graphs:
    """The bundle's graphs, counting their runs, with outputs that may be changed. The checker flags nothing:
    with random weights it would flag all.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.backend = open_backend("onnxruntime", bundle, threads=1)
        self.runs: dict[str, int] = {}
        self.changes: dict[str, Any] = {}

    def stage(self, graph: str) -> Any:
        real = self.backend.stage(graph)

        def run(inputs: Any, **named: Any) -> dict[str, np.ndarray]:
            self.runs[graph] = self.runs.get(graph, 0) + 1
            found = real.run(inputs, **named)
            if graph == "safety_checker":
                found["margins"][:], found["has_nsfw_concepts"][:] = -0.5, False
            return self.changes.get(graph, lambda found: found)(found)

        return SimpleNamespace(spec=real.spec, device=real.device, plan=real.plan, run=run, close=real.close)


@pytest.fixture(scope="module")
def made(tiny_bundle: Path) -> Iterator[tuple[Generator, Guard, Graphs]]:
    bundle = open_bundle(tiny_bundle)
    guard, graphs = Guard(), Graphs(bundle)
    with Generator(bundle, graphs, guard, owned=False) as generator:  # type: ignore[arg-type]
        yield generator, guard, graphs
    assert guard.closed == 0


@pytest.fixture
def guard(made: tuple[Generator, Guard, Graphs]) -> Guard:
    made[1].reason = None
    made[1].asked.clear()
    return made[1]


@pytest.fixture
def graphs(made: tuple[Generator, Guard, Graphs]) -> Graphs:
    made[2].runs.clear()
    made[2].changes.clear()
    return made[2]


@pytest.fixture
def generator(made: tuple[Generator, Guard, Graphs], guard: Guard, graphs: Graphs) -> Generator:
    return made[0]


def test_a_request_that_passes_is_drawn_and_checked(generator: Generator, graphs: Graphs) -> None:
    found = generator.generate("a blue circle", steps=3, seed=5)
    assert found.image is not None and found.image.shape == (64, 64, 3) and found.image.dtype == np.uint8
    assert np.ptp(found.image) > 20
    assert graphs.runs == {"text_encoder": 1, "unet": 3, "vae_decoder": 1, "safety_checker": 1}
    seen = found.image_verdict
    assert seen is not None and not seen.blocked and seen.probes == 1 and seen.seed == 5
    assert found.timings_ms.keys() == {"detect", "generate", "total"}
    assert found.timings_ms["total"] >= found.timings_ms["generate"] > 0


@pytest.mark.parametrize("reason", ["concept", "non_finite", "timeout", "error"])
def test_a_blocked_request_draws_nothing(
    generator: Generator, guard: Guard, graphs: Graphs, reason: str
) -> None:
    guard.reason = reason
    found = generator.generate("a star", steps=3)
    assert found.image is None and found.image_verdict is None and found.verdict.reason == reason
    assert graphs.runs == {}


def flagged(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found["margins"][0, -1] = 1e-6
    return found


def flag_alone(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found["has_nsfw_concepts"][:] = True
    return found


@pytest.mark.parametrize("change", [flagged, flag_alone])
def test_a_flagged_image_is_withheld(generator: Generator, graphs: Graphs, change: Any) -> None:
    graphs.changes = {"safety_checker": change}
    found = generator.generate("a blue circle", steps=2, seed=5)
    assert found.image is None and found.image_verdict.reason == "concept" and not found.verdict.blocked


@pytest.mark.parametrize(
    ("graph", "name", "value"),
    [
        ("text_encoder", "last_hidden_state", math.nan),
        ("text_encoder", "last_hidden_state", math.inf),
        ("unet", "out_sample", math.nan),
        ("unet", "out_sample", -math.inf),
        ("vae_decoder", "sample", math.nan),
        ("vae_decoder", "sample", math.inf),
        ("safety_checker", "margins", math.nan),
        ("safety_checker", "margins", -math.inf),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_finite_is_withheld(
    generator: Generator, graphs: Graphs, graph: str, name: str, value: float
) -> None:
    """Even where the parts behind it give finite values again: here the decoder always does."""

    def spoil(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found[name][-1].flat[0] = value
        return found

    finite = {"unet": np.nan_to_num, "vae_decoder": np.nan_to_num}
    graphs.changes = {
        at: (lambda found, f=f: {k: f(v) for k, v in found.items()}) for at, f in finite.items()
    }
    graphs.changes[graph] = spoil
    found = generator.generate("a blue circle", steps=2, seed=5)
    assert found.image is None and found.image_verdict.reason == "non_finite"


@pytest.mark.parametrize("graph", ["text_encoder", "unet", "vae_decoder", "safety_checker"])
def test_a_fault_while_drawing_is_withheld(generator: Generator, graphs: Graphs, graph: str) -> None:
    def fail(found: Any) -> Any:
        raise RuntimeError("broken")

    graphs.changes = {graph: fail}
    found = generator.generate("a blue circle", steps=2, seed=5)
    assert found.image is None and not found.verdict.blocked
    assert found.image_verdict.reason == "error" and found.image_verdict.detail == "RuntimeError: broken"
    graphs.changes = {}
    assert generator.generate("a blue circle", steps=2, seed=5).image is not None


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": -1}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"steps": 2.0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"steps": True}, "steps"),
        ({"solver": "heun"}, "solver"),
        ({"guidance_scale": -0.1}, "guidance_scale"),
        ({"guidance_scale": math.nan}, "guidance_scale"),
        ({"guidance_scale": math.inf}, "guidance_scale"),
        ({"guidance_scale": "x"}, "guidance_scale"),
        ({"guidance": "x"}, "guidance must be a SafeCFG, or None; got 'x'"),
        ({"seed": "1"}, "seed"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_before_anything_runs(
    generator: Generator, guard: Guard, graphs: Graphs, settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        generator.generate("a blue circle", **({"steps": 2} | settings))
    assert guard.asked == [] and graphs.runs == {}


def pixels(found: Generation) -> np.ndarray:
    assert found.image is not None
    return found.image.astype(int)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_same_seed_gives_the_same_pixels(
    generator: Generator, graphs: Graphs, solver: Any, steps: int
) -> None:
    one, two = (
        pixels(generator.generate("a circle", steps=steps, solver=solver, seed=2**64 - 1)) for _ in "ab"
    )
    assert np.array_equal(one, two) and graphs.runs["unet"] == 2 * steps
    assert not np.array_equal(one, pixels(generator.generate("a circle", steps=steps, solver=solver, seed=1)))
    assert not np.array_equal(
        one, pixels(generator.generate("a star", steps=steps, solver=solver, seed=2**64 - 1))
    )


def test_solver_steps_and_guidance_matter(generator: Generator) -> None:
    base = {"steps": 4, "solver": "ddim", "guidance_scale": 3.0}
    first = pixels(generator.generate("a circle", seed=1, **base))
    for change in ({"steps": 5}, {"solver": "dpmpp_2m"}, {"guidance_scale": 1.0}, {"guidance_scale": 0.0}):
        assert not np.array_equal(first, pixels(generator.generate("a circle", seed=1, **(base | change))))
    usual = pixels(generator.generate("a circle", seed=1, steps=4))
    assert np.array_equal(
        usual, pixels(generator.generate("a circle", seed=1, steps=4, solver="ddim", guidance_scale=7.5))
    )


def test_the_seed_of_an_image_is_not_the_seed_of_its_probes(generator: Generator, guard: Guard) -> None:
    found = generator.generate("a circle", steps=2, probe_seed=7)
    assert found.image_verdict is not None
    again = generator.generate("a circle", steps=2, seed=found.image_verdict.seed)
    assert guard.asked == [("a circle", 7), ("a circle", None)]
    assert np.array_equal(pixels(found), pixels(again))
    other = generator.generate("a circle", steps=2)
    assert not np.array_equal(pixels(found), pixels(other))


SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("steps", "scale"), [(5, 7.5), (3, 1.0), (4, 0.0)])
def test_pixels_are_those_of_diffusers(
    generator: Generator, tiny_model: Path, solver: Any, steps: int, scale: float
) -> None:
    """A plain trajectory in torch and diffusers, from the same noise."""
    prompt = "a red circle on the blue picture"
    ours = generator.generate(prompt, steps=steps, guidance_scale=scale, solver=solver, seed=21)
    theirs = drawn_by_diffusers(tiny_model, SCHEDULERS[solver], prompt, steps=steps, scale=scale, seed=21)
    assert np.abs(pixels(ours) - theirs).max() <= 2


@torch.inference_mode()
def drawn_by_diffusers(
    model: Path, kind: Any, prompt: str, *, steps: int, scale: float, seed: int
) -> np.ndarray:
    config = diffusers.DDIMScheduler.load_config(model / "scheduler")
    scheduler = kind.from_config(config)
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder", dtype=torch.float32)
    unet = diffusers.UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=torch.float32)
    vae = diffusers.AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.float32)
    tokens = CLIPTokenizer.from_pretrained(model / "tokenizer")(
        ["", prompt], padding="max_length", max_length=32, truncation=True, return_tensors="pt"
    )
    text = encoder(tokens["input_ids"])[0]
    scheduler.set_timesteps(steps)
    x = reference.philox_normals(seed, Stream.LATENT, 4 * 8 * 8, probe=0).reshape(1, 4, 8, 8)
    x = x * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        sample = scheduler.scale_model_input(torch.cat([x, x]), timestep)
        free, conditional = unet(sample, timestep, text, return_dict=False)[0].chunk(2)
        out = free + scale * (conditional - free) if scale > 1 else conditional  # as the pipelines do
        x = scheduler.step(out, timestep, x, return_dict=False)[0]
    picture = vae.decode(x / vae.config.scaling_factor, return_dict=False)[0][0]
    return ((picture / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).int().numpy()


def test_a_picture_with_anything_not_finite_is_nan_throughout() -> None:
    latents, decoded = np.zeros((4, 1, 2, 2), np.float32), np.full((4, 3, 2, 2), 3.0, np.float32)
    decoded[1, 0, 0, 0], decoded[2, 2, 1, 1], latents[3, 0, 1, 1] = math.inf, math.nan, -math.inf
    found = to_pictures(latents, decoded)
    assert (found[0] == 1).all() and np.isnan(found[1:]).all()


def test_an_own_detector_is_closed_with_the_generator_a_given_one_is_not(tiny_bundle: Path) -> None:
    generator = Generator.open(tiny_bundle, threads=1)
    own = generator.detector
    verdict = generator.generate("a red star", steps=2, probe_seed=1).verdict
    assert (
        verdict.blocked and verdict.margins == own.check("a red star", seed=1).margins
    )  # random weights flag all
    generator.close()
    with pytest.raises(SafelightError, match="the detector is closed"):
        own.check("a red star")
    with pytest.raises(SafelightError, match="closed; open another"):
        generator.generate("a red star", steps=2)
    with Detector.open(tiny_bundle, threads=1) as given:
        with Generator.open(tiny_bundle, detector=given) as generator:
            assert generator.detector is given
        assert given.check("a red star", seed=1).margins == verdict.margins


def test_a_detector_of_another_bundle_guards_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_bundle, tmp_path / "other")
    manifest = Manifest.load(other)
    replace(manifest, guidance_scale=2.0).write(other)
    with Detector.open(other, threads=1) as detector, pytest.raises(ValueError, match="open both on one"):
        Generator.open(tiny_bundle, detector=detector)


def test_a_closed_generator_draws_nothing(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    guard = Guard()
    generator = Generator(bundle, Graphs(bundle), guard, owned=False)
    generator.close()
    with pytest.raises(SafelightError, match="the generator is closed; open another"):
        generator.generate("a circle", steps=2)
    Generator(bundle, Graphs(bundle), guard, owned=True).close()
    assert guard.closed == 1
