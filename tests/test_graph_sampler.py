"""Steps on the device, on the processor: the same pictures as a sampler over the eager stages makes."""

import math
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from safelight.bench.bare_bundle import bare_bundle
from safelight.engine.backends import open_backend
from safelight.engine.bundle import Bundle
from safelight.engine.detect import Detector
from safelight.engine.generate import Generator
from safelight.engine.graphs.backend import GraphBackend
from safelight.engine.graphs.placed import Placement
from safelight.engine.graphs.runner import Processor
from safelight.engine.graphs.sampling import GraphSampler
from safelight.engine.guidance import SafeCFG
from safelight.engine.model_folder import ModelFolder
from safelight.engine.sampler import Sampler, Trajectory, open_sampler
from safelight.errors import ShapeError
from safelight.kernels.dispatch import use_backend
from safelight.probe import ProbeConfig

ONE, TWO = "one text encoder", "two text encoders"
one_model = pytest.mark.parametrize("any_model", [ONE], indirect=True)  # the law does not depend on it


Counting = runpy.run_path(str(Path(__file__).with_name("counting.py")))["Counting"]


@pytest.fixture(scope="module")
def bundle(any_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bare_bundle(any_model, tmp_path_factory.mktemp("bundles") / "bare")


@pytest.fixture(scope="module")
def runner() -> Counting:
    return Counting()


@pytest.fixture(scope="module")
def graphs(bundle: Bundle, any_model: Path, runner: Counting) -> GraphBackend:
    return GraphBackend(bundle, ModelFolder.open(any_model), Placement("float32"), runner)


@pytest.fixture(scope="module")
def pair(bundle: Bundle, any_model: Path, graphs: GraphBackend) -> tuple[Sampler, Sampler]:
    eager = open_backend("torch", bundle, model=any_model, threads=1)
    one, two = open_sampler(graphs, bundle.manifest), open_sampler(eager, bundle.manifest)
    assert isinstance(one, GraphSampler) and type(two) is Sampler
    return one, two


def drawn(bundle: Bundle, count: int, seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """Prompt embeddings, the empty prompt's, redirected ones and latents."""
    generator = np.random.default_rng(seed)
    hidden = bundle.manifest.graphs["text_encoder"].outputs[0]
    text = hidden.axes[1:]
    shapes = ((count, *text), (1, *text), (count, *text), (count, *bundle.manifest.picture.latents))
    found: Any = tuple(generator.standard_normal(shape).astype(np.float32) for shape in shapes)
    return found


@pytest.mark.parametrize(
    ("any_model", "solver"),
    [(ONE, "ddim"), (ONE, "euler"), (ONE, "dpmpp_2m"), (TWO, "dpmpp_2m")],
    indirect=["any_model"],
)
@pytest.mark.parametrize(("steps", "scale", "count"), [(1, 1.0, 1), (4, 5.0, 3), (3, 0.5, 5)])
def test_a_recorded_step_serves_every_trajectory(
    bundle: Bundle, pair: Any, solver: Any, steps: int, scale: float, count: int
) -> None:
    hidden, free, _, latents = drawn(bundle, count)
    one, two = (item.sample(hidden, free, latents, Trajectory(steps, scale, solver)) for item in pair)
    assert one.shape == two.shape and one.dtype == two.dtype
    np.testing.assert_allclose(one, two, atol=1e-4 * np.abs(two).max())


@one_model
@pytest.mark.parametrize("guidance", [SafeCFG(), SafeCFG(strength=0.5, threshold=10.0), SafeCFG(strength=0)])
def test_safe_guidance_is_the_hosts(bundle: Bundle, pair: Any, guidance: SafeCFG) -> None:
    hidden, free, redirected, latents = drawn(bundle, 3, seed=1)
    trajectory = Trajectory(4, 3.0, "dpmpp_2m")
    one, two = (item.sample_safely(hidden, free, redirected, latents, trajectory, guidance) for item in pair)
    np.testing.assert_allclose(one[0], two[0], atol=1e-4 * np.abs(two[0]).max())
    np.testing.assert_allclose(one[1], two[1], rtol=1e-4)
    assert one[1].shape == (3,) and one[1].dtype == np.float32


@one_model
def test_steps_are_launches_and_a_picture_is_waited_for_once(
    bundle: Bundle, pair: Any, runner: Counting
) -> None:
    hidden, free, _, latents = drawn(bundle, 2)
    for steps in (1, 7):
        pair[0].sample(hidden, free, latents, Trajectory(steps, 4.0, "ddim"))
        runner.replays = runner.waits = 0
        pair[0].sample(hidden, free, latents, Trajectory(steps, 4.0, "ddim"))
        assert (runner.replays, runner.waits) == (1 + steps + 1, 1)


@one_model
def test_a_short_trajectory_after_a_long_one_is_its_own(bundle: Bundle, pair: Any) -> None:
    hidden, free, _, latents = drawn(bundle, 2)
    short = Trajectory(2, 4.0, "dpmpp_2m")
    first = pair[0].sample(hidden, free, latents, short)
    pair[0].sample(hidden[:1] * 3, free, latents[:1], Trajectory(9, 2.0, "euler"))
    pair[0].sample(hidden * 3, free, latents * 2, Trajectory(9, 2.0, "euler"))
    assert np.array_equal(first, pair[0].sample(hidden, free, latents, short))


@one_model
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("where", ["hidden", "free"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_prompt_that_is_not_finite_makes_no_picture(
    bundle: Bundle, pair: Any, where: str, value: float
) -> None:
    hidden, free, _, latents = drawn(bundle, 3)
    free = np.repeat(free, 3, 0)
    (hidden if where == "hidden" else free)[1, -1, -1] = value
    for scale in (4.0, 1.0):
        made = [item.sample(hidden, free, latents, Trajectory(2, scale, "ddim")) for item in pair]
        lost = where == "hidden" or scale > 1
        for one in made:
            assert np.isnan(one[1]).all() == lost and np.isfinite(one[[0, 2]]).all()


@one_model
def test_time_and_shapes_are_kept_to(bundle: Bundle, pair: Any) -> None:
    hidden, free, _, latents = drawn(bundle, 2)
    with pytest.raises(TimeoutError):
        pair[0].sample(hidden, free, latents, Trajectory(2, 4.0, "ddim"), deadline=0.0)
    with pytest.raises(ShapeError, match="a negative branch must be"):
        pair[0].sample(hidden, free[:, :-1], latents, Trajectory(2, 4.0, "ddim"))


@pytest.mark.parametrize(
    ("any_model", "guidance"),
    [(ONE, None), (ONE, SafeCFG()), (ONE, SafeCFG(dynamic=False)), (TWO, None), (TWO, SafeCFG())],
    indirect=["any_model"],
)
def test_the_generator_draws_what_the_eager_one_draws(
    bundle: Bundle, any_model: Path, graphs: GraphBackend, guidance: SafeCFG | None
) -> None:
    eager = open_backend("torch", bundle, model=any_model, threads=1)
    probe = ProbeConfig(count=1, threshold=1.0)
    made = []
    for backend in (graphs, eager):
        guard = Detector(bundle, backend, probe)
        guard._model.look = passing(guard._model.look)  # type: ignore[method-assign]
        with Generator(bundle, backend, guard, owned=True) as generator:
            generator._checker.look = passing(generator._checker.look)  # type: ignore[method-assign]
            asked: Any = {"steps": 3, "guidance_scale": 5.0, "guidance": guidance}
            made.append(generator.generate("a red circle", seed=4, probe_seed=4, **asked))
    one, two = made
    assert one.image is not None and two.image is not None and one.image.shape == two.image.shape
    assert np.abs(one.image.astype(int) - two.image.astype(int)).max() <= 1
    assert (
        (one.harmfulness is None) == (two.harmfulness is None) == (guidance is None or not guidance.dynamic)
    )
    assert one.harmfulness is None or one.harmfulness == pytest.approx(two.harmfulness, rel=1e-4)
    assert one.image_verdict is not None and "graph" in one.image_verdict.backend


def passing(look: Any) -> Any:
    """The same looks with margins below 0, so that random weights let pictures pass."""

    def changed(*args: Any, **named: Any) -> Any:
        looks = look(*args, **named)
        looks.margins[:] = -1.0
        looks.flagged[:] = False
        return looks

    return changed


@one_model
def test_a_fault_on_the_device_shows_no_picture(bundle: Bundle, any_model: Path) -> None:
    runner = Counting()
    backend = GraphBackend(bundle, ModelFolder.open(any_model), Placement("float32"), runner)
    guard = Detector(bundle, backend, ProbeConfig(count=1, threshold=1.0))
    guard._model.look = passing(guard._model.look)  # type: ignore[method-assign]
    with Generator(bundle, backend, guard, owned=True) as generator:
        real = generator._sampler.sample

        def fail(*args: Any, **named: Any) -> Any:
            runner.fault = RuntimeError("CUDA error: unspecified launch failure")
            return real(*args, **named)

        generator._sampler.sample = fail  # type: ignore[method-assign]
        made = generator.generate("a red circle", steps=2, seed=1)
    assert made.image is None and made.image_verdict is not None and made.image_verdict.reason == "error"
    assert "unspecified launch failure" in (made.image_verdict.detail or "")


@one_model
def test_two_bytes_keep_their_state_in_four(bundle: Bundle, any_model: Path, pair: Any) -> None:
    """State between steps is float32: the error after many steps is near that of one."""
    folder, runner = ModelFolder.open(any_model), Processor()
    sampler = GraphBackend(bundle, folder, Placement("bfloat16"), runner).sampler()
    hidden, free, _, latents = drawn(bundle, 2)
    for steps in (1, 8):
        trajectory = Trajectory(steps, 1.0, "ddim")
        one, two = (item.sample(hidden, free, latents, trajectory) for item in (sampler, pair[1]))
        assert np.abs(one - two).max() <= 0.05 * np.abs(two).max()
    program: Any = next(iter(sampler._plans._kept.values()))[0]  # type: ignore[attr-defined]
    assert {program.made[name].dtype for name in ("x", "x0", "distance")} == {torch.float32}
    assert program.made["model_in"].dtype is torch.bfloat16


@one_model
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU compiles the kernels; tests marked gpu run them")
@pytest.mark.parametrize("safe", [False, True])
def test_a_compiled_step_takes_what_it_is_given(
    bundle: Bundle, any_model: Path, pair: Any, safe: bool
) -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which this machine has not")
    hidden, free, redirected, latents = drawn(bundle, 2)
    trajectory, found = Trajectory(3, 4.0, "dpmpp_2m"), []
    for name in ("triton", "reference"):
        with use_backend(name):
            if safe:
                found += [pair[0].sample_safely(hidden, free, redirected, latents, trajectory, SafeCFG())[0]]
            else:
                found += [pair[0].sample(hidden, free, latents, trajectory)]
    np.testing.assert_allclose(found[0], found[1], atol=1e-4 * np.abs(found[1]).max())
