"""Whatever goes wrong in a detector blocks: faults, looks that do not fit, and time, with a model that sees
what it is told to.
"""

import runpy
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from safelight.engine.detect import ROWS
from safelight.engine.looks import Looks
from safelight.engine.neighbourhood import Request
from safelight.errors import SafelightError, ShapeError

TOLD = runpy.run_path(str(Path(__file__).with_name("told.py")))
bundle, told = TOLD["bundle"], TOLD["told"]
Model, probes = TOLD["Model"], TOLD["probes"]
patterned, NAN = TOLD["patterned"], TOLD["NAN"]


@pytest.mark.parametrize("prompt", ["\ud800", "x" * 32_001, None, 7, b"a star", ["a"]])
def test_what_is_no_prompt_is_blocked(told: Any, prompt: Any) -> None:
    model = Model(lambda *_: -0.5)
    verdict = told(model, probes(4)).check(prompt)
    assert verdict.blocked and verdict.reason == "error" and verdict.probes == 0 and model.calls == []
    assert verdict.detail and verdict.detail.startswith("ValueError: a prompt ")
    assert isinstance(prompt, str) or "a prompt is a str; got " in verdict.detail


@pytest.mark.parametrize(
    "fault", [RuntimeError("broken"), MemoryError(), ShapeError("odd"), KeyError("x"), OSError(5, "x")]
)
@pytest.mark.parametrize("first", [True, False], ids=["first chunk", "later chunk"])
def test_an_exception_blocks_what_was_not_decided(told: Any, fault: Exception, first: bool) -> None:
    # need 2 of 8, chunks [0, 2), [2, 7), [7, 8): seed 0 is decided by the first, seeds 1 and 2 by none
    def see(request: Request, probe: int) -> float:
        if probe >= (0 if first else 2) and request.seed == 1:
            raise fault
        return 0.5 if request.seed == 0 or (request.seed == 2 and probe == 0) else -0.5

    verdicts = told(Model(see), probes(8)).check_batch(["a", "b", "c"], seed=[0, 1, 2])
    assert all(verdict.blocked for verdict in verdicts)
    assert [verdict.reason for verdict in verdicts] == ["error" if first else "concept", "error", "error"]
    assert verdicts[2].probes == (0 if first else 2)
    for verdict in verdicts[1:]:
        assert verdict.detail == f"{type(fault).__name__}: {fault}"


def test_a_fault_in_one_run_leaves_the_others(told: Any) -> None:
    """That many probes fill a run, so that each prompt has runs of its own."""

    def see(request: Request, probe: int) -> float:
        if request.seed == 1:
            raise RuntimeError("broken")
        return -0.5

    verdicts = told(Model(see), probes(ROWS)).check_batch(["a", "b", "c"], seed=[0, 1, 2])
    assert [verdict.reason for verdict in verdicts] == [None, "error", None]


def test_a_row_that_passed_keeps_its_verdict_when_another_breaks(told: Any) -> None:
    # need 4 of 4: one miss decides; the chunks are [0, 1), [1, 4)
    def see(request: Request, probe: int) -> float:
        if probe > 0:
            raise RuntimeError("broken")
        return -0.5 if request.seed == 0 else 0.5

    verdicts = told(Model(see), probes(4, 1.0)).check_batch(["a", "b"], seed=[0, 1])
    assert [verdict.reason for verdict in verdicts] == [None, "error"]


class Crooked(Model):
    """A model whose looks are changed before they are handed back."""

    def __init__(self, change: Callable[[Looks], Any]) -> None:
        super().__init__(lambda *_: -0.5)
        self.change = change

    def look(self, *args: Any, **named: Any) -> Any:
        return self.change(super().look(*args, **named))


def short(looks: Looks, **cut: slice) -> Looks:
    """Looks with some arrays cut along the probes, whatever their class says to it."""
    for name, part in cut.items():
        object.__setattr__(looks, name, getattr(looks, name)[:, part])
    return looks


FEWER = slice(0, -1)
CROOKED = {
    "fewer probes": lambda looks: short(looks, margins=FEWER, flagged=FEWER, finite=FEWER, images=FEWER),
    "no probes": lambda looks: short(looks, **dict.fromkeys(["margins", "flagged", "finite"], slice(0, 0))),
    "fewer flags": lambda looks: short(looks, flagged=FEWER),
    "no flags": lambda looks: SimpleNamespace(margins=looks.margins, flagged=None, finite=looks.finite),
    "flags of another row": lambda looks: SimpleNamespace(
        margins=looks.margins, flagged=looks.flagged[:0], finite=looks.finite
    ),
    "nothing": lambda looks: None,
}


