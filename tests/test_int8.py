"""An int8 bundle: copied whole or not at all, judged against float32 before it is written, run by integer
kernels in both runtimes, and closed to inputs that are not finite.
"""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner

from safelight.cli import main
from safelight.engine import backends
from safelight.engine.backends import open_backend
from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.calibration import shapes_prompts
from safelight.engine.detect import Detector
from safelight.engine.doctor import cpu_flags
from safelight.errors import BackendUnavailable, BundleError, ExportError, SafelightError
from safelight.export.int8 import bundle as quantizing
from safelight.export.int8.bundle import quantize_bundle
from safelight.export.int8.recorded import record
from safelight.export.verify import Case, draw
from safelight.manifest import DETECTORS, MANIFEST, Int8Form, Manifest
from safelight.models.shapes.captions import DEMO_PROMPTS

PROMPTS = [prompt for _, prompt in DEMO_PROMPTS]
HAS_INT8 = bool({"avx512_vnni", "avx_vnni", "amx_int8"} & set(cpu_flags() or ()))
needs_int8 = pytest.mark.skipif(not HAS_INT8, reason="this processor adds no products of bytes")
BOTH = ("onnxruntime:int8", "openvino:int8")


CAPTIONS = shapes_prompts(48)[0].mixed(48)


@pytest.fixture(scope="module")
def shapes() -> Bundle:
    return open_bundle("shapes")


@pytest.fixture(scope="module")
def made(shapes: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    target = tmp_path_factory.mktemp("int8") / "shapes"
    quantize_bundle(shapes, target, CAPTIONS, threads=2)
    return open_bundle(target)


@pytest.fixture
def copy(made: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.folder, tmp_path / "copy"))


def judged(backend: str, bundle: Bundle, checker: str) -> tuple[np.ndarray, list[bool], str]:
    runtime = open_backend(backend, bundle, threads=2)
    with Detector(bundle, runtime, bundle.manifest.probe, early_exit=False, checker=checker) as detector:
        verdicts = detector.check_batch(PROMPTS, seed=list(range(len(PROMPTS))))
    assert {verdict.reason for verdict in verdicts} == {None, "concept"}
    return np.array([v.margins for v in verdicts]), [v.blocked for v in verdicts], verdicts[0].backend


@pytest.fixture(scope="module")
def reference(shapes: Bundle) -> dict[str, tuple[np.ndarray, list[bool], str]]:
    return {checker: judged("onnxruntime", shapes, checker) for checker in ("image", "latent")}


@needs_int8
@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("checker", ["image", "latent"])
def test_verdicts_are_float32s_and_margins_show_that_it_is_int8(made, reference, backend, checker) -> None:
    margins, blocked, where = judged(backend, made, checker)
    expected, decided, _ = reference[checker]
    assert blocked == decided and where.endswith("int8")
    assert 1e-3 < np.abs(margins - expected).mean() < 3e-2
    assert ((margins.max(-1) > 0) != (expected.max(-1) > 0)).mean() < 0.02


