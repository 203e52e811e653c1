"""The GPU's way through the networks, on the processor: everything but the capture itself.

What a padded run says is what an exact one says, what a drawn probe sees is what a given one sees, all ways
to the same verdict agree, buffers never move, and whatever goes wrong on the device blocks.
"""

import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from safelight.bench.bare_bundle import bare_bundle
from safelight.engine.backends import open_backend, shape_of
from safelight.engine.bundle import Bundle
from safelight.engine.detect import Detector
from safelight.engine.eager import load_detector, load_latent_detector
from safelight.engine.graphs.backend import GraphBackend
from safelight.engine.graphs.one_launch import OneLaunchModel
from safelight.engine.graphs.placed import KEPT, PlacedFolder, Placement
from safelight.engine.graphs.program import PLANS, Program
from safelight.engine.graphs.runner import Processor, _Memory, open_runner
from safelight.engine.graphs.sampling import GraphSampler
from safelight.engine.graphs.screening import LatentScreening, PictureScreening
from safelight.engine.graphs.slab import ALIGNMENT, Slab, bucket, fill
from safelight.engine.graphs.stage import detector_kept
from safelight.engine.model_folder import ModelFolder
from safelight.engine.neighbourhood import Request
from safelight.errors import BackendUnavailable, SafelightError, ShapeError
from safelight.kernels import ops
from safelight.kernels.dispatch import use_backend
from safelight.probe import ProbeConfig
from safelight.verdict import Verdict

