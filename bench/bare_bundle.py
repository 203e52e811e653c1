"""A bundle of a model folder whose graphs are empty files: all that the torch backend reads, with no export.

For full-size models on a GPU, whose ONNX files would take minutes to make and are not read. Every other
backend refuses its graphs, and it is not verified.
"""

from pathlib import Path

from safelight.engine.bundle import Bundle
from safelight.engine.model_folder import ModelFolder
from safelight.export.bundle import draft_manifest, source_of
from safelight.export.graphs import Sizes, signature
from safelight.manifest import GraphEntry
from safelight.new_folder import new_folder


def bare_bundle(model: Path, target: Path, *, guidance_scale: float | None = None) -> Bundle:
    """The bundle, its tokenizer and configurations copied to `target`; `guidance_scale` as for
    `export_bundle`, and raises as that.
    """
    folder = ModelFolder.open(model)
    with new_folder(target) as partial:

        def write(name: str, sizes: Sizes) -> GraphEntry:
            (partial / name).mkdir()
            (partial / name / "model.onnx").touch()
            return GraphEntry(f"{name}/model.onnx", (), *signature(name, sizes))

        manifest = draft_manifest(
            folder,
            partial,
            write,
            precision="fp16-weights",
            guidance_scale=guidance_scale,
            source=source_of(folder),
        )
        manifest.write(partial)
    return Bundle(target, manifest)