@needs_int8
@pytest.mark.parametrize("graph", DETECTORS.values())
def test_onnxruntime_runs_the_products_in_integers(made: Bundle, graph: str, tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    ort.InferenceSession(made.graph(graph, int8=True), options, providers=["CPUExecutionProvider"])
    ran = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    form = made.manifest.graphs[graph].int8
    assert form is not None
    integers = ran["QLinearConv"] + ran["MatMulIntegerToFloat"] + ran["DynamicQuantizeMatMul"]
    assert integers == form.products


@needs_int8
@pytest.mark.parametrize("graph", DETECTORS.values())
def test_openvino_runs_the_products_in_integers(made: Bundle, graph: str) -> None:
    stage = open_backend("openvino:int8", made, threads=1).stage(graph)
    ran = [op.get_rt_info() for op in stage._compiled.get_runtime_model().get_ordered_ops()]
    integers = [info for info in ran if info["primitiveType"].value.endswith("_I8")]
    integers = [info for info in integers if info["layerType"].value in ("Convolution", "FullyConnected")]
    form = made.manifest.graphs[graph].int8
    assert form is not None and len(integers) == form.products


@needs_int8
@pytest.mark.parametrize("backend", BOTH)
def test_other_graphs_stay_float32(made: Bundle, backend: str) -> None:
    runtime = open_backend(backend, made, threads=1)
    exact = open_backend(backend.partition(":")[0], made, threads=1)
    for graph in ("safety_checker", "unet", "vae_decoder"):
        assert runtime.stage(graph).device == exact.stage(graph).device


@needs_int8
@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("graph", DETECTORS.values())
def test_what_is_not_finite_is_flagged_though_bytes_cannot_hold_it(made, backend, graph) -> None:
    stage = open_backend(backend, made, threads=1).stage(graph)
    stage.plan(requests=1, probes=3)
    inputs = draw(stage.spec, made.manifest, Case({"requests": 1, "probes": 3}))
    assert stage.run(inputs)["finite"].all()
    for name in ("prompt_u", "prompt_v", "angle", "phase", "latents"):
        for value in (np.nan, np.inf, -np.inf):
            spoilt = inputs | {name: inputs[name].copy()}
            spoilt[name][(0, 1) + (0,) * (spoilt[name].ndim - 2)] = value
            found = stage.run(spoilt)
            assert found["finite"].tolist() == [[True, False, True]], (name, value)
            assert found["flagged"][0, 1]


def test_the_copy_is_the_bundle_and_two_forms_more(shapes: Bundle, made: Bundle) -> None:
    ours, theirs = made.manifest, shapes.manifest
    forms = {part for name in DETECTORS.values() for part in ours.graphs[name].parts(int8=True)}
    assert {name: ours.files[name] for name in theirs.files} == dict(theirs.files)
    assert ours.files.keys() - theirs.files.keys() == forms
    for name in DETECTORS.values():
        form = ours.graphs[name].int8
        assert (
            form is not None
            and 0 < form.blocked < form.verdicts
            and form.products >= 25
            and (form.verdicts, form.probes) == (32, 256)
        )
        size = sum(ours.files[part].size_bytes for part in ours.graphs[name].parts())
        assert sum(ours.files[part].size_bytes for part in ours.graphs[name].parts(int8=True)) < 0.8 * size
    assert Manifest.load(made.folder, verify="full") == ours
    assert ours.bundle_id != theirs.bundle_id


def test_the_inputs_of_the_calibration_are_those_of_a_check(shapes: Bundle) -> None:
    samples = record(shapes, dict(enumerate(PROMPTS[:3])), "image")
    assert len(samples) == 3
    stage = open_backend("onnxruntime", shapes, threads=1).stage("detector")
    stage.plan(requests=1, probes=shapes.manifest.probe.count)
    with Detector.open(shapes, threads=1, early_exit=False) as detector:
        expected = detector.check(PROMPTS[1], seed=1).margins
    np.testing.assert_allclose(stage.run(samples[1])["margins"][0], expected, atol=1e-5)


def test_a_form_that_judges_otherwise_is_not_written(shapes, tmp_path, monkeypatch) -> None:
    narrow = lambda graph, samples, scratch, **more: _narrowed(graph, samples, scratch, **more)  # noqa: E731
    real = quantizing.measure

    def _narrowed(*given, **named):
        return {name: (low / 50, high / 50) for name, (low, high) in real(*given, **named).items()}

    monkeypatch.setattr(quantizing, "measure", narrow)
    with pytest.raises(ExportError, match=r"judges otherwise .* nothing was written"):
        quantize_bundle(shapes, tmp_path / "out", CAPTIONS[:8], calibrate=4, threads=2)
    assert list(tmp_path.iterdir()) == []


@needs_int8
@pytest.mark.parametrize(
    ("target", "prompts", "calibrate", "said"),
    [
        ("out", ("a",), 1, r"calibrate must lie in \[1, 1\)"),
        ("out", ("a", "b"), 0, "got 0"),
        ("out", ("a", "b", "a"), 1, "occurs twice"),
        ("copy/detector/out", ("a", "b"), 1, "inside of the bundle"),
        ("held", ("a", "b"), 1, "not an empty folder"),
    ],
)
def test_a_call_that_proves_nothing_or_spoils_something(
    copy: Path, tmp_path: Path, target, prompts, calibrate, said
) -> None:
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "mine").write_text("kept")
    with pytest.raises((ValueError, SafelightError), match=said):
        quantize_bundle(open_bundle(copy), tmp_path / target, prompts, calibrate=calibrate)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "held"]
    open_bundle(copy, verify="full")


