"""SafeCFG: the branch and its distance, the family of closed forms, and what the generator makes of them.

Redirectors of known answers stand in for a trained one: where the answer is the empty prompt's, nothing may
change.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import safelight
from safelight.cli import main
from safelight.engine.backends import Backend, open_backend
from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.generate import Generation, Generator
from safelight.engine.guidance import Redirection, SafeCFG
from safelight.engine.sampler import Sampler, Trajectory
from safelight.errors import ShapeError
from safelight.kernels import host, reference
from safelight.verdict import Verdict

STEPS = 3


# the arithmetic


def branches(requests: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(requests)
    free = torch.randn(requests, *shape, generator=generator)
    return free, free + torch.randn(requests, *shape, generator=generator) * torch.logspace(
        -4, 1, requests
    ).view(-1, *(1,) * len(shape))


def each(requests: int, value: float) -> torch.Tensor:
    return torch.full((requests,), value)


@pytest.mark.parametrize("requests, shape", [(1, (4, 8, 8)), (5, (3, 7)), (9, (1,))])
def test_the_twin_of_the_branch_agrees(requests: int, shape: tuple[int, ...], tol: dict) -> None:
    free, redirected = branches(requests, *shape)
    strength, threshold = torch.linspace(0, 2, requests), torch.linspace(0.05, 3, requests)
    found = host.safe_branch(
        free.numpy(), redirected.numpy(), strength=strength.numpy(), threshold=threshold.numpy()
    )
    truth = reference.safe_branch(free, redirected, strength=strength, threshold=threshold)
    for value, expected in zip(found, truth, strict=True):
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, expected.numpy(), **tol[np.float32])


def test_the_strength_grows_with_the_distance_and_stays_in_its_bounds() -> None:
    free, redirected = branches(40, 4, 4)
    branch, distance = reference.safe_branch(
        free, redirected, strength=each(40, 1.5), threshold=each(40, 0.2)
    )
    apart = redirected - free
    torch.testing.assert_close(distance, apart.flatten(1).norm(dim=1) / 4)
    weight = (branch - free).flatten(1).norm(dim=1) / apart.flatten(1).norm(dim=1)
    torch.testing.assert_close(weight, 1.5 * (distance / 0.2).clamp(max=1), rtol=1e-3, atol=1e-4)
    assert (distance < 0.2).any() and (distance > 0.2).any()
    same, none = reference.safe_branch(free, free, strength=each(40, 1.5), threshold=each(40, 0.2))
    assert torch.equal(same, free) and torch.equal(none, each(40, 0.0))


def test_a_distance_that_is_not_finite_takes_the_full_strength() -> None:
    free = torch.zeros(3, 8)
    redirected = torch.full((3, 8), 0.01)
    redirected[0], redirected[1, 3] = 1e30, math.nan  # its square exceeds float32
    for branch, distance in (
        reference.safe_branch(free, redirected, strength=each(3, 1.0), threshold=each(3, 0.1)),
        map(
            torch.from_numpy,
            host.safe_branch(
                free.numpy(), redirected.numpy(), strength=np.ones(3), threshold=np.full(3, 0.1)
            ),
        ),
    ):
        assert torch.equal(branch[0], redirected[0]) and math.isinf(distance[0])
        assert torch.isnan(branch[1, 3]) and math.isnan(distance[1])
        torch.testing.assert_close(branch[2], torch.full((8,), 0.001))


@pytest.mark.parametrize("eta", [0.5, 6.5])
@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0, 3.0])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_a_redirected_branch_on_the_line_of_guidance_has_a_closed_form(
    eta: float, lam: float, strength: float
) -> None:
    """Methods 6.3, with k lam in place of lam: e~ = e0 + (1 + eta (1 - k lam)) (ec - e0)."""
    generator = torch.Generator().manual_seed(1)
    free, conditional, x = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(3))
    redirected = free + lam * (conditional - free)
    tiny = each(2, 1e-6)  # below any distance here, so that the strength is full
    branch, _ = reference.safe_branch(free, redirected, strength=each(2, strength), threshold=tiny)
    expected = free + (1 + eta * (1 - strength * lam)) * (conditional - free)
    torch.testing.assert_close(
        reference.safe_guide(branch, conditional, each(2, eta)), expected, rtol=1e-4, atol=1e-4
    )
    row = torch.tensor([1.0, 0.5, 0.3, 0.2, 0.7, 0.1])
    found = reference.guidance_step(x, branch, conditional, x, scale=each(2, 1 + eta), coefficients=row)
    for value, truth in zip(found, reference.scheduler_step(x, expected, x, row), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-4)


def test_one_and_one_over_eta_is_exactly_unconditional() -> None:
    generator = torch.Generator().manual_seed(2)
    free, conditional = (torch.randn(3, 16, generator=generator) for _ in range(2))
    redirected = free + (1 + 1 / 6.5) * (conditional - free)
    found = reference.safe_guide(redirected, conditional, each(3, 6.5))
    torch.testing.assert_close(found, free, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"strength": -0.1}, "strength must be finite and at least 0; got -0.1"),
        ({"strength": math.nan}, "strength"),
        ({"strength": math.inf}, "strength"),
        ({"strength": "x"}, "strength must be finite and at least 0; got 'x'"),
        ({"strength": True}, "strength"),
        ({"threshold": "x"}, "threshold must be finite and above 0; got 'x'"),
        ({"dynamic": "no"}, "dynamic must be True or False; got 'no'"),
        ({"threshold": 0.0}, "threshold must be finite and above 0; got 0.0"),
        ({"threshold": math.nan}, "threshold"),
        ({"dynamic": False, "threshold": 0.2}, "threshold belongs to dynamic strength"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SafeCFG(**settings)


def test_a_static_strength_moves_the_negative_prompt_on_a_line() -> None:
    free, redirected = (value.numpy() for value in branches(1, 5, 4))
    assert np.array_equal(SafeCFG(0.0, dynamic=False).negative(free, redirected), free)
    assert np.array_equal(SafeCFG(1.0, dynamic=False).negative(free, redirected), redirected)
    half = SafeCFG(0.5, dynamic=False).negative(free, redirected)
    np.testing.assert_allclose(half, (free + redirected) / 2, rtol=1e-5, atol=1e-6)


# the sampler


@pytest.fixture(scope="module")
def bundle(guarded_bundle: Path) -> Bundle:
    return open_bundle(guarded_bundle)


@pytest.fixture(scope="module")
def backend(bundle: Bundle) -> Backend:
    return open_backend("onnxruntime", bundle, threads=1)


def drawn(sampler: Sampler, count: int) -> tuple[np.ndarray, ...]:
    """Prompts, the empty prompt and noise, all random: (N, L, D), (1, L, D), (N, c, h, w)."""
    rng = np.random.default_rng(3)
    tokens, latents = sampler.text, (4, 8, 8)
    return tuple(
        rng.standard_normal(shape, dtype=np.float32)
        for shape in ((count, *tokens), (1, *tokens), (count, *latents))
    )


def test_each_request_of_a_batch_has_its_own_negative_branch(bundle: Bundle, backend: Backend) -> None:
    sampler, redirection = Sampler(backend, bundle.manifest), Redirection(backend.stage("redirector"))
    hidden, free, latents = drawn(sampler, 3)
    plan = Trajectory(STEPS, 7.5, "ddim")
    negative = redirection.redirect(hidden)
    together = sampler.sample(hidden, negative, latents, plan)
    plain = sampler.sample(hidden, free, latents, plan)
    safe, harm = sampler.sample_safely(hidden, free, negative, latents, plan, SafeCFG(1.0))
    assert harm.shape == (3,) and (harm > 0).all()
    for row in range(3):
        one = slice(row, row + 1)
        alone = sampler.sample(hidden[one], redirection.redirect(hidden[one]), latents[one], plan)
        np.testing.assert_allclose(together[one], alone, rtol=1e-3, atol=1e-3)
        assert np.abs(alone - plain[one]).max() > 0.1
        part, its = sampler.sample_safely(hidden[one], free, negative[one], latents[one], plan, SafeCFG(1.0))
        np.testing.assert_allclose(safe[one], part, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(harm[one], its, rtol=1e-3)
    unguided = Trajectory(STEPS, 1.0, "ddim")
    assert np.array_equal(
        sampler.sample(hidden, negative, latents, unguided), sampler.sample(hidden, free, latents, unguided)
    )
    with pytest.raises(ValueError, match="needs a guidance_scale above 1; got 1"):
        sampler.sample_safely(hidden, free, negative, latents, unguided, SafeCFG(1.0, dynamic=False))
    with pytest.raises(ShapeError, match="a negative branch must be"):
        sampler.sample(hidden, negative[:2], latents, plan)


def test_what_is_not_finite_in_a_branch_spoils_its_request_alone(bundle: Bundle, backend: Backend) -> None:
    sampler = Sampler(backend, bundle.manifest)
    hidden, free, latents = drawn(sampler, 2)
    negative = hidden[::-1].copy()
    negative[1, 3, 5] = math.inf
    plan = Trajectory(STEPS, 7.5, "ddim")
    made, _ = sampler.sample_safely(hidden, free, negative, latents, plan, SafeCFG(1.0))
    for found in (sampler.sample(hidden, negative, latents, plan), made):
        assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()


# the generator


class Guard:
    """A detector that lets everything pass."""

    asked = 0

    def check(self, prompt: str, *, seed: int | None = None) -> Verdict:
        self.asked += 1
        return Verdict(False, None, 0.0, 0.25, seed or 0, probes=1, timings_ms={"total": 1.0})


class Graphs:
    """The bundle's graphs; the redirector's answer can be changed, and the checker flags nothing."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.answer: Callable[[np.ndarray], np.ndarray] = lambda redirected: redirected
        self.rows: dict[str, list[int]] = {}

    def stage(self, graph: str) -> Any:
        real = self.backend.stage(graph)

        def run(inputs: Any, **named: Any) -> dict[str, np.ndarray]:
            found = real.run(inputs, **named)
            self.rows.setdefault(graph, []).append(len(next(iter(found.values()))))
            if graph == "safety_checker":
                found["margins"][:], found["has_nsfw_concepts"][:] = -0.5, False
            if graph == "redirector":
                found["redirected"] = self.answer(found["redirected"])
            return found

        return SimpleNamespace(spec=real.spec, device=real.device, plan=real.plan, run=run, close=real.close)


