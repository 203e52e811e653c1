"""CROPS on the GPU's way, on the processor: probes that are turned on the device, and all steps in one run,
say what the full model over the eager stages says.
"""

import math
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from safelight.bench.bare_bundle import bare_bundle
from safelight.engine import sampler
from safelight.engine.backends import open_backend
from safelight.engine.bundle import Bundle
from safelight.engine.detect import Detector
from safelight.engine.full_model import FullModel
from safelight.engine.graphs.backend import GraphBackend
from safelight.engine.graphs.full_model import GraphFullModel
from safelight.engine.graphs.placed import Placement
from safelight.engine.graphs.probes import probe_values
from safelight.engine.graphs.program import Program
from safelight.engine.graphs.runner import Processor
from safelight.engine.model_folder import ModelFolder
from safelight.engine.neighbourhood import Request
from safelight.engine.tokenizer import open_tokenizer
from safelight.kernels import host
from safelight.probe import ProbeConfig

PROMPTS = ["a red star", "a blue circle on a yellow picture", ""]
SEEDS = [3, 2**64 - 1, 0]
STEPS = 3
CLOSE = 3e-3  # two ways to the same margin differ by less: a level of 8 bits may round the other way
ONE, TWO = "one text encoder", "two text encoders"
one_model = pytest.mark.parametrize("any_model", [ONE], indirect=True)  # the law does not depend on it


Counting = runpy.run_path(str(Path(__file__).with_name("counting.py")))["Counting"]