@needs_int8
@pytest.mark.parametrize("kind", ["clean", "restricted"])
def test_prompts_of_one_kind_do_not_show_that_int8_judges(shapes: Bundle, tmp_path: Path, kind: str) -> None:
    """A checker that never flags would agree with float32 on prompts that all pass."""
    texts = getattr(shapes_prompts(6)[0], kind)
    with pytest.raises(ExportError, match=r"float32 blocks [04] of 4 prompts, .* of both kinds"):
        quantize_bundle(shapes, tmp_path / "out", texts, calibrate=2, threads=2)
    quantize_bundle(shapes, tmp_path / "out", texts, calibrate=2, threads=2, one_sided=True)


@needs_int8
def test_a_prompt_that_cannot_be_screened_is_no_agreement(shapes, tmp_path, monkeypatch) -> None:
    for place in (1, 0):  # among those that are compared, and those that give the ranges
        texts = ["a red circle", "a blue square", "a yellow star"]
        texts[place] = "\ud800"
        with pytest.raises(ExportError, match="gave error"):
            quantize_bundle(shapes, tmp_path / "out", texts, calibrate=1, threads=2, one_sided=True)


@needs_int8
def test_what_float32_blocks_and_int8_lets_pass_is_never_written(shapes, tmp_path, monkeypatch) -> None:
    real = Detector.check

    def lenient(self, prompt, **named):
        verdict = real(self, prompt, **named)
        if not verdict.backend.endswith("int8"):
            return verdict
        return replace(verdict, blocked=False, reason=None, score=0.0)

    monkeypatch.setattr(Detector, "check", lenient)
    monkeypatch.setattr(quantizing, "MOST", 1.0)
    with pytest.raises(ExportError, match="pass that float32 blocks"):
        quantize_bundle(shapes, tmp_path / "out", CAPTIONS[:10], calibrate=4, threads=2)


@needs_int8
def test_a_cascade_widens_its_band_by_what_int8_was_seen_to_be_off(made: Bundle) -> None:
    form, band = made.manifest.graphs["detector_latent"].int8, made.manifest.checker.latent_band
    assert form is not None and band is not None
    bands = {}
    for backend in ("onnxruntime", "onnxruntime:int8"):
        with Detector.open(made, backend=backend, checker="cascade", threads=1) as detector:
            bands[backend] = detector._model._band
    assert bands == {"onnxruntime": band, "onnxruntime:int8": band + form.margin}


def test_int8_forms_are_not_calibrated_anew(made: Bundle, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["calibrate", str(made.folder), "--limit", "10"])
    assert done.exit_code == 2 and "calibrate the bundle that it was made from" in done.stderr


@pytest.mark.parametrize(
    "changes",
    [{"products": 0}, {"verdicts_differ": 40}, {"blocked": -1}, {"probes_differ": 300}, {"margin": -1.0}],
)
def test_an_agreement_that_cannot_be_is_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match="no int8 form has such an agreement"):
        replace(Int8Form("detector/int8.onnx", (), 40, 32, 16, 0, 256, 1, 0.1), **changes)


def test_two_forms_do_not_share_a_file(made: Bundle) -> None:
    graph = made.manifest.graphs["detector"]
    assert graph.int8 is not None
    with pytest.raises(ValueError, match="belongs to an int8 form and to another graph"):
        replace(
            made.manifest,
            graphs={
                **made.manifest.graphs,
                "detector": replace(graph, int8=replace(graph.int8, path=graph.path)),
            },
        )


