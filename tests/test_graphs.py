"""The GPU's way through the networks, on the processor: everything but the capture itself.

What a padded run says is what an exact one says, what a drawn probe sees is what a given one sees, all ways
to the same verdict agree, and buffers never move.
"""

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.engine import sampler
from safelight.engine.bundle import Bundle
from safelight.engine.generate import Generator
from safelight.engine.graphs.backend import GraphBackend
from safelight.engine.graphs.placed import Placement
from safelight.engine.graphs.program import PLANS, Plans, Program
from safelight.engine.graphs.runner import Processor, _Memory
from safelight.engine.model_folder import ModelFolder
from safelight.engine.neighbourhood import Request
from safelight.errors import SafelightError
from safelight.probe import ProbeConfig

CASES = runpy.run_path(str(Path(__file__).with_name("graph_cases.py")))
bundle, folder, graphs, eager = (CASES[name] for name in ("bundle", "folder", "graphs", "eager"))
PROMPTS, SEEDS, CLOSE = (CASES[name] for name in ("PROMPTS", "SEEDS", "CLOSE"))
SEEN, one_model = CASES["SEEN"], CASES["one_model"]
Noted, noted, ids_each = (CASES[name] for name in ("Noted", "noted", "ids_each"))
detector, assert_same = CASES["detector"], CASES["assert_same"]


KINDS = [
    ProbeConfig(count=5, threshold=0.4),
    ProbeConfig(kind="circular", count=5, threshold=0.4),
    ProbeConfig(kind="circular", count=1, threshold=1.0),
    ProbeConfig(target="latent", count=3, threshold=0.4),
    ProbeConfig(target="both", kind="circular", count=3, threshold=0.4),
    ProbeConfig(kind="token_shift", count=5, threshold=0.4),
    ProbeConfig(count=4, angle_rad=0.0, threshold=0.5),
]


@pytest.mark.parametrize("probe", KINDS, ids=lambda probe: f"{probe.kind}-{probe.target}-P{probe.count}")
@pytest.mark.parametrize(("any_model", "checker"), SEEN, indirect=["any_model"])
def test_probes_drawn_on_the_device_are_those_drawn_on_the_host(
    bundle: Bundle, graphs: GraphBackend, eager: Any, probe: ProbeConfig, checker: Any
) -> None:
    with detector(bundle, graphs, probe, checker=checker) as one:
        found = one.check_batch(PROMPTS, seed=SEEDS)
    with detector(bundle, eager, probe, checker=checker) as two:
        truth = two.check_batch(PROMPTS, seed=SEEDS)
    assert_same(found, truth, CLOSE if checker == "image" else 1e-5)
    assert [verdict.distinct_probes for verdict in found] == [v.distinct_probes for v in truth]


@one_model
@pytest.mark.parametrize("early_exit", [True, False])
def test_the_cascade_decodes_what_the_eager_one_decodes(
    bundle: Bundle, graphs: GraphBackend, eager: Any, early_exit: bool
) -> None:
    probe = ProbeConfig(count=6, threshold=0.5)
    with (
        detector(bundle, graphs, probe, checker="cascade", early_exit=early_exit) as one,
        detector(bundle, eager, probe, checker="cascade", early_exit=early_exit) as two,
    ):
        assert_same(one.check_batch(PROMPTS, seed=SEEDS), two.check_batch(PROMPTS, seed=SEEDS))
        assert (one.evaluated, one.decoded) == (two.evaluated, two.decoded)
    with detector(bundle, graphs, probe, checker="image") as whole:
        assert whole.check(PROMPTS[0], seed=0).probes == whole.decoded == 6


@one_model
def test_pictures_stay_on_the_device_until_they_are_asked_for(
    bundle: Bundle, graphs: GraphBackend, eager: Any
) -> None:
    probe = ProbeConfig(count=5, threshold=0.4)
    for prompt in PROMPTS[:2]:
        with detector(bundle, graphs, probe) as one, detector(bundle, eager, probe) as two:
            (_, found), (_, truth) = (item.check_with_images(prompt, seed=3) for item in (one, two))
        assert found.shape == truth.shape and found.dtype == truth.dtype
        np.testing.assert_allclose(found, truth, atol=1e-4)


