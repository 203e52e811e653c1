"""The GPU's way through the networks, on the processor: everything but the capture itself.

What a padded run says is what an exact one says, what a drawn probe sees is what a given one sees, all ways
to the same verdict agree, buffers never move, and whatever goes wrong on the device blocks.
"""

import math
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from safelight.bench.bare_bundle import bare_bundle
from safelight.engine import sampler
from safelight.engine.backends import open_backend, shape_of
from safelight.engine.bundle import Bundle
from safelight.engine.detect import Detector
from safelight.engine.eager import load_detector, load_graph, load_latent_detector
from safelight.engine.generate import Generator
from safelight.engine.graphs.backend import GraphBackend
from safelight.engine.graphs.placed import KEPT, PlacedFolder, Placement
from safelight.engine.graphs.program import PLANS, Plans, Program
from safelight.engine.graphs.runner import Processor, _Memory
from safelight.engine.graphs.screening import LatentScreening, PictureScreening
from safelight.engine.graphs.slab import Slab
from safelight.engine.graphs.stage import detector_kept, part_body
from safelight.engine.model_folder import ONE_STEP, ModelFolder
from safelight.engine.neighbourhood import Request
from safelight.errors import SafelightError
from safelight.kernels import ops
from safelight.kernels.dispatch import use_backend
from safelight.probe import ProbeConfig
from safelight.verdict import Verdict

PROMPTS = ["a red star", "a blue circle on a yellow picture", "", "zzz 123 !", "star star star"]
SEEDS = [0, 1, 2**63 + 5, 2**64 - 1, 4]
CLOSE = 3e-3  # two ways to the same margin differ by less: a level of 8 bits may round the other way
CPU = torch.device("cpu")
ONE, TWO = "one text encoder", "two text encoders"
one_model = pytest.mark.parametrize("any_model", [ONE], indirect=True)  # the law does not depend on it
SEEN = [(ONE, "image"), (ONE, "latent"), (TWO, "latent")]  # nor do pictures


class Noted(Processor):
    """The processor, noting what it is asked for; `fault` is raised where a GPU reports errors."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[str, int]] = []
        self.finished = 0
        self.fault: Exception | None = None

    def upload(self, source: Slab, target: Slab) -> None:
        self.copies.append(("in", source.whole.data_ptr()))
        super().upload(source, target)

    def finish(self, source: Slab, target: Slab, deadline: float | None) -> None:
        self.copies.append(("out", source.whole.data_ptr()))
        self.finished += 1
        if self.fault is not None:
            raise self.fault
        super().finish(source, target, deadline)


@pytest.fixture(scope="module")
def bundle(any_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bare_bundle(any_model, tmp_path_factory.mktemp("bundles") / "bare")


@pytest.fixture(scope="module")
def folder(any_model: Path) -> ModelFolder:
    return ModelFolder.open(any_model)


@pytest.fixture(scope="module")
def graphs(bundle: Bundle, folder: ModelFolder) -> GraphBackend:
    return GraphBackend(bundle, folder, Placement("float32"), Noted())


@pytest.fixture(scope="module")
def eager(bundle: Bundle, any_model: Path) -> Any:
    return open_backend("torch", bundle, model=any_model, threads=1)


def noted(backend: GraphBackend) -> Noted:
    runner = backend._runner
    assert isinstance(runner, Noted)
    return runner


def ids_each(bundle: Bundle) -> int:
    """How many ids a prompt has: a window for each text encoder."""
    return int(bundle.manifest.graphs["text_encoder"].inputs[0].axes[1])


def detector(bundle: Bundle, backend: Any, probe: ProbeConfig, **options: Any) -> Detector:
    return Detector(bundle, backend, probe, **{"early_exit": False, **options})


def assert_same(found: list[Verdict], truth: list[Verdict], within: float = CLOSE) -> None:
    """The same margins, and the same decisions wherever no margin lies at 0."""
    for one, two in zip(found, truth, strict=True):
        assert one.detail is None and two.detail is None
        np.testing.assert_allclose(one.margins, two.margins, atol=within)
        if np.abs(np.max(two.margins, axis=-1)).min() > within:
            assert (one.blocked, one.reason, one.score) == (two.blocked, two.reason, two.score)


# detection


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


# what is not finite, and what goes wrong


@pytest.mark.parametrize(
    ("any_model", "part"),
    [
        *((ONE, part) for part in ("text_encoder", "its unet", "vae", "safety_checker", "latent_checker")),
        *((TWO, part) for part in ("text_encoder", "its unet")),
    ],
    indirect=["any_model"],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_block(
    bundle: Bundle, folder: ModelFolder, part: str, value: float
) -> None:
    backend = GraphBackend(bundle, folder, Placement("float32"), Processor())
    unet = ONE_STEP if folder.has_one_step else "unet"
    network = backend._folder.load(unet if part == "its unet" else part)
    used: Any = getattr(network, "decoder", network)
    weights = next(p for n, p in used.named_parameters() if p.dim() > 1 and "position" not in n)
    with torch.inference_mode():
        weights.data.fill_(value)
    checker: Any = "latent" if part == "latent_checker" else "image"
    with detector(bundle, backend, ProbeConfig(count=3, threshold=1.0), checker=checker) as one:
        verdict = one.check(PROMPTS[0], seed=0)
    assert verdict.blocked and verdict.reason == "non_finite"


def test_one_request_that_is_not_finite_blocks_no_other(bundle: Bundle, folder: ModelFolder) -> None:
    """One token's embedding is spoilt: whoever spells it is blocked, in whatever company, padded or not."""
    backend = GraphBackend(bundle, folder, Placement("float32"), Processor())
    encoder: Any = backend._folder.load("text_encoder")
    with torch.inference_mode():
        encoder.get_input_embeddings().weight.data[5].fill_(math.nan)
    model = backend.one_step(ProbeConfig(count=3, threshold=1.0), latent=False)
    window = ids_each(bundle)
    clean, spoilt = Request(np.full(window, 7), 1), Request(np.full(window, 5), 2)
    for requests in ([clean, spoilt, clean], [spoilt], [clean] * 4 + [spoilt]):
        looks = model.look(requests, range(3))
        for row, request in enumerate(requests):
            assert looks.finite[row].all() == (request is clean)
            assert looks.flagged[row].all() or request is clean
            assert np.isfinite(looks.margins[row]).all() == (request is clean)