def test_a_bundle_that_was_altered_is_not_quantized(copy: Path, tmp_path: Path) -> None:
    bundle = open_bundle(copy)
    graph = copy / "vae_encoder" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"!")
    with pytest.raises(BundleError, match="was altered"):
        quantize_bundle(bundle, tmp_path / "out", ["a", "b"], calibrate=1)
    assert not (tmp_path / "out").exists()


@needs_int8
def test_a_form_that_was_altered_is_refused_by_whoever_opens_it(copy: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where nothing is compiled yet
    form = copy / "detector" / "int8.onnx"
    data = bytearray(form.read_bytes())
    data[-1] ^= 1
    form.write_bytes(data)
    bundle = open_bundle(copy)
    open_backend("onnxruntime", bundle, threads=1).stage("detector")  # does not read it
    for backend in BOTH:
        with pytest.raises(BundleError, match="int8.onnx was altered"):
            open_backend(backend, bundle, threads=1).stage("detector")
    with pytest.raises(BundleError, match="int8.onnx was altered"):
        Manifest.load(copy)


def test_only_graphs_whose_probes_vote_may_have_such_a_form(copy: Path) -> None:
    path = copy / MANIFEST
    graphs = Manifest.load(copy, verify="sizes").graphs
    assert graphs["detector"].int8 is not None
    text = (
        path.read_text()
        .replace('"detector_latent": {', '"unet_": {')
        .replace('"unet": {', '"detector_latent": {')
    )
    path.write_text(text.replace('"unet_": {', '"unet": {'))
    with pytest.raises(BundleError, match="unet has an int8 form"):
        open_bundle(copy)


def test_a_bundle_without_the_form_says_what_makes_it(shapes: Bundle) -> None:
    if not HAS_INT8:
        pytest.skip("this processor adds no products of bytes")
    for backend in BOTH:
        with pytest.raises(BundleError, match=r"no int8 form here; do: safelight quantize BUNDLE OUT"):
            open_backend(backend, shapes).stage("detector")


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("flags", [("avx2", "avx512f"), None])
def test_a_processor_that_cannot_add_bytes_is_refused(made, backend, flags, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(backends, "cpu_flags", lambda: flags)
    monkeypatch.setattr(backends, "machine", lambda: "x86_64")
    with pytest.raises(BackendUnavailable, match=f"{backend}: this processor is not known to have any of"):
        open_backend(backend, made)
    with pytest.raises(BackendUnavailable, match="is not known to have any of"):
        quantize_bundle(made, tmp_path / "out", CAPTIONS)
    monkeypatch.setattr(backends, "machine", lambda: "aarch64")
    open_backend(backend, made)


def test_the_command_quantizes_shapes_by_its_own_captions(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(
        main, ["quantize", "shapes", str(out), "--calibrate", "8", "--compare", "10", "--threads", "2"]
    )
    assert done.exit_code == 0, done.output
    assert "detector_latent" in done.output and "0 of 10 verdicts" in done.output
    shown = CliRunner().invoke(main, ["inspect", str(out)]).output
    assert shown.count("int8 form") == 2 and "products; 0 of 10 verdicts" in shown


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "was not made from shapes: give --prompts"),
        (("--prompts", "few.txt"), "2 different prompts are fewer than 48"),
        (("--prompts", "none.txt"), "none.txt"),
    ],
)
def test_a_wrong_call_is_one_sentence(more, said, copy, tmp_path, monkeypatch) -> None:
    manifest = Manifest.load(copy, verify="sizes")
    replace(manifest, source=replace(manifest.source, name="mine")).write(copy)
    monkeypatch.chdir(tmp_path)
    Path("few.txt").write_text("a dog\na cat\na dog\n")
    done = CliRunner().invoke(main, ["quantize", str(copy), "out", *more])
    assert done.exit_code == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not Path("out").exists()
