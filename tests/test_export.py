"""Export: what a bundle holds, that nothing is left of one that failed, and what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from safelight.cli import main
from safelight.containment import digest
from safelight.engine.eager import load_graph
from safelight.engine.model_folder import ModelFolder
from safelight.errors import BundleError, ExportError
from safelight.export import bundle as exporting
from safelight.export import verify as verifying
from safelight.export import weights
from safelight.export.bundle import export_bundle
from safelight.export.graphs import Sizes, trace
from safelight.export.synth import synth
from safelight.manifest import GRAPHS, MANIFEST, Manifest
from safelight.schedule import NoiseSchedule

FEW = ("text_encoder", "safety_checker")
AXES = {
    "input_ids": ("requests", 32),
    "rotate_mask": ("requests", 32),
    "prompt_u": ("requests", "probes", 32, 64),
    "prompt_v": ("requests", "probes", 32, 64),
    "angle": ("requests", "probes"),
    "phase": ("requests", "probes"),
    "latents": ("requests", "probes", 4, 8, 8),
    "need": ("requests",),
    "margins": ("requests", "probes", 17),
    "flagged": ("requests", "probes"),
    "finite": ("requests", "probes"),
    "score": ("requests",),
    "blocked": ("requests",),
    "images": ("requests", "probes", 3, 64, 64),
}


def only_few(patch: pytest.MonkeyPatch) -> None:
    """Make a bundle of two graphs count as whole, since tracing all six takes most of a minute."""
    patch.setattr(exporting, "GRAPHS", FEW)
    patch.setattr("safelight.manifest.REQUIRED_GRAPHS", FEW)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    only_few(monkeypatch)


@pytest.fixture(scope="module")
def turbo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest, str]:
    """A turbo model by the command line: fp32, weights beside the graphs, into an empty folder."""
    model = synth("tiny-sd-turbo", tmp_path_factory.mktemp("models") / "turbo")
    config = model / "safety_checker" / "config.json"
    named = json.loads(config.read_text()) | {"concept_names": [f"star {index}" for index in range(17)]}
    config.write_text(json.dumps(named))
    bundle = tmp_path_factory.mktemp("bundle") / "empty"
    bundle.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        only_few(patch)
        patch.setattr(weights, "EXTERNAL_BYTES", 0)
        result = CliRunner().invoke(main, ["export", str(model), str(bundle), "--precision", "fp32"])
        assert result.exit_code == 0, result.output
        return bundle, Manifest.load(bundle), result.stdout


def change(model: Path, file: str, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite a weights file of a copied model."""
    tensors = load_file(model / file)
    edit(tensors)
    save_file(tensors, model / file, metadata={"format": "pt"})


def copy_of(model: Path, folder: Path) -> Path:
    """A copy of the model to spoil, in a folder of its own."""
    return Path(shutil.copytree(model, folder / "model"))


def test_every_graph_has_the_declared_tensors(tiny_bundle: Path) -> None:
    manifest = Manifest.load(tiny_bundle)
    assert tuple(manifest.graphs) == tuple(sorted(GRAPHS))
    for name, entry in manifest.graphs.items():
        assert (entry.path, entry.external) == (f"{name}/model.onnx", ())
        graph = onnx.load(tiny_bundle / entry.path).graph
        for specs, values in ((entry.inputs, graph.input), (entry.outputs, graph.output)):
            assert [spec.name for spec in specs] == [value.name for value in values]
            for spec, value in zip(specs, values, strict=True):
                tensor = value.type.tensor_type
                assert spec.axes == tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim)
                assert np.dtype(spec.dtype) == onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        named = {
            axis for spec in (*entry.inputs, *entry.outputs) for axis in spec.axes if isinstance(axis, str)
        }
        assert named == ({"requests", "probes"} if name == "detector" else {"batch"})


def test_the_detector_takes_what_its_reference_takes(tiny_bundle: Path) -> None:
    entry = Manifest.load(tiny_bundle).graphs["detector"]
    assert {spec.name: spec.axes for spec in (*entry.inputs, *entry.outputs)} == AXES
    assert [spec.name for spec in (*entry.inputs, *entry.outputs)] == list(AXES)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_is_standard_and_says_nothing_of_its_maker(tiny_bundle: Path, name: str) -> None:
    model = onnx.load(tiny_bundle / name / "model.onnx")
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 20)]
    assert {node.domain for node in model.graph.node} == {""} and len(model.functions) == 0
    assert model.ir_version <= 10  # what ONNX Runtime 1.20 reads
    notes = [
        item for node in model.graph.node for item in (*node.metadata_props, *filter(None, [node.doc_string]))
    ]
    assert notes == [] and b"site-packages" not in (tiny_bundle / name / "model.onnx").read_bytes()