def test_an_angle_that_is_not_finite_blocks(bundle: Bundle, graphs: GraphBackend) -> None:
    for target in ("prompt", "latent"):
        model: Any = graphs.one_step(ProbeConfig(count=3, target=target), latent=True)
        object.__setattr__(model, "_config", ProbeConfig(count=3, target=target))
        values = model._values([Request(np.full(ids_each(bundle), 7), 1)], range(3))
        program, result = model._plans.of(1, 3)
        program.run({**values, "angle": np.full(1, math.nan, np.float32)}, result)
        finite = result.arrays()["block"][0, -5:-2]
        assert (finite[1:] == 0).all(), target


@one_model
@pytest.mark.parametrize("checker", ["image", "latent", "cascade"])
@pytest.mark.parametrize(
    "fault", [RuntimeError("CUDA error: an illegal memory access"), torch.OutOfMemoryError("no memory")]
)
def test_what_the_device_reports_when_it_is_waited_for_blocks(
    bundle: Bundle, folder: ModelFolder, checker: Any, fault: Exception
) -> None:
    backend = GraphBackend(bundle, folder, Placement("float32"), Noted())
    with detector(bundle, backend, ProbeConfig(count=3, threshold=1.0), checker=checker) as one:
        passed = one.check(PROMPTS[1], seed=0)
        noted(backend).fault = fault
        verdict = one.check(PROMPTS[1], seed=0)
        assert verdict.blocked and verdict.reason == "error" and str(fault) in (verdict.detail or "")
        noted(backend).fault = None
        assert one.check(PROMPTS[1], seed=0).margins == passed.margins


@one_model
def test_a_detection_keeps_to_its_time(bundle: Bundle, graphs: GraphBackend) -> None:
    with detector(bundle, graphs, ProbeConfig(count=2), timeout_s=1e-9) as one:
        assert one.check(PROMPTS[0]).reason == "timeout"
    with detector(bundle, graphs, ProbeConfig(count=2), timeout_s=60) as one:
        assert one.check(PROMPTS[0]).reason in (None, "concept")


