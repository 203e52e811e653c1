"""The job that screens a file of prompts: it streams, resumes, and never stops at a bad row. Knows no model.

A row is done when the output holds a row with its number and the digest of its content; it is not done again.
An output of another bundle, policy or input is refused before anything is screened; what an input gained at
its end is screened. What cannot be screened is blocked: a row without a usable prompt gives a verdict with
reason `error`, and is counted.
"""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from safelight.engine.prompt_file import PromptRow, read_prompts
from safelight.engine.sole_writer import named
from safelight.engine.verdict_file import Done, VerdictFile
from safelight.errors import SafelightError
from safelight.verdict import Verdict

Pictures = NDArray[np.float32]
LISTED = 5  # faults that a summary spells out


class Checker(Protocol):
    """What the job asks of a detector."""

    @property
    def bundle_id(self) -> str:
        """Which bundle the verdicts are of."""

    @property
    def policy(self) -> str:
        """What decides a verdict besides bundle and seed, in words."""

    def check(self, prompt: str, *, seed: int | None = None) -> Verdict:
        """The verdict on one prompt."""

    def check_with_images(self, prompt: str, *, seed: int | None = None) -> tuple[Verdict, Pictures]:
        """The same, with the probes' pictures (P, 3, H, W) in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What became of the rows: `resumed` were done before; `blocked` includes `errors`, and `faults` names
    some.
    """

    rows: int
    resumed: int
    blocked: int
    errors: int
    seconds: float
    faults: tuple[str, ...] = ()

    @property
    def passed(self) -> int:
        """Rows that were not blocked."""
        return self.rows - self.blocked

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"passed": self.passed}

    def __str__(self) -> str:
        text = f"{self.rows} rows: {self.passed} passed, {self.blocked} blocked"
        text += f", {self.errors} of them for an error" if self.errors else ""
        if self.resumed:
            text += f"; {self.resumed} were done before"
        return f"{text}; {self.seconds:.1f} s"


def error_verdict(detail: str) -> Verdict:
    """The verdict on what could not be screened."""
    return Verdict(blocked=True, reason="error", score=math.nan, threshold=math.nan, seed=0, detail=detail)


def screen_file(
    detector: Checker,
    source: Path,
    target: Path,
    *,
    column: str = "prompt",
    seed: int | None = None,
    probes_folder: Path | None = None,
    on_row: Callable[[], Any] = lambda: None,
) -> Summary:
    """Screen the prompts of `source` into `target`, going on where an earlier run stopped.

    `probes_folder` receives one PNG per probe; `on_row` is called after each row. Raises what `read_prompts`
    and `VerdictFile` raise, and SafelightError where the output was begun with another bundle, another policy
    or another input.
    """
    start = time.monotonic()
    if target.exists() and os.path.samefile(source, target):
        raise ValueError(f"{target}: input and output are the same file; choose another -o")
    policy = f"{detector.policy}; {'secret seeds' if seed is None else f'seed {seed}'}"
    rows_in = read_prompts(source, column)
    first = list(itertools.islice(rows_in, 1))  # what cannot be read is refused before an output exists
    with VerdictFile(target) as out:
        before = {done.number: done for done in out.done}
        _check_makers(target, out.done, detector.bundle_id, policy)
        _check_rows(target, before, source, column)
        rows = resumed = blocked = errors = 0
        faults: list[str] = []
        for row in itertools.chain(first, rows_in):
            rows += 1
            done = before.get(row.number)
            if done is not None:
                if not _is_of(done, row):  # the input was changed since it was looked at
                    raise _other_row(target, row.number, source)
                resumed += 1
                blocked, errors = blocked + done.blocked, errors + (done.reason == "error")
            else:
                verdict = _row_verdict(detector, row, seed, probes_folder)
                out.write((row.number, row.digest, row.prompt, policy), verdict)
                blocked += verdict.blocked
                if verdict.reason == "error":
                    errors += 1
                    faults += [f"row {row.number}: {verdict.detail}"] if len(faults) < LISTED else []
            on_row()
    return Summary(rows, resumed, blocked, errors, time.monotonic() - start, tuple(faults))


def _check_makers(target: Path, before: Iterable[Done], bundle_id: str, policy: str) -> None:
    """Raise SafelightError where the output holds verdicts of another bundle or policy."""
    for done in before:
        if done.bundle not in ("", bundle_id):
            raise SafelightError(
                f"{target}: holds verdicts of bundle {done.bundle}, not {bundle_id}; choose another -o"
            )
        if done.policy != policy:
            raise SafelightError(
                f"{target}: holds verdicts by the policy {done.policy!r}, not {policy!r}; choose another -o"
            )


def _check_rows(target: Path, before: Mapping[int, Done], source: Path, column: str) -> None:
    """Raise SafelightError where the output holds a row that the input does not hold by that number."""
    missing = dict(before)
    for row in read_prompts(source, column) if missing else ():
        done = missing.pop(row.number, None)
        if done is not None and not _is_of(done, row):
            raise _other_row(target, row.number, source)
        if not missing:
            return
    if missing:
        raise SafelightError(
            f"{target}: holds row {min(missing)}, which {source} does not have; choose another -o"
        )


def _is_of(done: Done, row: PromptRow) -> bool:
    """Whether a verdict is on that row; what holds no prompt never passed, whatever its digest is like."""
    return done.digest == row.digest and (row.prompt is not None or done.blocked)


def _other_row(target: Path, number: int, source: Path) -> SafelightError:
    return SafelightError(
        f"{target}: row {number} is not the verdict on row {number} of {source} as it now is; "
        "choose another -o"
    )


def _row_verdict(detector: Checker, row: PromptRow, seed: int | None, probes_folder: Path | None) -> Verdict:
    """The verdict on a row, whatever happens: an exception is a verdict too."""
    if row.prompt is None:
        return error_verdict(row.fault or "no prompt")
    try:
        return screen_prompt(detector, row.prompt, row.number, seed=seed, probes_folder=probes_folder)
    except OSError:
        raise  # the pictures cannot be written: that is no property of the row
    except Exception as error:
        return error_verdict(f"{type(error).__name__}: {error}")


def screen_prompt(
    detector: Checker, prompt: str, number: int, *, seed: int | None = None, probes_folder: Path | None = None
) -> Verdict:
    """The verdict on one prompt; the pictures of its probes go to `probes_folder`, named by `number`."""
    if probes_folder is None:
        return detector.check(prompt, seed=seed)
    verdict, images = detector.check_with_images(prompt, seed=seed)
    save_probes(probes_folder, number, images)
    return verdict


def save_probes(folder: Path, number: int, images: Pictures) -> list[Path]:
    """Write pictures (P, 3, H, W) in [0, 1] as `NUMBER-pPROBE.png`, by row and probe; returns the paths."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    levels = np.rint(np.nan_to_num(images).clip(0, 1) * 255).astype(np.uint8)
    for probe, picture in enumerate(levels.transpose(0, 2, 3, 1)):
        path = folder / f"{number:06d}-p{probe:02d}.png"
        with named(path):
            Image.fromarray(picture).save(path)
        paths.append(path)
    return paths