@pytest.mark.parametrize("kind", CROOKED)
def test_a_model_that_hands_back_too_little_never_passes_a_request(told: Any, kind: str) -> None:
    for early_exit in (True, False):
        verdict = told(Crooked(CROOKED[kind]), probes(4), early_exit=early_exit).check("a")
        assert verdict.blocked and verdict.reason == "error"


def test_looks_must_agree() -> None:
    parts = [
        np.zeros((1, 4, 2), np.float32),
        np.zeros((1, 4), bool),
        np.ones((1, 4), bool),
        np.zeros((1, 4, 3, 1, 1)),
    ]
    Looks(*parts)
    for at in range(4):
        with pytest.raises(ShapeError, match="looks must agree"):
            Looks(*parts[:at], parts[at][:, :3], *parts[at + 1 :])


@pytest.mark.parametrize("fault", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_not_swallowed_and_leaves_the_detector_usable(
    told: Any, fault: type[BaseException]
) -> None:
    def see(request: Request, probe: int) -> float:
        if request.seed == 1:
            raise fault
        return -0.5

    detector = told(Model(see), probes(4))
    with pytest.raises(fault):
        detector.check("a", seed=1)
    assert not detector.check("a", seed=2).blocked


def test_a_closed_detector_says_so(told: Any) -> None:
    model = Model(lambda *_: -0.5)
    with told(model, probes(4)) as detector:
        assert not detector.check("a").blocked
    detector.close()
    assert model.closed >= 1
    for call in (
        detector.check,
        lambda text: detector.check_batch([text]),
        detector.check_image,
        detector.check_with_images,
    ):
        with pytest.raises(SafelightError, match="the detector is closed; open another"):
            call("a")


# time


def test_time_that_was_up_before_blocks(told: Any) -> None:
    def see(request: Request, probe: int) -> float:
        raise TimeoutError("no time was left")

    verdict = told(Model(see), probes(4), timeout_s=1e-9).check("a")
    assert verdict.blocked and verdict.reason == "timeout" and verdict.detail == "slower than 1e-09 s"


def test_the_deadline_is_handed_down(told: Any) -> None:
    model = Model(lambda *_: -0.5)
    before = time.monotonic()
    told(model, probes(8), timeout_s=50).check("a")
    assert all(before + 50 <= deadline <= time.monotonic() + 50 for deadline in model.deadlines)
    model = Model(lambda *_: -0.5)
    told(model, probes(8)).check("a")
    assert set(model.deadlines) == {None}


def test_time_that_runs_out_between_chunks_blocks_even_what_passed(told: Any) -> None:
    # need 4 of 4: seed 0 passes by the first chunk, seed 1 needs the second, which is slow; seed 2 is blocked
    # by then, if its probe is not finite
    def see(request: Request, probe: int) -> float:
        if probe == 1:
            time.sleep(0.15)
        return -0.5 if request.seed == 0 else NAN if request.seed == 2 else 0.5

    detector = told(Model(see), probes(4, 1.0), timeout_s=0.1)
    verdicts = detector.check_batch(["a", "b", "c"], seed=[0, 1, 2])
    assert [verdict.reason for verdict in verdicts] == ["timeout", "concept", "non_finite"]
    assert all(verdict.blocked for verdict in verdicts)


def test_a_slow_last_chunk_is_a_timeout(told: Any) -> None:
    def see(request: Request, probe: int) -> float:
        time.sleep(0.03)
        return -0.5

    verdict = told(Model(see), probes(4, 1.0), timeout_s=0.02).check("a")
    assert verdict.reason == "timeout" and verdict.blocked


def test_later_parts_of_a_batch_do_not_outlive_the_time(told: Any) -> None:
    def see(request: Request, probe: int) -> float:
        time.sleep(0.002)
        return -0.5

    model = Model(see)
    verdicts = told(model, probes(64), timeout_s=0.05).check_batch(["a"] * 8, seed=list(range(8)))
    assert {verdict.reason for verdict in verdicts} == {"timeout"} and all(
        verdict.blocked for verdict in verdicts
    )


def test_a_timeout_of_something_else_is_an_error(told: Any) -> None:
    def see(request: Request, probe: int) -> float:
        raise TimeoutError("a file on the network")

    verdict = told(Model(see), probes(4)).check("a")
    assert verdict.reason == "error" and verdict.detail == "TimeoutError: a file on the network"


@pytest.mark.parametrize("timeout_s", [0, -1.0, NAN, "5", True])
def test_a_time_limit_is_positive(told: Any, timeout_s: Any) -> None:
    with pytest.raises(ValueError, match="timeout_s must be greater than 0 seconds"):
        told(Model(patterned), probes(4), timeout_s=timeout_s)
