"""A bundle of a model folder with no graph written: all that the torch backend reads, without an export.

For measurements of full-size models on a GPU, whose ONNX files would take minutes to make and are not read.
No other backend can open it, and it is not verified.
"""

from pathlib import Path

from safelight.containment import list_files
from safelight.engine.bundle import Bundle
from safelight.engine.model_folder import ModelFolder
from safelight.export import bundle as exporting
from safelight.export.graphs import OPSET, Sizes, signature
from safelight.export.guards import defences, optional_graphs
from safelight.manifest import GRAPHS, FileEntry, GraphEntry, Manifest, Picture, Source
from safelight.new_folder import new_folder

_NOTHING = FileEntry("0" * 64, 0)


def bare_bundle(model: Path, target: Path) -> Bundle:
    """The bundle, its tokenizer and configurations copied to `target`. Raises as `export_bundle`."""
    folder = ModelFolder.open(model)
    with new_folder(target) as partial:
        exporting._copy_configurations(folder, partial)
        tokens, second = exporting._tokens(folder, partial)
        files = {name: exporting._entry(partial / name) for name in list_files(partial)}
    sizes = Sizes.read(folder, tokens.window)
    graphs = {
        name: GraphEntry(f"{name}/model.onnx", (), *signature(name, sizes))
        for name in (*GRAPHS, *optional_graphs(folder, sizes))
    }
    manifest = Manifest(
        files=files | {graph.path: _NOTHING for graph in graphs.values()},
        graphs=graphs,
        source=Source(folder.path.name, None, folder.digests()),
        precision="fp16-weights",
        opset=OPSET,
        scheduler=folder.config("scheduler"),
        one_step=folder.one_step(),
        tokens=tokens,
        picture=Picture(sizes.picture, sizes.latents, folder.scaling_factor()),
        checker=exporting._checker(folder, sizes),
        guidance_scale=exporting._guidance_scale(folder, None),
        distilled=True,
        defences=defences(folder),
        second_text=second,
    )
    return Bundle(target, manifest)