def test_the_manifest_says_what_the_model_is(tiny_bundle: Path, tiny_model: Path) -> None:
    manifest = Manifest.load(tiny_bundle)
    vocabulary = json.loads((tiny_model / "tokenizer" / "vocab.json").read_text())
    tokens = manifest.tokens
    assert (tokens.window, tokens.bos, tokens.eos) == (
        32,
        vocabulary["<|startoftext|>"],
        vocabulary["<|endoftext|>"],
    )
    assert tokens.pad == tokens.eos
    picture, checker = manifest.picture, manifest.checker
    assert (picture.size, picture.latents, picture.scaling_factor) == (64, (4, 8, 8), 0.9)
    assert checker.size == 48 and checker.mean[0] == 0.48145466 and checker.std[2] == 0.27577711
    assert checker.concepts == tuple(f"concept {index}" for index in range(17)) and len(checker.special) == 3
    assert (manifest.precision, manifest.opset, manifest.guidance_scale) == ("fp16-weights", 20, 7.5)
    assert manifest.calibration is None and manifest.source.name == tiny_model.name
    files = sorted(tiny_model.rglob("*.safetensors"))
    assert manifest.source.weights == {
        file.relative_to(tiny_model).as_posix(): digest(file) for file in files
    }
    config = json.loads((tiny_model / "scheduler" / "scheduler_config.json").read_text())
    assert manifest.scheduler == config
    assert manifest.one_step == NoiseSchedule.from_config(config).one_step()


def test_the_verification_is_in_the_manifest(tiny_bundle: Path) -> None:
    rows = Manifest.load(tiny_bundle).verification
    assert {row.graph for row in rows} == set(GRAPHS) and all(row.ok for row in rows)


def test_nothing_but_the_bundle_is_left(tiny_bundle: Path) -> None:
    files = {path.relative_to(tiny_bundle).as_posix() for path in tiny_bundle.rglob("*") if path.is_file()}
    assert files == {*Manifest.load(tiny_bundle).files, MANIFEST}
    assert list(tiny_bundle.parent.iterdir()) == [tiny_bundle]


def test_a_turbo_model_takes_no_guidance(turbo: tuple[Path, Manifest, str]) -> None:
    bundle, manifest, stdout = turbo
    assert stdout == f"{bundle}\n"
    assert (manifest.guidance_scale, manifest.precision) == (1.0, "fp32")
    vocabulary = json.loads((bundle / "tokenizer" / "vocab.json").read_text())
    assert manifest.tokens.pad == vocabulary["!"] != manifest.tokens.eos
    assert manifest.checker.concepts[3] == "star 3"


@pytest.mark.usefixtures("few")
def test_weights_beside_the_graph_are_named_and_needed(
    turbo: tuple[Path, Manifest, str], tmp_path: Path
) -> None:
    bundle, manifest, _ = turbo
    for name, entry in manifest.graphs.items():
        assert entry.external == (f"{name}/model.onnx_data",)
        graph = onnx.load(bundle / entry.path, load_external_data=False).graph
        outside = [tensor for tensor in graph.initializer if tensor.external_data]
        assert {
            item.value for tensor in outside for item in tensor.external_data if item.key == "location"
        } == {"model.onnx_data"}
        assert (bundle / entry.external[0]).stat().st_size > 3 * (bundle / entry.path).stat().st_size
    cut = Path(shutil.copytree(bundle, tmp_path / "cut"))
    (cut / "text_encoder" / "model.onnx_data").unlink()
    with pytest.raises(BundleError, match="text_encoder/model.onnx_data is missing"):
        Manifest.load(cut)


