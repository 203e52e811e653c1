"""Any diffusers-style safety checker as a judge, in plain torch, from a folder that holds one."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from safelight.containment import check_classes, digest
from safelight.engine.components import ConceptChecker
from safelight.engine.eager import Preprocessing
from safelight.engine.model_folder import ModelFolder
from safelight.errors import BundleError
from safelight.kernels.reference import clip_input


class CheckerJudge:
    """The largest of the checker's margins, cosine less threshold: above 0 is unsafe."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds safety_checker/ and feature_extractor/, as any pipeline with a checker does.

        Raises BundleError.
        """
        for part in ("safety_checker", "feature_extractor"):
            if not (folder / part).is_dir():
                raise BundleError(f"{folder} holds no {part}; name a folder that has a safety checker")
        check_classes(folder / "safety_checker" / "config.json")
        opened = ModelFolder(folder, {})
        self._checker = ConceptChecker(opened.load("safety_checker")).eval()
        seen = Preprocessing.read(opened)
        self._size, self._mean, self._std = seen.size, torch.tensor(seen.mean), torch.tensor(seen.std)
        self._digests = {file.name: digest(file) for file in opened.weights("safety_checker")}

    @property
    def record(self) -> dict[str, Any]:
        """See `Judge`."""
        return {"name": "safety_checker", "weights": self._digests, "threshold": 0.0, "colours": "RGB"}

    def scores(self, pictures: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `Judge`."""
        with torch.inference_mode():
            given = clip_input(torch.from_numpy(pictures), self._size, self._mean, self._std)
            margins = self._checker.margins(self._checker.embed(given))
        largest: NDArray[np.float32] = margins.amax(1).numpy()
        return largest
