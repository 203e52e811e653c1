"""The generator: detection, then the full model, then the image checker. What any of them blocks is not
shown.
"""

import math
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safelight.engine.backends import Backend, open_backend
from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.detect import Detector
from safelight.engine.guidance import Redirection, SafeCFG
from safelight.engine.looks import PictureChecker
from safelight.engine.sampler import Trajectory, open_sampler
from safelight.engine.tally import Tally
from safelight.engine.tokenizer import open_tokenizer
from safelight.errors import SafelightError
from safelight.kernels.philox import Stream, normals, split_seed
from safelight.probe import ProbeConfig
from safelight.schedule import Solver
from safelight.verdict import Verdict

ONE_LOOK = ProbeConfig(count=1, angle_rad=0.0, threshold=1.0)  # a finished image is looked at once


@dataclass(frozen=True, slots=True)
class Generation:
    """What became of a request: `image` uint8 (H, W, 3), or None where `verdict` or `image_verdict` is
    blocked.

    `image_verdict` is None where the request was blocked and nothing was generated. `harmfulness`, of dynamic
    SafeCFG alone, is how far the redirected branch lay from the empty prompt's: root mean square, mean over
    the steps.
    """

    image: NDArray[np.uint8] | None
    verdict: Verdict
    image_verdict: Verdict | None
    timings_ms: dict[str, float]
    harmfulness: float | None = None