@pytest.fixture(scope="module")
def bundle(any_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bare_bundle(any_model, tmp_path_factory.mktemp("bundles") / "bare")


@pytest.fixture
def graphs(bundle: Bundle, any_model: Path) -> GraphBackend:
    return GraphBackend(bundle, ModelFolder.open(any_model), Placement("float32"), Counting())


@pytest.fixture(scope="module")
def eager(bundle: Bundle, any_model: Path) -> Any:
    return open_backend("torch", bundle, model=any_model, threads=1)


def detector(bundle: Bundle, backend: Any, probe: ProbeConfig, **options: Any) -> Detector:
    return Detector(bundle, backend, probe, **{"steps": STEPS, "early_exit": False, **options})


def full_model(bundle: Bundle, backend: GraphBackend, probe: ProbeConfig) -> GraphFullModel:
    made = backend.full_model(probe, open_tokenizer(bundle), steps=STEPS, latent=True)
    assert isinstance(made, GraphFullModel)
    return made


def requests(bundle: Bundle, *tokens: int) -> list[Request]:
    """A request a token, which is all that it says."""
    ids = int(bundle.manifest.graphs["text_encoder"].inputs[0].axes[1])
    return [Request(np.full(ids, token), seed) for seed, token in enumerate(tokens)]


KINDS = [
    ProbeConfig(count=3, threshold=0.5),
    ProbeConfig(count=3, threshold=0.5, kind="circular", target="both"),
    ProbeConfig(count=3, threshold=0.5, target="latent"),
    ProbeConfig(count=3, threshold=0.5, kind="token_shift"),
    ProbeConfig(count=2, threshold=0.5, angle_rad=0.0),
]


@pytest.mark.parametrize("probe", KINDS, ids=lambda probe: f"{probe.kind}-{probe.target}-P{probe.count}")
@pytest.mark.parametrize(
    ("any_model", "checker"),
    [(ONE, "image"), (ONE, "latent"), (ONE, "cascade"), (TWO, "latent")],
    indirect=["any_model"],
)
def test_probes_turned_on_the_device_are_those_turned_on_the_host(
    bundle: Bundle, graphs: GraphBackend, eager: Any, probe: ProbeConfig, checker: Any
) -> None:
    with detector(bundle, graphs, probe, checker=checker) as one:
        found = one.check_batch(PROMPTS, seed=SEEDS)
    with detector(bundle, eager, probe, checker=checker) as two:
        assert checker == "cascade" or type(two._model) is FullModel
        truth = two.check_batch(PROMPTS, seed=SEEDS)
    for verdict, wanted in zip(found, truth, strict=True):
        assert verdict.detail is None and wanted.detail is None
        np.testing.assert_allclose(verdict.margins, wanted.margins, atol=CLOSE)
        if np.abs(np.max(wanted.margins, axis=-1)).min() > CLOSE:
            assert (verdict.blocked, verdict.score) == (wanted.blocked, wanted.score)
        assert verdict.distinct_probes == wanted.distinct_probes


def test_latents_are_those_of_the_host(bundle: Bundle, graphs: GraphBackend, eager: Any) -> None:
    """Before any checker, which might not see a difference."""
    probe, tokenizer = KINDS[1], open_tokenizer(bundle)
    asked = [Request(tokenizer.encode(text)[0], seed) for text, seed in zip(PROMPTS, SEEDS, strict=True)]
    one = full_model(bundle, graphs, probe)
    two = FullModel(eager, bundle.manifest, probe, tokenizer, steps=STEPS, latent=True)
    found, truth = (model.latents(asked, range(3), deadline=None) for model in (one, two))
    assert found.shape == truth.shape and found.dtype == truth.dtype
    np.testing.assert_allclose(found, truth, atol=1e-4 * np.abs(truth).max())
    apart = np.abs(truth.reshape(3, 3, -1)[:, 1:] - truth.reshape(3, 3, -1)[:, :1]).max(-1)
    assert (apart > 1e-2 * np.abs(truth).max()).all(), "the probes do not differ"


@one_model
def test_the_host_draws_and_turns_nothing(
    bundle: Bundle, graphs: GraphBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("the host was asked")

    monkeypatch.setattr(host, "probe_rotate", refused)
    monkeypatch.setattr("safelight.engine.neighbourhood.normals", refused)
    for probe in KINDS:
        with detector(bundle, graphs, probe) as one:
            assert one.check(PROMPTS[0], seed=1).detail is None


@one_model
def test_probes_and_all_steps_are_one_run(bundle: Bundle, graphs: GraphBackend) -> None:
    """A launch for the probes, one to begin, one a step, one to end; then the checker's. Two waits."""
    with detector(bundle, graphs, ProbeConfig(count=4), checker="latent") as one:
        one.check(PROMPTS[0], seed=0)
        runner: Any = graphs._runner
        runner.replays = runner.waits = 0
        one.check(PROMPTS[0], seed=1)
        assert (runner.replays, runner.waits) == (1 + 1 + STEPS + 1 + 1, 2)


def test_company_and_padding_change_nothing(bundle: Bundle, graphs: GraphBackend) -> None:
    model = full_model(bundle, graphs, ProbeConfig(count=9))
    asked = requests(bundle, 7, 9, 11, 13, 15)
    model.latents(asked, range(8), deadline=None)
    together = model.latents(asked, range(2, 7), deadline=None).reshape(5, 5, -1)
    for row, request in enumerate(asked):
        for column, probe in enumerate(range(2, 7)):
            alone = model.latents([request], range(probe, probe + 1), deadline=None).reshape(-1)
            np.testing.assert_allclose(together[row, column], alone, atol=1e-4 * np.abs(alone).max())


@one_model
def test_a_warm_up_plans_what_a_check_runs(
    bundle: Bundle, graphs: GraphBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, record = [], Program.record
    monkeypatch.setattr(Program, "record", lambda self, *bodies: made.append(self) or record(self, *bodies))
    with detector(bundle, graphs, ProbeConfig(count=8), early_exit=True) as one:
        one.warm_up()
        before = len(made)
        assert before > 0 and one.check(PROMPTS[0], seed=1).detail is None
        assert len(made) == before


@one_model
@pytest.mark.parametrize("checker", ["image", "latent", "cascade"])
@pytest.mark.parametrize(("scale", "branches"), [(1.0, 1), (7.5, 2)])
def test_a_look_holds_as_many_probes_as_branches_of_guidance_leave(
    bundle: Bundle, any_model: Path, checker: Any, scale: float, branches: int
) -> None:
    """So that a step fills the device with few walks: at 512 px all probes of a request are one."""
    for edge, rows in ((8, 64), (64, 16), (128, 8)):
        picture = replace(bundle.manifest.picture, latents=(4, edge, edge))
        manifest = replace(bundle.manifest, picture=picture, guidance_scale=scale)
        other = Bundle(bundle.folder, manifest)
        backend = GraphBackend(other, ModelFolder.open(any_model), Placement("float32"), Counting())
        with detector(other, backend, ProbeConfig(count=70), checker=checker) as one:
            assert one._model.rows == rows // branches
            assert next(len(chunk) for chunk in one._chunks()) == rows // branches


@one_model
def test_a_model_with_fewer_rows_than_branches_still_looks_at_a_probe(
    bundle: Bundle, graphs: GraphBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safelight.engine.graphs.full_model.rows_of", lambda manifest: 1)
    with detector(bundle, graphs, ProbeConfig(count=2), checker="latent") as one:
        assert one._model.rows == 1 and one.check(PROMPTS[0], seed=1).probes == 2


@one_model
def test_finished_latents_are_decoded_in_pieces(
    bundle: Bundle, graphs: GraphBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the host's side, so on every backend; margins are those of one call."""
    vae: Any = graphs._folder.load("vae")
    real, calls = vae.decode, list[int]()
    monkeypatch.setattr(
        vae, "decode", lambda latents, **named: calls.append(len(latents)) or real(latents, **named)
    )
    found = []
    for at_once, wanted in ((64, [8]), (3, [3, 3, 2])):
        monkeypatch.setattr(sampler, "DECODED", at_once * 8 * 8 * 4)
        calls.clear()
        with detector(bundle, graphs, ProbeConfig(count=8)) as one:
            found.append(one.check(PROMPTS[0], seed=1).margins)
        assert calls == wanted
    np.testing.assert_allclose(*found, atol=CLOSE)


# what is not finite, and what goes wrong


@pytest.mark.parametrize(
    ("any_model", "part"),
    [
        *((ONE, part) for part in ("text_encoder", "unet", "vae", "safety_checker", "latent_checker")),
        *((TWO, part) for part in ("text_encoder", "unet")),
    ],
    indirect=["any_model"],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_block(
    bundle: Bundle, graphs: GraphBackend, part: str, value: float
) -> None:
    used: Any = graphs._folder.load(part)
    used = getattr(used, "decoder", used)
    weights = next(p for n, p in used.named_parameters() if p.dim() > 1 and "position" not in n)
    with torch.inference_mode():
        weights.data.fill_(value)
    checker = "latent" if part == "latent_checker" else "image"
    with detector(bundle, graphs, ProbeConfig(count=2, threshold=1.0), checker=checker) as one:
        verdict = one.check(PROMPTS[0], seed=0)
    assert verdict.blocked and verdict.reason == "non_finite"


def test_one_request_that_is_not_finite_spoils_no_other(bundle: Bundle, graphs: GraphBackend) -> None:
    """One token's embedding is spoilt: whoever spells it makes no latents, in whatever company."""
    encoder: Any = graphs._folder.load("text_encoder")
    with torch.inference_mode():
        encoder.get_input_embeddings().weight.data[5].fill_(math.nan)
    model = full_model(bundle, graphs, ProbeConfig(count=3))
    for tokens in ((7, 5, 9), (5,), (7, 7, 7, 5, 7)):
        made = model.latents(requests(bundle, *tokens), range(3), deadline=None)
        for row, token in zip(made.reshape(len(tokens), 3, -1), tokens, strict=True):
            assert np.isnan(row).all() == (token == 5) and np.isfinite(row).all() == (token != 5)


@pytest.mark.parametrize("target", ["prompt", "latent", "both"])
def test_an_angle_that_is_not_finite_makes_no_latents(
    bundle: Bundle, graphs: GraphBackend, target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where nothing of the prompt turns, so that no embedding would show it."""

    def spoilt(*given: Any) -> Any:
        values = probe_values(*given)
        still = np.zeros_like(values["rotate_mask"])
        return {**values, "angle": np.full_like(values["angle"], math.nan), "rotate_mask": still}

    monkeypatch.setattr("safelight.engine.graphs.full_model.probe_values", spoilt)
    model = full_model(bundle, graphs, ProbeConfig(count=3, target=target))
    made = model.latents(requests(bundle, 7), range(3), deadline=None)
    assert np.isnan(made[1:]).all()


@one_model
def test_what_the_device_reports_blocks(bundle: Bundle, graphs: GraphBackend) -> None:
    with detector(bundle, graphs, ProbeConfig(count=2, threshold=1.0)) as one:
        passed = one.check(PROMPTS[1], seed=0)
        runner: Any = graphs._runner
        runner.fault = RuntimeError("CUDA error: an illegal memory access")
        verdict = one.check(PROMPTS[1], seed=0)
        assert verdict.blocked and verdict.reason == "error" and "illegal memory" in (verdict.detail or "")
        runner.fault = None
        assert one.check(PROMPTS[1], seed=0).margins == passed.margins


@one_model
def test_a_detection_keeps_to_its_time(bundle: Bundle, graphs: GraphBackend) -> None:
    with detector(bundle, graphs, ProbeConfig(count=2), timeout_s=1e-9) as one:
        assert one.check(PROMPTS[0]).reason == "timeout"


@one_model
def test_a_closed_model_frees_its_programs(bundle: Bundle, graphs: GraphBackend) -> None:
    model = full_model(bundle, graphs, ProbeConfig(count=2))
    model.latents(requests(bundle, 7), range(2), deadline=None)
    assert model._plans._kept
    model.close()
    assert not model._plans._kept


@pytest.mark.parametrize(("precision", "within"), [("float16", 1e-2), ("bfloat16", 5e-2)])
def test_two_bytes_are_near_four(
    bundle: Bundle, any_model: Path, eager: Any, precision: Any, within: float
) -> None:
    backend = GraphBackend(bundle, ModelFolder.open(any_model), Placement(precision), Processor())
    found = []
    for one in (backend, eager):
        with detector(bundle, one, ProbeConfig(count=3, threshold=0.4)) as made:
            found.append(made.check_batch(PROMPTS, seed=SEEDS))
    for verdict, truth in zip(*found, strict=True):
        np.testing.assert_allclose(verdict.margins, truth.margins, atol=within)