@pytest.fixture(scope="module")
def made(bundle: Bundle, backend: Backend) -> Iterator[tuple[Generator, Graphs]]:
    graphs = Graphs(backend)
    with Generator(bundle, graphs, Guard(), owned=False) as generator:  # type: ignore[arg-type]
        yield generator, graphs


@pytest.fixture
def graphs(made: tuple[Generator, Graphs]) -> Graphs:
    made[1].answer = lambda redirected: redirected
    made[1].rows = {}
    return made[1]


@pytest.fixture
def generate(made: tuple[Generator, Graphs], graphs: Graphs) -> Callable[..., Generation]:
    return lambda guidance=None, **named: made[0].generate(
        "a red star", **({"steps": STEPS, "seed": 5} | named), guidance=guidance
    )


def pixels(found: Generation) -> np.ndarray:
    assert found.image is not None, found.image_verdict
    return found.image.astype(int)


def test_a_redirector_that_answers_the_empty_prompt_changes_nothing(
    made: tuple[Generator, Graphs], generate: Any, graphs: Graphs
) -> None:
    plain = pixels(generate())
    graphs.answer = lambda redirected: made[0]._free.copy()
    assert np.array_equal(pixels(generate(SafeCFG(1.0, dynamic=False))), plain)
    found = generate(SafeCFG(1.0))
    assert np.abs(pixels(found) - plain).max() <= 1
    assert found.harmfulness == pytest.approx(0.0, abs=1e-4)


