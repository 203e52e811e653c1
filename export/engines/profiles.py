"""The optimisation profiles of each graph, declared: which lengths of its named axes an engine is built for.

A batch of `--batch` makes one bucket, from the batch before it (or 1) to itself, tuned for itself. Where it
follows directly, the bucket is static. A detector's buckets count probes, and hold requests up to the largest
batch in all.
"""

from safelight.engine.detect import ROWS
from safelight.engine.engines.profile import Bucket, Lengths
from safelight.engine.looks import PIECE
from safelight.errors import BundleError
from safelight.manifest import GraphEntry, Manifest

MOST = 1024  # rows in one run
TEXTS = 3  # that guidance asks the denoiser about at once: none, the redirected one, the prompt
DETECTORS = ("detector", "detector_latent")


def usual_batches(manifest: Manifest, graph: str) -> tuple[int, ...]:
    """What the library itself asks a graph for: one row, the probes of one request, and the most of a run."""
    _, height, width = manifest.picture.latents
    rows, count = max(1, ROWS * 64 // (height * width)), manifest.probe.count
    if graph in DETECTORS:
        return tuple(sorted({1, min(count, rows), rows}))
    return tuple(sorted({1, count, max(count, PIECE, TEXTS * rows)}))


def profile(entry: GraphEntry, batches: tuple[int, ...], *, static: bool = False) -> tuple[Bucket, ...]:
    """The buckets of a graph, one per batch. `static` takes each batch alone, and one request.

    Raises ValueError for batches that are not ascending within [1, 1024], and BundleError for an axis that no
    profile is declared for.
    """
    if not batches or list(batches) != sorted(set(batches)) or not 1 <= batches[0] <= batches[-1] <= MOST:
        raise ValueError(f"batches must ascend from 1 to at most {MOST}; got {list(batches)}")
    named = {axis for tensor in entry.inputs for axis in tensor.axes if isinstance(axis, str)}
    if named not in ({"batch"}, {"requests", "probes"}):
        raise BundleError(
            f"{entry.path}: no profile is declared for the axes {sorted(named)}; export the bundle again"
        )
    buckets = []
    for before, batch in zip((0, *batches), batches, strict=False):
        rows = Lengths(batch if static else before + 1, batch, batch)
        if named == {"batch"}:
            buckets.append(Bucket({"batch": rows}))
        else:
            together = Lengths(1, 1, 1 if static else batches[-1] // batch)
            buckets.append(Bucket({"requests": together, "probes": rows}))
    return tuple(buckets)