def test_large_tensors_beside_the_graph_are_aligned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "EXTERNAL_BYTES", 0)
    held = [np.full(size, number, np.float32) for number, size in enumerate((700_000, 5, 700_001))]
    values = [ir.Value(name=f"w{number}", const_value=ir.tensor(array)) for number, array in enumerate(held)]
    node = ir.node("Concat", values, {"axis": 0})
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=values, opset_imports={"": 20}, name="g")
    assert weights.save(ir.Model(graph, ir_version=10), tmp_path / "model.onnx") == ("model.onnx_data",)
    saved = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer
    outside = [{item.key: item.value for item in tensor.external_data} for tensor in saved]
    assert [int(entry.get("offset", -1)) % 65536 for entry in outside] == [
        0,
        65535,
        0,
    ]  # the small one is inside
    assert np.array_equal(onnx.numpy_helper.to_array(saved[2], str(tmp_path)), held[2])


def test_half_precision_changes_the_size_and_no_output(tiny_model: Path, tmp_path: Path) -> None:
    sizes = Sizes.read(ModelFolder.open(tiny_model), 32)
    model = trace(load_graph(tiny_model, "text_encoder"), "text_encoder", sizes)
    ids = np.arange(96, dtype=np.int64).reshape(3, 32)
    found = []
    for name in ("whole", "half"):
        if name == "half":
            weights.store_as_half(model)
        weights.save(model, tmp_path / name / "model.onnx")
        session = ort.InferenceSession(tmp_path / name / "model.onnx", providers=["CPUExecutionProvider"])
        found.append(session.run(None, {"input_ids": ids}))
    whole, half = ((tmp_path / name / "model.onnx").stat().st_size for name in ("whole", "half"))
    assert half < 0.6 * whole
    for one, other in zip(*found, strict=True):
        assert np.array_equal(one, other)


def test_only_what_half_precision_holds_is_stored_so() -> None:
    size = weights.SMALLEST
    held = {
        "exact": np.arange(size, dtype=np.float32),
        "inexact": np.full(size, 0.1, np.float32),
        "huge": np.full(size, 1e6, np.float32),
        "small": np.zeros(size - 1, np.float32),
        "index": np.arange(size),
    }
    values = [ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in held.items()]
    node = ir.node("Concat", values[:4], {"axis": 0})
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=values, opset_imports={"": 20}, name="g")
    weights.store_as_half(ir.Model(graph, ir_version=10))
    stored = {name: value.const_value.dtype.name for name, value in graph.initializers.items()}
    assert stored == {
        "exact": "FLOAT16",
        "inexact": "FLOAT",
        "huge": "FLOAT",
        "small": "FLOAT",
        "index": "INT64",
    }
    assert [item.name for item in node.inputs] == ["exact.float32", "inexact", "huge", "small"]


def test_rounding_to_half_is_exact_or_refused() -> None:
    layer = torch.nn.Linear(3, 3)
    layer.weight.data.fill_(0.1)
    assert torch.equal(
        weights.round_to_half(layer, "layer").weight.data, torch.full((3, 3), 0.1).half().float()
    )
    layer.bias.data.fill_(1e5)
    with pytest.raises(ExportError, match=r"layer: the weights bias exceed float16; .* --precision fp32"):
        weights.round_to_half(layer, "layer")