@settings(max_examples=6, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 5), start=st.integers(0, 3), exact=st.booleans())
def test_padding_changes_nothing(
    bundle: Bundle, graphs: GraphBackend, rows: int, columns: int, start: int, exact: bool
) -> None:
    """Rows of a padded run are what the same rows say alone, whatever ran before in the same buffers."""
    model = graphs.one_step(ProbeConfig(count=9, threshold=0.4), latent=exact)
    ids = np.random.default_rng(rows).integers(0, 700, (rows, ids_each(bundle)))
    requests = [Request(row, seed) for row, seed in zip(ids, SEEDS, strict=False)]
    probes = range(start, start + columns)
    model.look([*requests, *requests][:8], range(8))
    looks = model.look(requests, probes)
    assert looks.margins.shape[:2] == looks.flagged.shape == looks.finite.shape == (rows, columns)
    for row, request in enumerate(requests):
        for column, probe in enumerate(probes):
            alone = model.look([request], range(probe, probe + 1))
            np.testing.assert_allclose(looks.margins[row, column], alone.margins[0, 0], atol=CLOSE)
            assert looks.finite[row, column] == alone.finite[0, 0]
    model.close()


@one_model
def test_a_run_repeats_itself_in_the_same_buffers(graphs: GraphBackend, bundle: Bundle) -> None:
    model: Any = graphs.one_step(ProbeConfig(count=5, threshold=0.4), latent=False)
    request = Request(np.full(ids_each(bundle), 7), 11)
    first = model.look([request], range(5)).margins.copy()
    program, result = model._plans.of(1, 6)
    places = {name: tensor.data_ptr() for name, tensor in {**program.given, **program.made}.items()}
    host = result.whole.data_ptr()
    model.look([Request(np.full(ids_each(bundle), 9), 12)], range(5))
    again = model.look([request], range(5)).margins
    assert np.array_equal(first, again)
    program, result = model._plans.of(1, 6)
    assert {name: tensor.data_ptr() for name, tensor in {**program.given, **program.made}.items()} == places
    assert result.whole.data_ptr() == host


@one_model
def test_a_detection_is_one_launch(bundle: Bundle, graphs: GraphBackend) -> None:
    runner = noted(graphs)
    with detector(bundle, graphs, ProbeConfig(count=8)) as one:
        one.check_batch(PROMPTS, seed=0)
        runner.copies.clear()
        runner.finished = 0
        one.check_batch(PROMPTS, seed=1)
        assert [kind for kind, _ in runner.copies] == ["in", "out"] and runner.finished == 1


def test_plans_beyond_the_limit_are_forgotten_the_least_recently_used_first() -> None:
    made: list[tuple[int, ...]] = []

    def make(*lengths: int) -> Any:
        made.append(lengths)
        return SimpleNamespace(result=lambda: None)

    plans = Plans(make)
    for number in range(PLANS):
        plans.of(number, 1)
    plans.of(0, 1)  # in use
    plans.of(PLANS, 1)
    assert len(plans._kept) == PLANS and (0, 1) in plans._kept and (1, 1) not in plans._kept
    assert len(made) == PLANS + 1


@one_model
def test_the_shipped_policy_plans_each_length_once(bundle: Bundle, graphs: GraphBackend) -> None:
    """Batches of 1 to 8 prompts, cut where a vote may be decided: nothing is forgotten and made again."""
    with detector(bundle, graphs, ProbeConfig(count=8, threshold=0.625), early_exit=True) as one:
        model: Any = one._model
        for _ in range(2):
            for count in range(1, 9):
                one.check_batch([PROMPTS[at % 5] for at in range(count)], seed=list(range(count)))
        kept = dict(model._plans._kept)
        one.check_batch(PROMPTS, seed=1)
        assert kept.keys() == model._plans._kept.keys() and len(kept) < PLANS