PROMPTS = ["a red star", "a blue circle on a yellow picture", "", "zzz 123 !", "star star star"]
SEEDS = [0, 1, 2**63 + 5, 2**64 - 1, 4]
CLOSE = 3e-3  # two ways to the same margin differ by less: a level of 8 bits may round the other way
CPU = torch.device("cpu")


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
def bundle(guarded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bare_bundle(guarded_model, tmp_path_factory.mktemp("bundles") / "bare")


@pytest.fixture(scope="module")
def folder(guarded_model: Path) -> ModelFolder:
    return ModelFolder.open(guarded_model)


@pytest.fixture(scope="module")
def graphs(bundle: Bundle, folder: ModelFolder) -> GraphBackend:
    return GraphBackend(bundle, folder, Placement("float32"), Noted())


@pytest.fixture(scope="module")
def eager(bundle: Bundle, guarded_model: Path) -> Any:
    return open_backend("torch", bundle, model=guarded_model, threads=1)


def noted(backend: GraphBackend) -> Noted:
    runner = backend._runner
    assert isinstance(runner, Noted)
    return runner


def detector(bundle: Bundle, backend: Any, probe: ProbeConfig, **options: Any) -> Detector:
    return Detector(bundle, backend, probe, **{"early_exit": False, **options})


def assert_same(found: list[Verdict], truth: list[Verdict], within: float = CLOSE) -> None:
    """The same margins, and the same decisions wherever no margin lies at 0."""
    for one, two in zip(found, truth, strict=True):
        assert one.detail is None and two.detail is None
        np.testing.assert_allclose(one.margins, two.margins, atol=within)
        if np.abs(np.max(two.margins, axis=-1)).min() > within:
            assert (one.blocked, one.reason, one.score) == (two.blocked, two.reason, two.score)


# blocks of memory, and the lengths that are planned


@given(st.integers(1, 5000))
def test_a_bucket_holds_its_length_and_at_most_half_as_many_more(length: int) -> None:
    size = bucket(length)
    assert length <= size <= max(length, 3 * length // 2)
    assert bucket(size) == size


def test_the_buckets_are_few() -> None:
    assert sorted({bucket(length) for length in range(1, 65)}) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            bucket(wrong)


def test_a_slab_is_one_block_whose_views_do_not_touch() -> None:
    layout = {
        "a": (torch.bool, (3, 5)),
        "none": (torch.float32, (0, 4)),
        "b": (torch.float32, (7,)),
        "one": (torch.float32, ()),
        "c": (torch.int64, (2, 3)),
        "d": (torch.float16, (1, 3)),
    }
    slab = Slab(layout, CPU)
    for name, (dtype, shape) in layout.items():
        assert slab.tensors[name].dtype == dtype and slab.tensors[name].shape == shape
        assert slab.tensors[name].storage_offset() * dtype.itemsize % ALIGNMENT == 0
    for at, tensor in enumerate(slab.tensors.values()):
        tensor.fill_(at % 2)
    for at, (name, tensor) in enumerate(slab.tensors.items()):
        assert (tensor == at % 2).all(), name
        assert np.shares_memory(slab.arrays()[name], slab.whole.numpy()) or tensor.numel() == 0


def test_what_is_shorter_is_followed_by_zeros() -> None:
    target = np.full((3, 4), 9.0, np.float32)
    fill(target, np.ones((2, 3), np.float32))
    assert target.tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    fill(target, np.full((4, 3), 2, np.float32).T)
    assert (target == 2).all()
    for wrong in (np.ones((4, 4), np.float32), np.ones((2, 5), np.float32), np.ones(4, np.float32)):
        with pytest.raises(ValueError, match=r"does not fit a buffer of \(3, 4\)"):
            fill(target, wrong)
    with pytest.raises(TypeError):
        fill(target, np.ones((3, 4), np.float64))


# a program


def doubling(runner: Processor) -> Program:
    """`y = x + x`, then as many times `y += 1`."""
    program = Program(
        runner,
        inputs={"x": (torch.float32, (4,)), "more": (torch.int64, (3,))},
        outputs={"y": (torch.float32, (4,)), "seen": (torch.int64, (3,))},
        kept={"held": (torch.float32, (4,))},
    )
    x, y, more, seen = program.given["x"], program.made["y"], program.given["more"], program.made["seen"]

    def first() -> None:
        torch.add(x, x, out=y)
        seen.copy_(more)

    return program.record(first, lambda: y.add_(1))


def test_a_run_is_one_copy_in_one_copy_out_and_one_wait() -> None:
    runner = Noted()
    program = doubling(runner)
    result = program.result()
    runner.copies.clear()
    places = {name: tensor.data_ptr() for name, tensor in {**program.given, **program.made}.items()}
    for turn in range(3):
        values = {"x": np.arange(4, dtype=np.float32), "more": np.array([turn], np.int64)}
        program.run(values, result, repeats=(1, turn))
        assert result.arrays()["y"].tolist() == [0 + turn, 2 + turn, 4 + turn, 6 + turn]
        assert result.arrays()["seen"].tolist() == [turn, 0, 0]
        found = {name: tensor.data_ptr() for name, tensor in {**program.given, **program.made}.items()}
        assert found == places
    assert [kind for kind, _ in runner.copies] == ["in", "out"] * 3 and runner.finished == 3
    assert len({place for _, place in runner.copies}) == 2


def test_results_are_the_callers_own() -> None:
    program = doubling(Processor())
    one, two = program.result(), program.result()
    for value, into in ((1.0, one), (5.0, two)):
        program.run({"x": np.full(4, value, np.float32), "more": np.zeros(3, np.int64)}, into)
    assert one.arrays()["y"].tolist() == [3] * 4 and two.arrays()["y"].tolist() == [11] * 4


def test_a_program_keeps_to_its_time() -> None:
    program = doubling(Processor())
    values = {"x": np.ones(4, np.float32), "more": np.zeros(3, np.int64)}
    result = program.result()
    with pytest.raises(TimeoutError, match="time limit"):
        program.run(values, result, deadline=time.monotonic() - 1)
    assert result.arrays()["y"].tolist() == [0] * 4
    program.run(values, result, deadline=math.inf)
    assert result.arrays()["y"].tolist() == [3] * 4


def test_threads_take_turns_on_one_program() -> None:
    program, wrong = doubling(Processor()), []

    def work(number: int) -> None:
        result = program.result()
        for turn in range(200):
            value = np.full(4, number * 1000 + turn, np.float32)
            program.run({"x": value, "more": np.zeros(3, np.int64)}, result)
            if not np.array_equal(result.arrays()["y"], 2 * value + 1):
                wrong.append((number, turn))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


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
@pytest.mark.parametrize("checker", ["image", "latent"])
def test_probes_drawn_on_the_device_are_those_drawn_on_the_host(
    bundle: Bundle, graphs: GraphBackend, eager: Any, probe: ProbeConfig, checker: Any
) -> None:
    with detector(bundle, graphs, probe, checker=checker) as one:
        found = one.check_batch(PROMPTS, seed=SEEDS)
    with detector(bundle, eager, probe, checker=checker) as two:
        truth = two.check_batch(PROMPTS, seed=SEEDS)
    assert_same(found, truth, CLOSE if checker == "image" else 1e-5)
    assert [verdict.distinct_probes for verdict in found] == [v.distinct_probes for v in truth]


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
    ids = np.random.default_rng(rows).integers(0, 700, (rows, bundle.manifest.tokens.window))
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


def test_a_run_repeats_itself_in_the_same_buffers(graphs: GraphBackend, bundle: Bundle) -> None:
    model: Any = graphs.one_step(ProbeConfig(count=5, threshold=0.4), latent=False)
    request = Request(np.full(bundle.manifest.tokens.window, 7), 11)
    first = model.look([request], range(5)).margins.copy()
    program, result = model._plans.of(1, 6)
    places = {name: tensor.data_ptr() for name, tensor in {**program.given, **program.made}.items()}
    host = result.whole.data_ptr()
    model.look([Request(np.full(bundle.manifest.tokens.window, 9), 12)], range(5))
    again = model.look([request], range(5)).margins
    assert np.array_equal(first, again)
    program, result = model._plans.of(1, 6)
    assert {name: tensor.data_ptr() for name, tensor in {**program.given, **program.made}.items()} == places
    assert result.whole.data_ptr() == host


def test_a_detection_is_one_launch(bundle: Bundle, graphs: GraphBackend) -> None:
    runner = noted(graphs)
    with detector(bundle, graphs, ProbeConfig(count=8)) as one:
        one.check_batch(PROMPTS, seed=0)
        runner.copies.clear()
        runner.finished = 0
        one.check_batch(PROMPTS, seed=1)
        assert [kind for kind, _ in runner.copies] == ["in", "out"] and runner.finished == 1


def test_plans_beyond_the_limit_are_forgotten_oldest_first(bundle: Bundle, graphs: GraphBackend) -> None:
    model: Any = graphs.one_step(ProbeConfig(count=64), latent=True)
    made = [model._plans.of(1, bucket(probes)) for probes in range(1, 64)]
    assert len({id(program) for program, _ in made}) == 12
    for requests in range(2, 7):
        model._plans.of(requests, 1)
    assert len(model._plans._kept) == PLANS and (1, 1) not in model._plans._kept


def test_crops_runs_on_the_sampler_of_the_device(bundle: Bundle, graphs: GraphBackend, eager: Any) -> None:
    probe = ProbeConfig(count=2, threshold=0.5)
    with (
        detector(bundle, graphs, probe, steps=2) as one,
        detector(bundle, eager, probe, steps=2) as two,
    ):
        assert isinstance(one._model._sampler, GraphSampler)  # type: ignore[attr-defined]
        assert_same(one.check_batch(PROMPTS[:2], seed=1), two.check_batch(PROMPTS[:2], seed=1))


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


def test_a_look_holds_as_many_probes_as_the_pictures_size_allows(
    bundle: Bundle, graphs: GraphBackend
) -> None:
    model: Any = graphs.one_step(ProbeConfig(), latent=False)
    for edge, rows in ((8, 64), (32, 64), (64, 16), (96, 8)):
        picture = replace(bundle.manifest.picture, latents=(4, edge, edge))
        manifest = replace(bundle.manifest, picture=picture)
        made = OneLaunchModel(model._screening, model._runner, manifest, ProbeConfig(), label="")
        assert made.rows == rows


def test_missing_memory_is_a_sentence_even_where_a_capture_hides_it() -> None:
    sentence = r"cuda:3 has too little memory left for this plan \(no room\); ask for fewer"
    with pytest.raises(SafelightError, match=sentence), _Memory(torch.device("cuda", 3)):
        try:
            raise torch.OutOfMemoryError("no room.\nand more")
        finally:
            raise RuntimeError("capture was broken off")
    with pytest.raises(RuntimeError, match="another"), _Memory(torch.device("cuda", 3)):
        raise RuntimeError("another")


# what is not finite, and what goes wrong


@pytest.mark.parametrize("part", ["text_encoder", "unet_one_step", "vae", "safety_checker", "latent_checker"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_block(
    bundle: Bundle, folder: ModelFolder, part: str, value: float
) -> None:
    backend = GraphBackend(bundle, folder, Placement("float32"), Processor())
    network = backend._folder.load(part)
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
    window = bundle.manifest.tokens.window
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
        values = model._values([Request(np.full(bundle.manifest.tokens.window, 7), 1)], range(3))
        program, result = model._plans.of(1, 3)
        program.run({**values, "angle": np.full(1, math.nan, np.float32)}, result)
        finite = result.arrays()["block"][0, -5:-2]
        assert (finite[1:] == 0).all(), target


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


def test_a_detection_keeps_to_its_time(bundle: Bundle, graphs: GraphBackend) -> None:
    with detector(bundle, graphs, ProbeConfig(count=2), timeout_s=1e-9) as one:
        assert one.check(PROMPTS[0]).reason == "timeout"
    with detector(bundle, graphs, ProbeConfig(count=2), timeout_s=60) as one:
        assert one.check(PROMPTS[0]).reason in (None, "concept")


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
@pytest.mark.parametrize("checker", ["image", "latent"])
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
    """Refuses whatever brings a value from the host to tensors that have none, as a capture does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        here, there = (
            {
                value.device.type
                for value in tree_leaves(part)
                if isinstance(value, torch.Tensor) and value.dim()
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


# stages


@pytest.fixture(params=["text_encoder", "unet", "vae_decoder", "vae_encoder", "safety_checker"])
def graph(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


def inputs(stage: Any, **axes: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(sum(axes.values()))
    made = {}
    for tensor in stage.spec.inputs:
        shape = tuple(axes.get(axis, axis) for axis in tensor.axes)
        drawn = generator.standard_normal(shape) if tensor.dtype == "float32" else np.full(shape, 1)
        made[tensor.name] = np.asarray(drawn, tensor.dtype)
    return made


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_a_stage_is_the_eager_stage(graphs: GraphBackend, eager: Any, graph: str, batch: int) -> None:
    one, two = (backend.stage(graph) for backend in (graphs, eager))
    assert one.spec == two.spec and one.lanes == 1 and "graph" in one.device
    for stage in (one, two):
        stage.plan(batch=batch)
    given_inputs = inputs(one, batch=batch)
    found, truth = one.run(given_inputs), two.run(given_inputs)
    assert list(found) == list(truth)
    for name, value in found.items():
        assert value.shape == truth[name].shape and value.dtype == truth[name].dtype
        np.testing.assert_allclose(value, truth[name], atol=1e-4 * max(1, np.abs(truth[name]).max()))
    one.close()
    with pytest.raises(ShapeError, match="not planned"):
        one.run(given_inputs)


@pytest.mark.parametrize("graph_name", ["detector", "detector_latent"])
@pytest.mark.parametrize("lengths", [(1, 1), (2, 5)], ids=lambda pair: f"R{pair[0]}-P{pair[1]}")
def test_a_detector_stage_votes_as_the_eager_one(
    graphs: GraphBackend, eager: Any, graph_name: str, lengths: tuple[int, int]
) -> None:
    stages = [backend.stage(graph_name) for backend in (graphs, eager)]
    axes = dict(zip(("requests", "probes"), lengths, strict=True))
    found = []
    for stage in stages:
        stage.plan(**axes)
        values = inputs(stage, **axes)
        values["prompt_u"].flat[0] = math.inf  # the first probe is not finite
        found.append(stage.run(values))
    for name, value in found[0].items():
        assert value.shape == found[1][name].shape and value.dtype == found[1][name].dtype
        np.testing.assert_allclose(value, found[1][name], atol=CLOSE, err_msg=name)
    assert (
        not found[0]["finite"].flat[0]
        and found[0]["blocked"][0]
        and found[0]["finite"].sum() > 0
        or (lengths == (1, 1))
    )


def test_lengths_of_one_bucket_do_not_share_results(graphs: GraphBackend) -> None:
    stage = graphs.stage("text_encoder")
    for batch in (5, 6):
        stage.plan(batch=batch)
    five = stage.run(inputs(stage, batch=5))["last_hidden_state"]
    kept = five.copy()
    six = inputs(stage, batch=6)
    six["input_ids"][:] = 3
    stage.run(six)
    assert np.array_equal(five, kept)


# devices


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:-1", "mps", "", "cpu:0"])
def test_an_unknown_device_is_the_callers_mistake(device: str) -> None:
    with pytest.raises(ValueError, match="device must be 'cpu', 'cuda' or 'cuda:N'; got"):
        open_runner(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there_is_refused(bundle: Bundle, guarded_model: Path, device: str) -> None:
    sentence = f"torch: device '{device}' was asked for, and torch .* sees no CUDA device; name one"
    with pytest.raises(BackendUnavailable, match=sentence):
        Detector.open(bundle, backend="torch", model=guarded_model, device=device)


def test_options_of_a_gpu_go_with_no_other_backend(bundle: Bundle, guarded_model: Path) -> None:
    for options in ({"device": "cpu"}, {"precision": "float16"}, {"compiled": True}):
        with pytest.raises(ValueError, match="goes with backend torch; got backend 'onnxruntime'"):
            open_backend("onnxruntime", bundle, **options)
    for options in ({"precision": "float16"}, {"compiled": True}):
        with pytest.raises(ValueError, match="is the definition on the processor"):
            open_backend("torch", bundle, model=guarded_model, **options)
    with pytest.raises(ValueError, match="precision must be one of"):
        open_backend("torch", bundle, model=guarded_model, device="cuda", precision="int8")
    stage = open_backend("torch", bundle, model=guarded_model, device="cpu").stage("safety_checker")
    assert stage.device == "torch cpu"
