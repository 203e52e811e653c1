"""The inputs that a detector makes of prompts, without running its graph. Knows no runtime."""

from collections.abc import Mapping

import numpy as np

from safelight.engine.backends import Array, Stage, axes_of, shape_of
from safelight.engine.bundle import Bundle
from safelight.engine.detect import Detector
from safelight.engine.probe_model import CheckerKind
from safelight.errors import ExportError
from safelight.manifest import GraphEntry


class _Recorder:
    """A backend and its one stage, which keeps what it is given and answers that nothing was seen."""

    device, lanes = "recorder", 1

    def __init__(self, bundle: Bundle) -> None:
        self._graphs = bundle.manifest.graphs
        self.kept: list[dict[str, Array]] = []
        self.spec: GraphEntry

    def stage(self, graph: str) -> Stage:
        """See `Backend`."""
        self.spec = self._graphs[graph]
        return self

    def plan(self, **axes: int) -> None:
        """See `Stage`."""

    def run(
        self, inputs: Mapping[str, Array], *, deadline: float | None = None, lane: int = 0
    ) -> dict[str, Array]:
        """See `Stage`."""
        self.kept.append({name: np.array(value) for name, value in inputs.items()})
        axes = axes_of(self.spec, inputs)
        blank = {item.name: np.zeros(shape_of(item, axes), item.dtype) for item in self.spec.outputs}
        return blank | {"finite": np.ones_like(blank["finite"])}

    def close(self) -> None:
        """See `Stage`."""


def record(bundle: Bundle, prompts: Mapping[int, str], checker: CheckerKind) -> list[dict[str, Array]]:
    """The inputs of the graph by which `checker` (`image`, `latent`) looks at the probes: those of each
    prompt, by its seed, in one run or several. Raises ExportError for a prompt that cannot be screened.
    """
    recorder = _Recorder(bundle)
    probe = bundle.manifest.probe
    with Detector(bundle, recorder, probe, checker=checker, early_exit=False) as detector:
        for seed, prompt in prompts.items():
            verdict = detector.check(prompt, seed=seed)
            if verdict.reason is not None:  # the recorder saw nothing, so this is an error
                raise ExportError(f"{prompt!r} gave {verdict.reason} ({verdict.detail}); leave it out")
    return recorder.kept
