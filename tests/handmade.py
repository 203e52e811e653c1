"""A bundle made by hand: real ONNX graphs of one node, the files that every bundle has, and a manifest over
them.

Tests run this file (`runpy`) since test modules cannot import one another.
"""

import json
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from safelight.containment import digest, list_files
from safelight.manifest import (
    MANIFEST,
    Checker,
    FileEntry,
    GraphEntry,
    Manifest,
    Picture,
    Row,
    Source,
    TensorSpec,
    Tokens,
)
from safelight.schedule import NoiseSchedule

GRAPHS = ("safety_checker", "detector", "text_encoder", "unet")
SCHEDULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
FILES = {
    "tokenizer/vocab.json": {"a": 0, "b": 1},
    "tokenizer/merges.txt": "#version: 0.2\n",
    "tokenizer/tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer"},
    "scheduler/scheduler_config.json": SCHEDULER,
    "feature_extractor/preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor"},
}


def model(*nodes, weights=(), opsets=(("", 20),), functions=()):
    """An ONNX model x -> y, float32 (n, 4); y = x + w where no nodes are given."""
    weights = weights or [helper.make_tensor("w", TensorProto.FLOAT, [4], [1.0, 2.0, 3.0, 4.0])]
    graph = helper.make_graph(
        list(nodes) or [helper.make_node("Add", ["x", "w"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        initializer=list(weights),
    )
    imports = [helper.make_opsetid(*opset) for opset in opsets]
    return helper.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=10)


def external_tensor(location, name="w"):
    """A float32 tensor (4,) whose data lies at `location`."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def manifest_of(folder, **changes):
    """The manifest of everything but notes that lies in `folder`; weights may lie beside a graph."""
    names = [name for name in list_files(folder) if name != MANIFEST and not name.endswith(".md")]
    axes = {name: (TensorSpec(name, "float32", ("n", 4)),) for name in "xy"}
    values = {
        "files": {name: FileEntry(digest(folder / name), (folder / name).stat().st_size) for name in names},
        "graphs": {
            name: GraphEntry(
                f"{name}/model.onnx",
                (f"{name}/model.onnx_data",) if f"{name}/model.onnx_data" in names else (),
                axes["x"],
                axes["y"],
            )
            for name in GRAPHS
        },
        "source": Source("models/tiny", "a1b2", {"unet/model.safetensors": "0" * 64}),
        "precision": "fp32",
        "opset": 20,
        "scheduler": SCHEDULER,
        "one_step": NoiseSchedule.from_config(SCHEDULER).one_step(),
        "tokens": Tokens(32, 718, 719, 719),
        "picture": Picture(64, (4, 8, 8), 0.9),
        "checker": Checker(48, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), ("star",), ()),
        "verification": (Row("unet", "n=1", 1e-7, 1e-5, True),),
        "created_by": "a test",
    }
    return Manifest(**(values | changes))


def build(folder, **changes):
    """Write a bundle into `folder` and return its manifest."""
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    for name in GRAPHS:
        (folder / name).mkdir()
        made = model(weights=[external_tensor("model.onnx_data")]) if name == "unet" else model()
        onnx.save(made, folder / name / "model.onnx")
    (folder / "unet" / "model.onnx_data").write_bytes(bytes(16))
    (folder / "README.md").write_text("A note beside the parts.\n")
    return seal(folder, **changes)


def seal(folder, **changes):
    """Write a manifest over what lies in `folder` now, as an attacker with write access would."""
    made = manifest_of(folder, **changes)
    made.write(folder)
    return made


def edit(folder, change):
    """Apply `change` to the manifest's plain values, as an attacker with a text editor would."""
    values = plain(folder)
    change(values)
    (folder / MANIFEST).write_text(json.dumps(values))


def plain(folder: Path) -> dict:
    """The manifest of `folder` as plain values."""
    return json.loads((folder / MANIFEST).read_text())
