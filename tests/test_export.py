"""Export: what a bundle holds, that nothing is left of one that failed, and what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from safelight.cli import main
from safelight.containment import digest
from safelight.engine.model_folder import ModelFolder
from safelight.errors import BundleError, ExportError, SafelightError
from safelight.export import bundle as exporting
from safelight.export import verify as verifying
from safelight.export import weights
from safelight.export.bundle import export_bundle
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


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_a_graph_whose_values_are_not_finite_is_not_written(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """Weights that verification alone sees: NaN that the check of the weights missed, and a finite one that
    overflows on its way.
    """
    monkeypatch.setattr(exporting, "GRAPHS", FEW[:1])
    if value != value:
        monkeypatch.setattr(exporting, "check_finite", lambda *_: None)
    model = copy_of(tiny_model, tmp_path)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({key: tensor.float() for key, tensor in tensors.items()})
        tensors["final_layer_norm.weight"][-1] = value

    change(model, "text_encoder/model.safetensors", spoil)
    arguments = ["export", str(model), str(tmp_path / "bundle"), "--precision", "fp32"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and list(tmp_path.iterdir()) == [model]
    assert "text_encoder at batch 1 gives values that are not finite; nothing was written" in result.stderr


def test_a_target_that_holds_something_is_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for taken in (tmp_path / "folder" / "note.txt", tmp_path / "file"):
        taken.write_text("mine")
    for target in (tmp_path / "folder", tmp_path / "file"):
        with pytest.raises(SafelightError, match=f"{target.name} exists and is not an empty folder"):
            export_bundle(tiny_model, target)
    assert (tmp_path / "folder" / "note.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"safety_checker": [None, None]}, "names no safety_checker, and nothing runs"),
        (
            "model_index.json",
            {"_class_name": "StableDiffusionXLPipeline"},
            "lacks a text_encoder_2; use a whole",
        ),
        (
            "tokenizer/special_tokens_map.json",
            {"eos_token": "<end>"},
            "vocab.json lacks the eos_token '<end>'",
        ),
        ("safety_checker/config.json", {"concept_names": ["a star"]}, "concept_names must be 17 names; got"),
        ("unet/config.json", {"cross_attention_dim": 96}, "cross_attention_dim must be 64; got 96"),
        (
            "unet/config.json",
            {"sample_size": [8, 16]},
            r"sample_size must be one whole number; got \[8, 16\]",
        ),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(
    tiny_model: Path, tmp_path: Path, file: str, changes: dict, message: str
) -> None:
    model = copy_of(tiny_model, tmp_path)
    (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | changes))
    with pytest.raises(BundleError, match=message):
        export_bundle(model, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == [model]


UNET = "unet/diffusion_pytorch_model"


@pytest.mark.parametrize(
    ("file", "becomes", "message"),
    [
        ("safety_checker", "elsewhere", "safety_checker is missing"),
        ("tokenizer/merges.txt", "elsewhere", "merges.txt is missing"),
        (f"{UNET}.safetensors", f"{UNET}.bin", f"{UNET}.bin may hold a pickle and is never read"),
    ],
)
def test_a_missing_part_is_refused(
    tiny_model: Path, tmp_path: Path, file: str, becomes: str, message: str
) -> None:
    model = copy_of(tiny_model, tmp_path)
    (model / file).rename(model / becomes)
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


def test_a_tokenizer_of_one_file_is_read_like_the_older_three(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    model = copy_of(tiny_model, tmp_path)
    CLIPTokenizer.from_pretrained(tiny_model / "tokenizer").save_pretrained(model / "tokenizer")
    kept = {name: (model / "tokenizer" / name).read_text() for name in ("vocab.json", "merges.txt")}
    for name in kept:
        (model / "tokenizer" / name).unlink()
    (tmp_path / "out").mkdir()
    exporting._copy_configurations(ModelFolder.open(model), tmp_path / "out")
    found = {name: (tmp_path / "out" / "tokenizer" / name).read_text() for name in kept}
    assert json.loads(found["vocab.json"]) == json.loads(kept["vocab.json"])
    assert found["merges.txt"].split() == kept["merges.txt"].split()
    (model / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match="vocab.json is missing, and so is tokenizer.json"):
        exporting._copy_configurations(ModelFolder.open(model), tmp_path / "out")
