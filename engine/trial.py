"""One run of a small shipped graph on a backend: what `doctor` calls usable has run. Measures nothing."""

import numpy as np

from safelight.engine.backends import open_backend, shape_of
from safelight.engine.bundle import open_bundle
from safelight.errors import SafelightError

GRAPH = "vae_decoder"


def run(backend: str) -> str:
    """Where the graph ran, in the stage's own words. Raises what the backend raises, and SafelightError for
    an answer that is not a number.
    """
    stage = open_backend(backend, open_bundle("shapes"), threads=1).stage(GRAPH)
    axes = {"batch": 1}
    stage.plan(**axes)
    inputs = {item.name: np.zeros(shape_of(item, axes), item.dtype) for item in stage.spec.inputs}
    found = stage.run(inputs)
    if not all(np.isfinite(value).all() for value in found.values()):
        raise SafelightError(f"{backend}: answers with values that are not finite; use another backend")
    return stage.device