class Generator:
    """Generates images with one bundle, each request screened before and each image after. Threads take
    turns.

    `Generator.open` makes one; it is a context manager.
    """

    def __init__(self, bundle: Bundle, backend: Backend, detector: Detector, *, owned: bool) -> None:
        """The parts; `owned` says whether closing the generator closes the detector."""
        manifest = bundle.manifest
        self.bundle = bundle
        self._bundle_id = manifest.bundle_id
        self.detector = detector
        self._owned = owned
        self._tokenizer = open_tokenizer(bundle)
        self._sampler = open_sampler(backend, manifest)
        self._checker = PictureChecker(backend.stage("safety_checker"), manifest.checker)
        self._redirection = (
            Redirection(backend.stage("redirector")) if "redirector" in manifest.graphs else None
        )
        self._free = self._sampler.free(self._tokenizer)
        self._closed = False
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        bundle: str | Path | Bundle = "shapes",
        *,
        backend: str | None = None,
        detector: Detector | None = None,
        model: str | Path | None = None,
        threads: int | None = None,
        device: str | None = None,
        precision: str | None = None,
        compiled: bool = False,
        kernels: str | Path | None = None,
    ) -> "Generator":
        """Open a bundle on a backend, `onnxruntime` where none is named. Without `detector` one is opened
        with it, on the same runtime, with the bundle's own settings, and on the generator's own graphs where
        the model is its own one-step model and the backend can share them.

        A detector that is given must be of the same bundle, and stays the caller's to close; where no backend
        is named the generator runs on the detector's, and shares what that has loaded. The rest is as for
        `Detector.open`. Raises as that does.
        """
        opened = open_bundle(bundle)
        if detector is not None and detector.bundle_id != opened.manifest.bundle_id:
            raise ValueError(
                f"the detector is of bundle {detector.bundle_id}, not {opened.manifest.bundle_id}; open both "
                "on one bundle"
            )
        place: dict[str, Any] = {
            "model": None if model is None else Path(model),
            "threads": threads,
            "device": device,
            "precision": precision,
            "compiled": compiled,
            "kernels": None if kernels is None else Path(kernels),
        }
        if detector is None:
            guard = Detector.open(opened, backend=backend or "onnxruntime", by_component=None, **place)
            return cls(opened, guard.backend, guard, owned=True)
        if backend is not None:
            return cls(opened, open_backend(backend, opened, **place), detector, owned=False)
        if given := [name for name, value in place.items() if value]:
            raise ValueError(
                f"{', '.join(given)}: says where another backend than the detector's runs; name that backend"
            )
        return cls(opened, detector.backend, detector, owned=False)

    def generate(
        self,
        prompt: str,
        *,
        steps: int = 25,
        guidance_scale: float | None = None,
        guidance: SafeCFG | None = None,
        solver: Solver | None = None,
        seed: int | None = None,
        probe_seed: int | None = None,
    ) -> Generation:
        """Screen a prompt and, where it passes, generate one image and check it.

        `guidance_scale` in diffusers' convention and `solver` (`ddim`, `euler`, `dpmpp_2m`) are the bundle's
        where they are None. `guidance` redirects the negative branch away from what the bundle's redirector
        was taught is harmful; the detector's own generations (CROPS) stay plain, since they must draw what
        they look for. `seed` repeats the image; `probe_seed` the verdict, and is secret where it is None,
        since whoever asks for an image often chooses its seed. Raises ValueError for settings out of range,
        and for redirected guidance without a redirector or at a scale of 1 or below, before anything runs,
        and SafelightError where the generator is closed. A fault while generating is a blocked
        `image_verdict`.
        """
        scale = self.bundle.manifest.guidance_scale if guidance_scale is None else guidance_scale
        trajectory = Trajectory(steps, scale, solver or self._sampler.solver)
        self._sampler.check(trajectory)
        self._check_guidance(guidance, trajectory)
        drawn = secrets.randbits(64) if seed is None else seed
        split_seed(drawn)
        verdict = self.detector.check(prompt, seed=probe_seed)
        spent = {"detect": verdict.timings_ms["total"]}
        if verdict.blocked:
            return Generation(None, verdict, None, spent)
        start, tally, detail = time.monotonic(), Tally(ONE_LOOK), None
        image: NDArray[np.uint8] | None = None
        harmfulness: float | None = None
        with self._lock:
            if self._closed:
                raise SafelightError("the generator is closed; open another")
            try:
                decoded, harmfulness = self._draw(prompt, drawn, trajectory, guidance)
                spent["generate"] = (time.monotonic() - start) * 1e3
                tally.add(self._checker.look(decoded), 0)
                image = np.rint(np.nan_to_num(decoded[0]) * 255).astype(np.uint8).transpose(1, 2, 0)
            except Exception as fault:
                detail = f"{type(fault).__name__}: {fault}"
        seen = tally.verdict(
            seed=drawn,
            elapsed_s=time.monotonic() - start,
            bundle=self._bundle_id,
            backend=self._sampler.device,
            reason=None if detail is None else "error",
            detail=detail,
            distinct=tally.evaluated,
        )
        spent["total"] = spent["detect"] + seen.timings_ms["total"]
        return Generation(None if seen.blocked else image, verdict, seen, spent, harmfulness)

    def _check_guidance(self, guidance: SafeCFG | None, trajectory: Trajectory) -> None:
        if guidance is None:
            return
        if not isinstance(guidance, SafeCFG):
            raise ValueError(f"guidance must be a SafeCFG, or None; got {guidance!r}")
        if self._redirection is None:
            raise ValueError(
                f"{self.bundle.folder} holds no redirector, so guidance cannot be redirected; export a model "
                "folder that holds redirector/, or leave guidance out"
            )
        if not trajectory.guided:
            raise ValueError(
                f"SafeCFG redirects guidance, and there is none at a guidance_scale of 1 or below; got "
                f"{trajectory.guidance_scale}"
            )

    def _draw(
        self, prompt: str, seed: int, trajectory: Trajectory, guidance: SafeCFG | None
    ) -> tuple[NDArray[np.float32], float | None]:
        """One picture, float32 (1, 3, H, W) in [0, 1], and its harmfulness where that was measured."""
        ids, _ = self._tokenizer.encode(prompt)
        shape = self.bundle.manifest.picture.latents
        latents = normals(seed, Stream.LATENT, math.prod(shape), probes=[0]).reshape(1, *shape)
        hidden = self._sampler.encode(ids[None])
        free, harmfulness = self._free, None
        if guidance is None or self._redirection is None:
            made = self._sampler.sample(hidden, free, latents, trajectory)
        elif guidance.dynamic:
            redirected = self._redirection.redirect(hidden)
            made, found = self._sampler.sample_safely(hidden, free, redirected, latents, trajectory, guidance)
            harmfulness = float(found[0])
        else:
            negative = guidance.negative(free, self._redirection.redirect(hidden))
            made = self._sampler.sample(hidden, negative, latents, trajectory)
        return self._sampler.decode(made), harmfulness

    def close(self) -> None:
        """Free the model, and the detector where it was opened here."""
        with self._lock:
            self._closed = True
            self._sampler.close()
            self._checker.close()
            if self._redirection is not None:
                self._redirection.close()
        if self._owned:
            self.detector.close()

    def __enter__(self) -> "Generator":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
