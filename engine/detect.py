"""The detector: is this request's neighbourhood safe? A model looks at its probes until the vote is decided.

Inspired by CROPS and CROPS-1 (SC-Pro, arXiv 2501.05359): the score (share of flagged probes) and the decision
(score against a threshold) are the paper's; the geometry of the probes, the early exit and the rule that
anything not finite blocks are this project's (methods 1.8). It fails closed: an exception, a time-out, a
value that is not finite is a blocked verdict.
"""

import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from safelight import __version__
from safelight.engine.backends import Backend, open_backend
from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.image_probes import ImageProbes
from safelight.engine.looks import ProbeModel
from safelight.engine.neighbourhood import Request
from safelight.engine.probe_model import CheckerKind, can_share, open_probe_model
from safelight.engine.tally import Pictures, Tally, resolve
from safelight.engine.tokenizer import open_tokenizer
from safelight.errors import SafelightError, ShapeError
from safelight.kernels.philox import split_seed
from safelight.plain import is_number
from safelight.probe import ProbeConfig
from safelight.verdict import Verdict

# Probes in one run of the model at latents of 8 x 8; of larger ones fewer, in proportion. Where they become
# pictures half as many: the decoder's layers in the picture's own size are what takes memory.
ROWS = 64


class Detector:
    """Screens prompts and pictures with one bundle. Threads may share it; they take turns.

    `Detector.open` makes one; it is a context manager.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        probe: ProbeConfig,
        *,
        steps: int = 1,
        checker: CheckerKind = "image",
        by_component: bool = False,
        timeout_s: float | None = None,
        early_exit: bool = True,
    ) -> None:
        """The parts, not held against the bundle's policy: for calibration and measurements. Settings as for
        `open`.
        """
        if timeout_s is not None and not (is_number(timeout_s) and timeout_s > 0):
            raise ValueError(f"timeout_s must be greater than 0 seconds; got {timeout_s!r}")
        self.bundle = bundle
        manifest = bundle.manifest
        self.bundle_id = manifest.bundle_id  # a digest of the manifest, too slow to make for each verdict
        self.probe = probe
        self._backend = backend
        self._timeout_s = timeout_s
        self._early_exit = early_exit
        self._tokenizer = open_tokenizer(bundle)
        self._model: ProbeModel = open_probe_model(
            backend,
            manifest,
            probe,
            self._tokenizer,
            steps=steps,
            checker=checker,
            by_component=by_component,
        )
        self.checker = checker
        self._steps = steps
        self._evaluated = self._decoded = 0
        _, height, width = manifest.picture.latents
        rows = ROWS // 2 if checker == "image" else ROWS
        self._rows = self._model.rows or max(1, rows * 64 // (height * width))
        self._pictures: ImageProbes | None = None
        self._closed = False
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        bundle: str | Path | Bundle = "shapes",
        *,
        backend: str = "onnxruntime",
        probe: ProbeConfig | None = None,
        steps: int | None = None,
        checker: CheckerKind = "image",
        by_component: bool | None = False,
        model: str | Path | None = None,
        threads: int | None = None,
        device: str | None = None,
        precision: str | None = None,
        compiled: bool = False,
        kernels: str | Path | None = None,
        timeout_s: float | None = None,
        early_exit: bool = True,
    ) -> "Detector":
        """Open a bundle (`shapes` is the shipped one) on a backend: a name that `doctor` lists, or `auto`.

        `probe` may be stricter than the bundle's calibrated settings, never looser. `steps` 1 probes with the
        one-step model (CROPS-1), more with the full model in that many steps (CROPS). `checker` says who
        looks at the probes: the `image` checker, by which the bundle was calibrated; the `latent` checker,
        which needs no pictures; or a `cascade`, in which the image checker looks at those of which the latent
        checker is unsure and on which the vote hangs (the rest keep the latent checker's margins).
        `by_component` takes one step by the full model's graphs instead of the detector graph, for a model
        that is its own one-step model: weights that a generator on the same processor backend needs too are
        then in memory once; None does so where that is the case and costs no time. `model` is the weights
        folder of the torch backend, `device` (`cpu`, `cuda`, `cuda:N`) where it runs, and `precision`
        (`float16`, `bfloat16`, `float32`) what its networks compute in on a GPU; `compiled` has torch.compile
        work on them, and `kernels` is a folder of `safelight kernels build`, with which no kernel is compiled
        here. A check that takes longer than `timeout_s` seconds is blocked: a service calls `warm_up` before
        its first one. `early_exit` stops once the vote is decided and never changes it; without it all doubts
        are resolved. Raises BundleError, BackendUnavailable, and ValueError for settings out of range.
        """
        opened = open_bundle(bundle)
        _check_probe(probe)
        if steps in (None, 1) and not opened.manifest.distilled:
            raise ValueError(
                f"{opened.folder} holds no one-step model, so one step would show the checker a blur; give "
                "steps, such as 25, to probe with the full model"
            )
        policy = opened.manifest.probe
        if probe is not None and (why := probe.looser_than(policy)):
            raise ValueError(f"a bundle's policy may be tightened, never loosened: {why}")
        runtime = open_backend(
            backend,
            opened,
            model=None if model is None else Path(model),
            threads=threads,
            device=device,
            precision=precision,
            compiled=compiled,
            kernels=None if kernels is None else Path(kernels),
        )
        return cls(
            opened,
            runtime,
            probe or policy,
            steps=1 if steps is None else steps,
            checker=checker,
            by_component=can_share(runtime, opened.manifest) if by_component is None else by_component,
            timeout_s=timeout_s,
            early_exit=early_exit,
        )

    @property
    def backend(self) -> Backend:
        """The runtime that it was opened on: a generator on the same one shares what that has loaded."""
        return self._backend

    @property
    def policy(self) -> str:
        """What decides a verdict besides bundle and seed, in words: how it probes, who looks, in how many
        steps, on what, in which version. A time limit is left out: it lets nothing pass.
        """
        probe = ", ".join(f"{name} {value}" for name, value in self.probe.to_json().items())
        exits = "early exit" if self._early_exit else "no early exit"
        return (
            f"probes of {probe}; {exits}; checker {self.checker}; steps {self._steps}; on "
            f"{self._model.device}; safelight {__version__}"
        )

    def warm_up(self, *, pictures: bool = False) -> float:
        """Do now what the first check of a prompt would have to do: plan, allocate, on a GPU compile and
        capture. Returns the seconds that it took.

        `pictures` does the same for `check_image`. Neither draws on a policy nor gives a verdict; whatever
        goes wrong is raised as it is.
        """
        start = time.monotonic()
        with self._lock:
            self._check_open()
            ids, truncated = self._tokenizer.encode("")
            for chunk in self._chunks():
                looks = self._model.look([Request(ids, 0, truncated)], chunk)
                if self.checker == "cascade" and looks.latents is not None:
                    self._model.resolve(np.asarray(looks.latents[0]))
            if pictures:
                self._pictures = self._pictures or ImageProbes(self._backend, self.bundle.manifest)
                blank = np.zeros((*[self.bundle.manifest.picture.size] * 2, 3), dtype=np.uint8)
                self._pictures.look(blank, ProbeConfig(count=self.probe.count), seed=0)
        return time.monotonic() - start

    def check(self, prompt: str, *, seed: int | None = None) -> Verdict:
        """The verdict on a prompt. `seed`, in [0, 2**64), repeats it and lets an attacker predict it; None
        draws one.

        Raises ValueError for a seed out of range and SafelightError where the detector is closed; whatever
        else goes wrong is a blocked verdict.
        """
        return self.check_batch([prompt], seed=seed)[0]

    def check_batch(
        self, prompts: Iterable[str], *, seed: int | Sequence[int] | None = None
    ) -> list[Verdict]:
        """Verdicts on several prompts, each what `check` says with the same seed, one for all or each. Raises
        as `check`, and ValueError for one text, or what holds none.
        """
        if isinstance(prompts, str | bytes):
            raise ValueError("check_batch takes a list of prompts; got one text; use check")
        if not isinstance(prompts, Iterable):
            raise ValueError(f"check_batch takes a list of prompts; got {prompts!r}")
        found = self._checked(list(prompts), seed, keep_images=False)
        return [tally_and_verdict[1] for tally_and_verdict in found]

    def check_with_images(self, prompt: str, *, seed: int | None = None) -> tuple[Verdict, Pictures]:
        """The verdict and the pictures of its evaluated probes, float32 (P, 3, H, W) in [0, 1]; P may be 0.

        Raises ValueError where the checker is not `image`: the others look at probes without a picture.
        """
        if self.checker != "image":
            raise ValueError(f"checker {self.checker!r} draws no pictures of its probes; ask checker 'image'")
        tally, verdict = self._checked([prompt], seed, keep_images=True)[0]
        return verdict, tally.images

    def check_image(
        self, image: Any, *, probe: ProbeConfig | None = None, seed: int | None = None
    ) -> Verdict:
        """The verdict on a picture: a path, encoded bytes (PNG, JPEG, WebP), a PIL image, a uint8 array (H,
        W, 3 or 4).

        Without `probe` the image checker alone looks at it, at all of it. With `probe` its embedding (the
        encoder's latents) is probed too, as an image-to-image request's would be, by that kind, count, angle
        and threshold: that can block what the checker alone lets pass, never the reverse. What cannot be
        decoded, is too large, moves, or is of another format is blocked. Raises as `check`, and ValueError
        for a `probe` that is none.
        """
        _check_probe(probe)
        (drawn,) = _seeds(seed, 1)
        start = time.monotonic()
        with self._lock:
            self._check_open()
            tally = Tally(probe or self.probe)
            try:
                self._pictures = self._pictures or ImageProbes(self._backend, self.bundle.manifest)
                looks = self._pictures.look(image, probe, seed=drawn, deadline=self._deadline(start))
                count = looks.margins.shape[1]
                tally = Tally(probe or ProbeConfig(count=count, threshold=1 / count), first_decides=True)
                tally.add(looks, 0)
                self._check_time(start)
            except Exception as fault:
                return self._failed(fault, tally, drawn, start)
            return tally.verdict(**self._about(drawn, start, self._pictures.device), distinct=tally.evaluated)

    @property
    def evaluated(self) -> int:
        """Probes of prompts that were looked at so far."""
        with self._lock:
            return self._evaluated

    @property
    def decoded(self) -> int:
        """How many of these became pictures: all with the `image` checker, none with the `latent` one."""
        with self._lock:
            return self._decoded

    def _checked(
        self, prompts: Sequence[str], seed: int | Sequence[int] | None, *, keep_images: bool
    ) -> list[tuple[Tally, Verdict]]:
        seeds, start = _seeds(seed, len(prompts)), time.monotonic()
        tallies = [Tally(self.probe, early_exit=self._early_exit, keep_images=keep_images) for _ in prompts]
        verdicts: dict[int, Verdict] = {}
        requests: dict[int, Request] = {}
        with self._lock:
            self._check_open()
            for row, (prompt, drawn) in enumerate(zip(prompts, seeds, strict=True)):
                try:
                    ids, truncated = self._tokenizer.encode(prompt)
                    requests[row] = Request(ids, drawn, truncated)
                except Exception as fault:
                    verdicts[row] = self._failed(fault, tallies[row], drawn, start)
            rows, each = list(requests), max(1, self._rows // self.probe.count)
            for at in range(0, len(rows), each):
                part = {row: requests[row] for row in rows[at : at + each]}
                verdicts |= self._vote(part, tallies, start)
        return [(tallies[row], verdicts[row]) for row in range(len(prompts))]

    def _vote(self, requests: dict[int, Request], tallies: list[Tally], start: float) -> dict[int, Verdict]:
        """Probe until every request is decided. A fault blocks those that were not."""
        error: Exception | None = None
        try:
            for chunk in self._chunks():
                rows = [row for row in requests if not tallies[row].decided]
                if not rows:
                    break
                wanted = [requests[row] for row in rows]
                looks = self._model.look(wanted, chunk, deadline=self._deadline(start))
                if (found := looks.flagged.shape) != (asked := (len(rows), len(chunk))):
                    raise ShapeError(f"the model must look at {asked} requests and probes; got {found}")
                self._evaluated += looks.flagged.size
                self._decoded += looks.drawn
                for at, row in enumerate(rows):
                    tallies[row].add(looks, at)
                self._check_time(start)
            votes = [tallies[row] for row in requests]
            while resolved := resolve(self._model, votes, self._rows, deadline=self._deadline(start)):
                self._decoded += resolved
                self._check_time(start)
        except Exception as fault:
            error = fault
        verdicts = {}
        for row, request in requests.items():
            tally = tallies[row]
            lost = error is not None and (not tally.decided or isinstance(error, TimeoutError))
            if error is not None and lost and tally.reason is None:
                verdicts[row] = self._failed(error, tally, request.seed, start, truncated=request.truncated)
            else:
                distinct = self._model.distinct(request, tally.evaluated)
                about = self._about(request.seed, start, self._model.device)
                verdicts[row] = tally.verdict(**about, distinct=distinct, truncated=request.truncated)
        return verdicts

    def _chunks(self) -> Iterator[range]:
        """Probe numbers, cut where a vote may be decided (`need` seen, too few left) or a run too large."""
        count, need = self.probe.count, self.probe.need
        whole = {*range(self._rows, count, self._rows), count}
        ends = sorted(whole | {need, count - need + 1} if self._early_exit else whole)
        return (range(begin, end) for begin, end in zip([0, *ends], ends, strict=False))

    def _deadline(self, start: float) -> float | None:
        return None if self._timeout_s is None else start + self._timeout_s

    def _check_time(self, start: float) -> None:
        if self._timeout_s is not None and time.monotonic() - start >= self._timeout_s:
            raise TimeoutError("the time limit is past")

    def _check_open(self) -> None:
        if self._closed:
            raise SafelightError("the detector is closed; open another")

    def _about(self, seed: int, start: float, backend: str) -> dict[str, Any]:
        """What every verdict says of its making."""
        elapsed_s = time.monotonic() - start
        return {"seed": seed, "elapsed_s": elapsed_s, "bundle": self.bundle_id, "backend": backend}

    def _failed(
        self, fault: Exception, tally: Tally, seed: int, start: float, *, truncated: int = 0
    ) -> Verdict:
        """The verdict where something went wrong: blocked by `timeout` or `error`, with what it was."""
        late = isinstance(fault, TimeoutError) and self._timeout_s is not None  # a network file has its own
        detail = f"slower than {self._timeout_s} s" if late else f"{type(fault).__name__}: {fault}"
        about = self._about(seed, start, self._model.device)
        reason: Any = "timeout" if late else "error"
        return tally.verdict(**about, reason=reason, detail=detail, truncated=truncated)

    def close(self) -> None:
        """Free the model; a check after this raises SafelightError."""
        with self._lock:
            self._closed = True
            self._model.close()
            if self._pictures is not None:
                self._pictures.close()

    def __enter__(self) -> "Detector":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """One seed per request; secret ones where none is given. Raises ValueError."""
    if seed is None:
        return [secrets.randbits(64) for _ in range(count)]
    if isinstance(seed, str | bytes) or not isinstance(seed, Iterable):
        seeds: list[Any] = [seed] * count
    else:
        seeds = list(seed)
    if len(seeds) != count:
        raise ValueError(f"give one seed for all, or one for each of the {count} prompts; got {len(seeds)}")
    for value in seeds:
        split_seed(value)
    return [int(value) for value in seeds]


def _check_probe(probe: ProbeConfig | None) -> None:
    """Raises ValueError for what is no ProbeConfig."""
    if probe is not None and not isinstance(probe, ProbeConfig):
        raise ValueError(f"probe must be a ProbeConfig, or None; got {probe!r}")