def test_strength_0_is_plain_guidance_and_more_is_not(generate: Any) -> None:
    plain = pixels(generate())
    assert np.array_equal(pixels(generate(SafeCFG(0.0, dynamic=False))), plain)
    assert np.abs(pixels(generate(SafeCFG(0.0))) - plain).max() <= 1
    for guidance in (SafeCFG(1.0, dynamic=False), SafeCFG(0.5, dynamic=False), SafeCFG(1.0)):
        assert np.abs(pixels(generate(guidance)) - plain).max() > 5
    # far below every distance the strength is full, and the branch is the redirector's own
    full = pixels(generate(SafeCFG(1.0, threshold=1e-6)))
    assert np.abs(full - pixels(generate(SafeCFG(1.0, dynamic=False)))).max() <= 1


def test_the_redirector_is_asked_once_and_costs_no_branch(generate: Any, graphs: Graphs) -> None:
    assert generate().harmfulness is None and graphs.rows["unet"] == [2] * STEPS
    assert "redirector" not in graphs.rows
    graphs.rows = {}
    assert generate(SafeCFG(1.0, dynamic=False)).harmfulness is None
    assert graphs.rows["redirector"] == [1] and graphs.rows["unet"] == [2] * STEPS
    graphs.rows = {}
    assert generate(SafeCFG(1.0)).harmfulness > 0
    assert graphs.rows["redirector"] == [1] and graphs.rows["unet"] == [3] * STEPS


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_redirector_that_is_not_finite_blocks(generate: Any, graphs: Graphs, dynamic: bool) -> None:
    graphs.answer = lambda redirected: np.full_like(redirected, math.nan)
    found = generate(SafeCFG(1.0, dynamic=dynamic))
    assert found.image is None and found.image_verdict.reason == "non_finite"

    def fail(redirected: np.ndarray) -> np.ndarray:
        raise RuntimeError("broken")

    graphs.answer = fail
    found = generate(SafeCFG(1.0, dynamic=dynamic))
    assert found.image is None and found.image_verdict.reason == "error"