@one_model
@pytest.mark.parametrize("checker", ["image", "latent", "cascade"])
def test_a_warm_up_plans_what_a_check_runs(
    bundle: Bundle, folder: ModelFolder, checker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a first check with a time limit does not pay for compiling."""
    made = []
    record = Program.record
    monkeypatch.setattr(Program, "record", lambda self, *bodies: made.append(self) or record(self, *bodies))
    graphs = GraphBackend(bundle, folder, Placement("float32"), Noted())
    with detector(bundle, graphs, ProbeConfig(count=8), checker=checker, early_exit=True) as one:
        assert one.warm_up() > 0
        before = len(made)
        assert before > 0 and one.evaluated == 0
        assert one.check(PROMPTS[0], seed=1).detail is None
        assert len(made) == before


@one_model
def test_a_generator_on_its_detectors_backend_shares_the_networks(
    bundle: Bundle, folder: ModelFolder
) -> None:
    graphs = GraphBackend(bundle, folder, Placement("float32"), Noted())
    with (
        detector(bundle, graphs, ProbeConfig(count=2)) as one,
        Generator.open(bundle, detector=one) as generator,
    ):
        assert one.backend is graphs and generator._sampler.device == graphs.label
        assert generator.generate("a red star", steps=1, seed=1, probe_seed=1).verdict.backend == graphs.label
    with (
        detector(bundle, graphs, ProbeConfig(count=2)) as one,
        pytest.raises(ValueError, match="threads: says"),
    ):
        Generator.open(bundle, detector=one, threads=1)


@one_model
@pytest.mark.parametrize("probe", [None, ProbeConfig(count=3, threshold=0.5, target="latent")])
def test_a_picture_is_looked_at_as_by_the_eager_stages(
    bundle: Bundle, graphs: GraphBackend, eager: Any, probe: ProbeConfig | None
) -> None:
    picture = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    found = []
    for backend in (graphs, eager):
        with detector(bundle, backend, ProbeConfig(count=2)) as one:
            found.append(one.check_image(picture, probe=probe, seed=1))
    assert_same(found[:1], found[1:])


def sized(bundle: Bundle, folder: ModelFolder, edge: int) -> tuple[Bundle, GraphBackend]:
    """The bundle with latents of another size, which nothing runs, and a backend for it."""
    picture = replace(bundle.manifest.picture, latents=(4, edge, edge))
    other = Bundle(bundle.folder, replace(bundle.manifest, picture=picture))
    return other, GraphBackend(other, folder, Placement("float32"), Processor())


@one_model
@pytest.mark.parametrize("checker", ["image", "latent", "cascade"])
def test_a_look_holds_as_many_probes_as_the_pictures_size_allows(
    bundle: Bundle, folder: ModelFolder, checker: Any
) -> None:
    for edge, rows in ((8, 64), (32, 64), (64, 16), (96, 8), (128, 8)):
        other, backend = sized(bundle, folder, edge)
        with detector(other, backend, ProbeConfig(count=70), checker=checker) as one:
            assert one._model.rows == rows
            assert next(len(chunk) for chunk in one._chunks()) == rows


@one_model
@pytest.mark.parametrize(("precision", "within"), [("float32", 1e-5), ("bfloat16", 5e-2)])
def test_large_pictures_are_decoded_in_pieces(
    bundle: Bundle, folder: ModelFolder, precision: Any, within: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside the one body, by as many as a latent's size allows; what is seen is what one call shows."""
    backend = GraphBackend(bundle, folder, Placement(precision), Processor())
    vae: Any = backend._folder.load("vae")
    real, calls = vae.decode, list[int]()
    monkeypatch.setattr(
        vae, "decode", lambda latents, **named: calls.append(len(latents)) or real(latents, **named)
    )
    image = backend.one_step(ProbeConfig(count=4), latent=False)
    cascade = backend.one_step(ProbeConfig(count=4), latent=True, band=1.0)
    latents = np.random.default_rng(3).standard_normal((7, 4, 8, 8), dtype=np.float32)
    request = Request(np.full(ids_each(bundle), 7), 11)
    found = []
    for at_once, wanted in ((64, [4, 8]), (3, [3, 1, 3, 3, 2]), (1, [1] * 12)):
        monkeypatch.setattr(sampler, "DECODED", at_once * 8 * 8 * Placement(precision).dtype.itemsize)
        calls.clear()
        looks = image.look([request], range(4))
        pictures: Any = looks.images
        found.append((pictures[0], looks.margins.copy(), cascade.resolve(latents).margins.copy()))
        assert calls == wanted
    for pieces in found[1:]:
        np.testing.assert_allclose(pieces[0], found[0][0], atol=within)
        for one, two in zip(pieces[1:], found[0][1:], strict=True):
            np.testing.assert_allclose(one, two, atol=max(within, CLOSE))


@pytest.mark.parametrize(
    ("edge", "wide", "short"), [(8, 256, 512), (32, 16, 32), (64, 4, 8), (96, 1, 3), (128, 1, 2), (256, 1, 1)]
)
def test_how_many_latents_are_decoded_at_once(edge: int, wide: int, short: int) -> None:
    assert sampler.decoded_at_once(edge, edge) == wide
    assert sampler.decoded_at_once(edge, edge, 2) == short


def test_missing_memory_is_a_sentence_even_where_a_capture_hides_it() -> None:
    sentence = (
        r"cuda:3 has too little memory left for this plan \(no room\); ask for fewer .*bfloat16 or float16"
    )
    with pytest.raises(SafelightError, match=sentence), _Memory(torch.device("cuda", 3)):
        try:
            raise torch.OutOfMemoryError("no room.\nand more")
        finally:
            raise RuntimeError("capture was broken off")
    with pytest.raises(RuntimeError, match="another"), _Memory(torch.device("cuda", 3)):
        raise RuntimeError("another")