@pytest.mark.usefixtures("few")
def test_a_float32_model_is_rounded_and_verified_as_such(tiny_model: Path, tmp_path: Path) -> None:
    """What half precision cannot hold is rounded, in the graph and in the reference it is held against."""
    model = copy_of(tiny_model, tmp_path)

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({key: value.float() * 1.0001 for key, value in tensors.items()})

    change(model, "text_encoder/model.safetensors", widen)
    manifest = export_bundle(model, tmp_path / "bundle", guidance_scale=2)
    assert manifest.guidance_scale == 2.0
    stored = onnx.load(tmp_path / "bundle" / "text_encoder" / "model.onnx").graph.initializer
    table = next(tensor for tensor in stored if "token_embedding" in tensor.name)
    assert table.data_type == onnx.TensorProto.FLOAT16


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(("kind", "fault"), [("differs", ExportError), ("ctrl-c", KeyboardInterrupt)])
def test_a_failed_export_leaves_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, fault: type[BaseException]
) -> None:
    monkeypatch.setattr(exporting, "GRAPHS", FEW[:1])
    monkeypatch.setattr(verifying, "TOLERANCE", verifying.TOLERANCE | {"text_encoder": -1.0})
    seen = []

    def progress(line: str) -> None:
        seen.append([path.name for path in tmp_path.iterdir()])
        if kind == "ctrl-c" and "MB" in line:
            raise KeyboardInterrupt

    with pytest.raises(fault, match="text_encoder at batch 1 differs" if kind == "differs" else None):
        export_bundle(tiny_model, tmp_path / "bundle", progress=progress)
    assert list(tmp_path.iterdir()) == []
    assert any(names and names != ["bundle"] for names in seen), "nothing was being written"


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        ("text_encoder", "encoder.layers.1.mlp.fc1.bias"),
        ("safety_checker", "concept_embeds_weights"),
    ],
)
def test_weights_that_are_not_finite_are_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, tensor: str
) -> None:
    monkeypatch.setattr(exporting, "GRAPHS", (part,))
    model = copy_of(tiny_model, tmp_path)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        name = next(key for key in tensors if key.endswith(tensor))
        tensors[name].view(-1)[-1] = torch.nan

    change(model, f"{part}/model.safetensors", spoil)
    with pytest.raises(ExportError, match=rf"{part}: the weights .*{re.escape(tensor)} are not all finite"):
        export_bundle(model, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == [model]


def test_a_target_that_holds_something_is_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for taken in (tmp_path / "folder" / "note.txt", tmp_path / "file"):
        taken.write_text("mine")
    for target in (tmp_path / "folder", tmp_path / "file"):
        with pytest.raises(ExportError, match=f"{target.name} exists and is not an empty folder"):
            export_bundle(tiny_model, target)
    assert (tmp_path / "folder" / "note.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def _no_checker(model: Path) -> None:
    index = json.loads((model / "model_index.json").read_text()) | {"safety_checker": [None, None]}
    (model / "model_index.json").write_text(json.dumps(index))


def _no_checker_folder(model: Path) -> None:
    shutil.rmtree(model / "safety_checker")


def _sdxl(model: Path) -> None:
    index = json.loads((model / "model_index.json").read_text()) | {
        "_class_name": "StableDiffusionXLPipeline"
    }
    (model / "model_index.json").write_text(json.dumps(index))


def _pickle(model: Path) -> None:
    (model / "unet" / "diffusion_pytorch_model.safetensors").rename(
        model / "unet" / "diffusion_pytorch_model.bin"
    )


def _no_merges(model: Path) -> None:
    (model / "tokenizer" / "merges.txt").unlink()


def _no_end_token(model: Path) -> None:
    config = json.loads((model / "tokenizer" / "tokenizer_config.json").read_text()) | {"eos_token": "<end>"}
    (model / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))


def _few_names(model: Path) -> None:
    config = json.loads((model / "safety_checker" / "config.json").read_text()) | {
        "concept_names": ["a star"]
    }
    (model / "safety_checker" / "config.json").write_text(json.dumps(config))


def _other_text(model: Path) -> None:
    config = json.loads((model / "unet" / "config.json").read_text()) | {"cross_attention_dim": 96}
    (model / "unet" / "config.json").write_text(json.dumps(config))


def _oblong(model: Path) -> None:
    config = json.loads((model / "unet" / "config.json").read_text()) | {"sample_size": [8, 16]}
    (model / "unet" / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_checker, "model_index.json names no safety_checker, and nothing runs without"),
        (_no_checker_folder, "safety_checker is missing"),
        (_sdxl, "SDXL class .* are not supported"),
        (_pickle, "diffusion_pytorch_model.bin may hold a pickle and is never read"),
        (_no_merges, "merges.txt is missing"),
        (_no_end_token, "vocab.json lacks the eos_token '<end>'"),
        (_few_names, "concept_names must be 17 names; got"),
        (_other_text, "unet/config.json: cross_attention_dim must be 64; got 96"),
        (_oblong, r"sample_size must be one number, the edge of square latents; got \[8, 16\]"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(
    tiny_model: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    model = copy_of(tiny_model, tmp_path)
    spoil(model)
    with pytest.raises(BundleError, match=message):
        export_bundle(model, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"precision": "int4"}, "precision must be one of"),
        ({"guidance_scale": -1.0}, "guidance_scale must be finite and at least 0; got -1.0"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be finite"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_read(
    tiny_model: Path, tmp_path: Path, keywords: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        export_bundle(tiny_model, tmp_path / "bundle", **keywords)
    assert list(tmp_path.iterdir()) == []
