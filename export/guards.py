"""The guards that a model folder may hold beside its pipeline, and the record of what was done to it.

Which optional graphs it can give, whether their networks fit the others, and its defences in words. Reads
configurations alone, and loads no network.
"""

from typing import Any

from safelight.containment import read_json
from safelight.engine.model_folder import ModelFolder
from safelight.errors import BundleError
from safelight.export.graphs import Sizes
from safelight.manifest import OPTIONAL_GRAPHS

RECORD = "defences.json"  # written by whatever trains, in the order in which it was done


def optional_graphs(folder: ModelFolder, sizes: Sizes) -> tuple[str, ...]:
    """The optional graphs whose parts the folder holds. Raises BundleError where a part does not fit the
    others.
    """
    channels, edge, _ = sizes.latents
    wanted: dict[str, dict[str, int]] = {
        "latent_checker": {"in_channels": channels, "sample_size": edge, "concepts": sizes.concepts},
        "redirector": {"width": sizes.width, "window": sizes.rows},
    }
    for part, lengths in wanted.items():
        config = folder.config(part) if folder.has(part) else lengths
        for key, length in lengths.items():
            if (got := config.get(key)) != length:
                raise BundleError(
                    f"{folder.path / part}/config.json: {key} must be {length}, as in the rest of the model; "
                    f"got {got!r}; train it on this model"
                )
    return tuple(graph for graph, part in OPTIONAL_GRAPHS.items() if folder.has(part))


def defences(folder: ModelFolder) -> tuple[str, ...]:
    """What was done to the model, in order, such as "sdd: star, pentagram"; nothing where it has no record.

    Raises BundleError for a record that is none.
    """
    path = folder.path / RECORD
    if not path.exists():
        return ()
    found: Any = read_json(path).get("defences")
    if not isinstance(found, list) or not all(_is_entry(entry) for entry in found):
        raise BundleError(f"{path} is not a list of defences; restore the file, or delete it")
    return tuple(
        ": ".join(filter(None, (entry["method"], ", ".join(entry.get("concepts", ()))))) for entry in found
    )


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("method"), str):
        return False
    concepts = entry.get("concepts", [])
    return isinstance(concepts, list) and all(isinstance(concept, str) for concept in concepts)
