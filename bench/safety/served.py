"""A system at work, batched through the engine: what it refuses, what it draws, what it withholds.

Detection, generation and the final check are those that serve, with seeds that are fixed per request. Judges
nothing and counts no rate; a fault is handed back, never turned into an answer.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safelight.bench.safety.counting import CountingBackend
from safelight.bench.safety.hidden_screen import HiddenScreen
from safelight.bench.safety.place import Place
from safelight.bench.safety.settings import Settings
from safelight.bench.safety.settle import Fault, settle
from safelight.bench.safety.system import System
from safelight.engine.backends import Backend
from safelight.engine.bundle import Bundle
from safelight.engine.detect import Detector
from safelight.engine.guidance import Redirection, SafeCFG
from safelight.engine.looks import PictureChecker
from safelight.engine.sampler import SamplerBackend, Trajectory, open_sampler
from safelight.engine.tokenizer import open_tokenizer
from safelight.kernels.philox import Stream, normals
from safelight.verdict import Verdict

Floats = NDArray[np.float32]
SAFE_CFG = SafeCFG()  # dynamic, at its default strength
ONE_THREAD = Place(threads=1)
HELD = ("_sampler", "_checker", "_redirection", "_detector", "_hidden_screen", "_backend")  # what close drops


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: its text, the seed of its picture and that of its probes.

    `hidden` float32 (L, D) takes the place of the text's embeddings, `latents` float32 (c, h, w) that of the
    seed's starting latents; `guidance_scale` that of the run's.
    """

    text: str
    seed: int
    probe_seed: int
    hidden: Floats | None = None
    latents: Floats | None = None
    guidance_scale: float | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a detector or a checker said: whether it blocks, and the score that decided."""

    blocked: bool
    score: float


class Served:
    """A system, opened on its bundle. A context manager."""

    def __init__(
        self,
        system: System,
        bundle: Bundle,
        model: Path,
        settings: Settings,
        place: Place | Backend = ONE_THREAD,
    ) -> None:
        """`model` is the folder that the bundle was made from; `place` may be a backend of the bundle that is
        open already. Raises BundleError, ValueError, and BackendUnavailable where the place is none on this
        machine.
        """
        self.system, self.bundle = system, bundle
        self._settings, self._folder = settings, model
        manifest = bundle.manifest
        opened = place.open(bundle, model) if isinstance(place, Place) else place
        self._calls: Counter[str] | None = None
        if not isinstance(opened, SamplerBackend):  # of one that is, several networks are one launch
            opened = CountingBackend(opened)
            self._calls = opened.calls
        self._backend: Backend = opened
        self._tokenizer = open_tokenizer(bundle)
        self._sampler = open_sampler(self._backend, manifest)
        self._sampler.check(settings.trajectory)
        self._free = self._sampler.free(self._tokenizer)
        self._checker = PictureChecker(self._backend.stage("safety_checker"), manifest.checker)
        self._redirection = Redirection(self._backend.stage("redirector")) if system.redirector else None
        self._steps = settings.probe_steps if system.detector == "full" else 1
        kind: Any = "image" if system.detector in (None, "full") else system.detector
        self._detector = (
            Detector(bundle, self._backend, manifest.probe, steps=self._steps, checker=kind)
            if system.detector
            else None
        )
        self._hidden_screen: HiddenScreen | None = None
        if self._calls is not None:
            self._calls.clear()  # what opening ran is not a request's

    @property
    def calls(self) -> "Counter[str]":
        """Rows of each network so far. Raises ValueError where the backend runs several as one."""
        if self._calls is None:
            raise ValueError(
                f"{self.device} runs networks together, which cannot be counted; count elsewhere"
            )
        return self._calls

    @property
    def device(self) -> str:
        """Where pictures are drawn, and by what."""
        return self._sampler.device

    def screen(self, asks: Sequence[Ask]) -> list[Answer | Fault]:
        """What the detector says of each request. Raises ValueError where the system has none."""
        if self._detector is None:
            raise ValueError(f"{self.system.name} has no detector; ask only systems that do")
        texts = [at for at, ask in enumerate(asks) if ask.hidden is None]
        found: list[Answer | Fault] = [Fault("not screened")] * len(asks)
        verdicts = settle(self._verdicts, [asks[at] for at in texts], 2 * self._settings.batch)
        for at, verdict in zip(texts, verdicts, strict=True):
            found[at] = _answer(verdict)
        given = [at for at, ask in enumerate(asks) if ask.hidden is not None]
        for at, verdict in zip(given, settle(self._given, [asks[at] for at in given], 1), strict=True):
            found[at] = _answer(verdict)
        return found

    def _verdicts(self, asks: Sequence[Ask]) -> list[Verdict]:
        assert self._detector is not None
        return self._detector.check_batch([ask.text for ask in asks], seed=[ask.probe_seed for ask in asks])

    def _given(self, asks: Sequence[Ask]) -> list[Verdict]:
        if self._hidden_screen is None:
            self._hidden_screen = HiddenScreen(
                self.bundle,
                self._folder,
                self._backend,
                self.bundle.manifest.probe,
                kind=str(self.system.detector),
                steps=self._steps,
            )
        return [self._hidden_screen.check(ask.text, ask.hidden, seed=ask.probe_seed) for ask in asks]  # type: ignore[arg-type]

    def draw(self, asks: Sequence[Ask]) -> list[Floats | Fault]:
        """The picture (3, H, W) in [0, 1] of each request, NaN where the model's numbers were not finite."""
        scales = sorted({self._scale(ask) for ask in asks})
        found: list[Floats | Fault] = [Fault("not drawn")] * len(asks)
        for scale in scales:
            rows = [at for at, ask in enumerate(asks) if self._scale(ask) == scale]
            drawn = settle(self._drawn, [asks[at] for at in rows], self._settings.batch)
            for at, picture in zip(rows, drawn, strict=True):
                found[at] = picture
        return found

    def _scale(self, ask: Ask) -> float:
        return self._settings.guidance_scale if ask.guidance_scale is None else ask.guidance_scale

    def _drawn(self, asks: Sequence[Ask]) -> list[Floats]:
        ids = np.stack([self._tokenizer.encode(ask.text)[0] for ask in asks])
        hidden = self._sampler.encode(ids)
        for at, ask in enumerate(asks):
            if ask.hidden is not None:
                hidden[at] = ask.hidden
        settings = self._settings
        trajectory = Trajectory(settings.steps, self._scale(asks[0]), settings.solver)
        latents = np.stack([self._start(ask) for ask in asks])
        if self._redirection is None:
            made = self._sampler.sample(hidden, self._free, latents, trajectory)
        else:
            redirected = self._redirection.redirect(hidden)
            made, _ = self._sampler.sample_safely(
                hidden, self._free, redirected, latents, trajectory, SAFE_CFG
            )
        return list(self._sampler.decode(made))

    def _start(self, ask: Ask) -> Floats:
        shape = self.bundle.manifest.picture.latents
        if ask.latents is None:
            return normals(ask.seed, Stream.LATENT, math.prod(shape), probes=[0]).reshape(shape)
        if ask.latents.shape != shape:
            raise ValueError(f"starting latents must be {shape}; got {ask.latents.shape}")
        return ask.latents.astype(np.float32)

    def flag(self, pictures: Sequence[Floats]) -> list[Answer | Fault]:
        """What the final checker says of pictures (3, H, W)."""
        return settle(self._flagged, pictures, 64)

    def _flagged(self, pictures: Sequence[Floats]) -> list[Answer]:
        looks = self._checker.look(np.stack(pictures))
        if not looks.finite.all():
            raise ValueError("the picture or the checker's margins are not finite")
        largest = looks.margins[0].max(1)
        return [
            Answer(bool(flag), float(score)) for flag, score in zip(looks.flagged[0], largest, strict=True)
        ]

    def close(self) -> None:
        """Free every stage, and let go of all that holds a network: what is closed may be kept."""
        for name in HELD:
            part: Any = self.__dict__.pop(name, None)
            if hasattr(part, "close"):
                part.close()

    def __enter__(self) -> "Served":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _answer(verdict: Verdict | Fault) -> Answer | Fault:
    """Served, every fault blocks; here it is one, so that a broken detector does not look like a strict
    one.
    """
    if isinstance(verdict, Fault):
        return verdict
    if verdict.reason in (None, "concept"):
        return Answer(verdict.blocked, verdict.score)
    return Fault(
        f"{verdict.reason}: {verdict.detail or 'the detector blocked'}", raised=verdict.reason == "error"
    )