@one_model
def test_two_threads_share_a_detector(bundle: Bundle, graphs: GraphBackend) -> None:
    with detector(bundle, graphs, ProbeConfig(count=3)) as one:
        truth = [one.check(prompt, seed=5).margins for prompt in PROMPTS]
        wrong: list[str] = []

        def work() -> None:
            for _ in range(3):
                for prompt, margins in zip(PROMPTS, truth, strict=True):
                    if one.check(prompt, seed=5).margins != margins:
                        wrong.append(prompt)

        workers = [threading.Thread(target=work) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert wrong == []


# the compiled bodies, by Triton's interpreter where there is no GPU


@one_model
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU compiles the kernels; tests marked gpu run them")
@pytest.mark.parametrize(
    "probe",
    [ProbeConfig(count=2, kind="circular", target="both"), ProbeConfig(count=2)],
    ids=lambda probe: f"{probe.kind}-{probe.target}",
)
def test_compiled_operations_take_what_they_are_given(
    bundle: Bundle, folder: ModelFolder, probe: ProbeConfig
) -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which this machine has not")
    backend = GraphBackend(bundle, folder, Placement("float16"), Processor())
    found = []
    for name in ("triton", "reference"):
        with detector(bundle, backend, probe, checker="latent") as one, use_backend(name):
            found.append(one.check_batch(PROMPTS[:2], seed=SEEDS[:2]))
    assert_same(*found, within=1e-2)


# precision


@pytest.mark.parametrize(("precision", "within"), [("float16", 1e-2), ("bfloat16", 5e-2)])
@pytest.mark.parametrize(("any_model", "checker"), SEEN, indirect=["any_model"])
def test_two_bytes_are_near_four(
    bundle: Bundle, folder: ModelFolder, eager: Any, precision: Any, within: float, checker: Any
) -> None:
    backend = GraphBackend(bundle, folder, Placement(precision), Processor())
    probe = ProbeConfig(count=3, threshold=0.4)
    with detector(bundle, backend, probe, checker=checker) as one:
        found = one.check_batch(PROMPTS, seed=SEEDS)
        assert precision in found[0].backend
    with detector(bundle, eager, probe, checker=checker) as two:
        assert_same(found, two.check_batch(PROMPTS, seed=SEEDS), within)


@one_model
def test_what_the_checker_compares_with_stays_float32(bundle: Bundle, folder: ModelFolder) -> None:
    backend = GraphBackend(bundle, folder, Placement("bfloat16"), Processor())
    placed, whole = backend._folder.load("safety_checker"), folder.load("safety_checker")
    for name in KEPT:
        found = getattr(placed, name)
        assert found.dtype is torch.float32 and torch.equal(found, getattr(whole, name).float())
    others = [p for n, p in placed.named_parameters() if n not in KEPT]
    assert {p.dtype for p in others} == {torch.bfloat16}
    filters = [p for p in backend._folder.load("unet").parameters() if p.dim() == 4 and p.shape[2] > 1]
    assert filters and all(p.is_contiguous(memory_format=torch.channels_last) for p in filters)
    assert backend._folder.load("vae") is backend._folder.load("vae")


# what a capture does not allow: a value that is read on the host, a tensor that comes from there


class Captured(TorchDispatchMode):
    """Refuses whatever brings a value from the host to tensors that have none, as a capture does.

    A single number is an argument of most kernels, but `where` copies it to the device first.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        copied = func.overloadpacket is torch.ops.aten.where
        here, there = (
            {
                value.device.type
                for value in tree_leaves(part)
                if isinstance(value, torch.Tensor) and (value.dim() or copied)
            }
            for part in ((args, kwargs), made)
        )
        assert not ("cpu" in here and "meta" in there), f"{func} takes a value from the host"
        return made


@pytest.mark.parametrize("graph_name", ["detector", "detector_latent"])
def test_bodies_leave_the_host_alone(
    bundle: Bundle, folder: ModelFolder, graph_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors without values, a body that waits for one cannot go on."""
    load = load_detector if graph_name == "detector" else load_latent_detector
    kind: Any = PictureScreening if graph_name == "detector" else LatentScreening
    module: Any = load(PlacedFolder.place(folder, CPU, Placement("float16"))).to("meta")
    spec = bundle.manifest.graphs[graph_name]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    size = bundle.manifest.checker.size
    # the reference's resizing reads its matrices from the host; the compiled body has them on the device
    monkeypatch.setattr(ops, "clip_input", lambda decoded, *_, **__: decoded[..., :size, :size])
    axes = {"requests": 2, "probes": 3}

    def empty(layout: Any) -> dict[str, torch.Tensor]:
        return {name: torch.empty(s, dtype=d, device="meta") for name, (d, s) in layout.items()}

    def layout(specs: Any) -> Any:
        return {item.name: (getattr(torch, item.dtype), shape_of(item, axes)) for item in specs}

    with torch.inference_mode():
        screening = kind(module, bundle.manifest)
        made = empty(layout(spec.outputs)) | empty(detector_kept(screening)(axes))
        taken = empty(layout(spec.inputs))
        with Captured():
            screening.take(taken, made)
            with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
                bool(made["finite"].all())
            with pytest.raises(AssertionError, match="from the host"):
                torch.ones(3).to("meta")


@pytest.mark.parametrize(
    ("any_model", "graph_name"),
    [
        *((ONE, graph) for graph in ("text_encoder", "unet", "vae_decoder", "vae_encoder", "safety_checker")),
        *((ONE, graph) for graph in ("latent_checker", "redirector")),
        *((TWO, graph) for graph in ("text_encoder", "unet", "redirector")),
    ],
    indirect=["any_model"],
)
def test_stages_leave_the_host_alone(
    bundle: Bundle, folder: ModelFolder, graph_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So does the body of every graph that is one module."""
    module = load_graph(PlacedFolder.place(folder, CPU, Placement("float16")), graph_name).to("meta")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    spec = bundle.manifest.graphs[graph_name]
    given, made = (
        {
            item.name: torch.empty(
                shape_of(item, {"batch": 3}), dtype=getattr(torch, item.dtype), device="meta"
            )
            for item in items
        }
        for items in (spec.inputs, spec.outputs)
    )
    with torch.inference_mode(), Captured():
        part_body(module)(given, made)