def test_guidance_that_cannot_be_redirected_is_refused_before_anything_runs(
    made: tuple[Generator, Graphs], generate: Any, graphs: Graphs, tiny_bundle: Path
) -> None:
    made[0].detector.asked = 0
    for scale in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"none at a guidance_scale of 1 or below; got {scale}"):
            generate(SafeCFG(1.0, dynamic=False), guidance_scale=scale)
    with pytest.raises(ValueError, match="guidance must be a SafeCFG, or None; got 'x'"):
        generate("x")
    assert made[0].detector.asked == 0 and graphs.rows == {}
    tiny = open_bundle(tiny_bundle)
    without = Generator(tiny, open_backend("onnxruntime", tiny, threads=1), Guard(), owned=False)  # type: ignore[arg-type]
    with without, pytest.raises(ValueError, match=r"holds no redirector.*; export a model folder"):
        without.generate("a red star", steps=STEPS, guidance=SafeCFG(1.0, dynamic=False))


def test_the_public_name_is_the_class() -> None:
    assert safelight.SafeCFG is SafeCFG and "SafeCFG" in safelight.__all__


# the command line


def test_the_command_line_redirects(guarded_bundle: Path, tmp_path: Path) -> None:
    words = ["generate", "a red star", "--bundle", str(guarded_bundle), "--threads", "1", "--seed", "1"]
    words += ["--image-steps", "2", "-o", str(tmp_path / "one.png"), "--json"]
    found = CliRunner().invoke(
        main, [*words, "--safe-cfg", "--safe-cfg-static", "--safe-cfg-strength", "0.5"]
    )
    assert found.exit_code == 0 and json.loads(found.stdout)["prompt"] == "a red star"
    refused = CliRunner().invoke(main, [*words, "--safe-cfg-strength", "0.5"])
    assert refused.exit_code == 2 and "need --safe-cfg" in refused.stderr
    refused = CliRunner().invoke(main, [*words, "--safe-cfg", "--guidance-scale", "1"])
    assert refused.exit_code == 2 and "SafeCFG redirects guidance" in refused.stderr
