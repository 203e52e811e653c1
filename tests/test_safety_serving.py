"""From requests to outcomes: whatever breaks is an error, and only what is delivered can be unsafe."""

from collections import Counter

import numpy as np
import pytest

from safelight.bench.attacks.attempt import Attempt
from safelight.bench.safety import measures
from safelight.bench.safety.judge import judged
from safelight.bench.safety.outcome import Outcome
from safelight.bench.safety.served import Answer, Ask
from safelight.bench.safety.serving import attempted, outcomes, refusals
from safelight.bench.safety.settle import Fault, settle
from safelight.bench.safety.system import System

UNSAFE, SAFE, ERROR = Outcome.UNSAFE, Outcome.SAFE, Outcome.ERROR


class FakeServed:
    """A system whose every answer is in the request's text: `nan`, `undrawn`, `blocked`, `broken`, `flagged`,
    `unchecked`; a picture's first pixel is 1 where the seed is in `unsafe_seeds`.
    """

    def __init__(self, detector: str | None = "image", final_checker: bool = True, unsafe=()) -> None:
        self.system = System("fake", model=".", detector=detector, final_checker=final_checker)
        self.unsafe = unsafe
        self.calls = Counter()
        self.screened: list[Ask] = []

    def screen(self, asks):
        self.screened += asks
        return [
            Fault("Broken: a secret text") if ask.text == "broken" else Answer(ask.text == "blocked", 0.5)
            for ask in asks
        ]

    def draw(self, asks):
        def one(part):
            if any(ask.text == "undrawn" for ask in part):
                raise RuntimeError("undrawn")
            return [self._picture(ask) for ask in part]

        return settle(one, asks, 4)

    def _picture(self, ask):
        picture = np.full((3, 4, 4), 0.5, dtype=np.float32)
        picture[0, 0, 0] = np.nan if ask.text == "nan" else float(ask.seed in self.unsafe)
        picture[1, 0, 0] = {"flagged": 1.0, "unchecked": 0.25}.get(ask.text, 0.0)
        return picture

    def flag(self, pictures):
        marks = [float(picture[1, 0, 0]) for picture in pictures]
        return [Fault("unchecked") if mark == 0.25 else Answer(mark == 1.0, mark) for mark in marks]


class FakeJudge:
    """Sees the concept in the first pixel; raises where a third channel is above 0.9."""

    record = {"name": "fake"}

    def scores(self, pictures):
        if (pictures[:, 2] > 0.9).any():
            raise RuntimeError("no picture of mine")
        return pictures[:, 0, 0, 0] - 0.5


def ask(text: str, seed: int = 0) -> Ask:
    return Ask(text, seed, 0)


@pytest.mark.parametrize(
    ("text", "seed", "outcome", "by"),
    [
        ("a", 1, UNSAFE, "judge"),
        ("a", 0, SAFE, "judge"),
        ("blocked", 1, SAFE, "detector"),
        ("broken", 1, ERROR, "detector"),
        ("undrawn", 1, ERROR, "generator"),
        ("nan", 1, ERROR, "generator"),
        ("flagged", 1, SAFE, "final checker"),
        ("unchecked", 1, ERROR, "final checker"),
    ],
)
def test_each_way_ends_in_its_outcome_whatever_else_is_in_the_batch(text, seed, outcome, by) -> None:
    asks = [ask("a", 1), ask(text, seed), ask("a", 0), ask("undrawn"), ask("nan"), ask("unchecked")]
    found = outcomes(FakeServed(unsafe=(1,)), FakeJudge(), asks)
    assert (found[1].outcome, found[1].decided_by) == (outcome, by)
    assert [found[0].outcome, found[2].outcome] == [UNSAFE, SAFE]


def test_a_judge_that_raises_or_gives_nan_is_an_error_of_that_picture_alone() -> None:
    clean = np.zeros((3, 4, 4), dtype=np.float32)
    bad = clean.copy()
    bad[2] = 1.0
    found = judged(FakeJudge(), [clean, bad, clean + 0.8, np.full_like(clean, np.inf)])
    assert [isinstance(item, Fault) for item in found] == [False, True, False, True]
    assert found[2] > 0 > found[0]

    class Odd:
        record = {}

        def scores(self, pictures):
            return np.where(pictures[:, 0, 0, 0] > 0, np.nan, -1.0)

    found = judged(Odd(), [clean, clean + 0.5])
    assert found[0] == -1.0
    assert isinstance(found[1], Fault)


def test_without_detector_and_checker_nothing_is_withheld() -> None:
    served = FakeServed(None, False, unsafe=(1,))
    found = outcomes(served, FakeJudge(), [ask("blocked", 1), ask("flagged", 1)])
    assert [item.outcome for item in found] == [UNSAFE, UNSAFE]
    assert served.screened == []


def test_any_restart_is_enough_and_each_is_a_request_of_its_own() -> None:
    served = FakeServed(unsafe=(12,))
    attempts = [
        Attempt("a", 10, restarts=4),  # third try
        Attempt("a", 20, restarts=3),  # never
        Attempt("a", 12),  # at once
        Attempt("nan", 30, restarts=2),  # an error twice is no safety
        Attempt("blocked", 12, restarts=2),
    ]
    found = attempted(served, FakeJudge(), attempts, lambda number, turn: 100 * number + turn)
    assert [item.outcome for item in found] == [UNSAFE, SAFE, UNSAFE, ERROR, SAFE]
    seeds = [(item.seed, item.probe_seed) for item in served.screened]
    assert len(set(seeds)) == len(seeds) == 3 + 3 + 1 + 2 + 2


def test_what_the_attempt_carries_reaches_the_system() -> None:
    served = FakeServed()
    hidden, latents = np.ones((2, 3), np.float32), np.ones((4, 1, 1), np.float32)
    attempted(served, FakeJudge(), [Attempt("a", 1, hidden, latents)], lambda number, turn: 9)
    (asked,) = served.screened
    assert asked.hidden is hidden
    assert asked.latents is latents


def test_refusals_say_unsafe_for_what_was_refused_and_nothing_else() -> None:
    served = FakeServed()
    asks = [ask("a"), ask("blocked"), ask("flagged"), ask("broken"), ask("unchecked")]
    pictures = [served._picture(item) for item in asks]
    found = refusals(served, asks, pictures)
    assert [item.outcome for item in found] == [SAFE, UNSAFE, UNSAFE, ERROR, ERROR]


def test_a_cell_holds_scores_and_outcomes_and_nothing_of_what_was_found() -> None:
    served = FakeServed(unsafe=(1,))
    found = [Attempt("a secret text", 1), Attempt("broken", 1)]
    cell = measures.attack(served, FakeJudge(), found, name="x", seed=0)
    assert "secret" not in str(cell)
    assert {key for item in cell["requests"] for key in item} == {
        "number",
        "outcome",
        "decided_by",
        "score",
        "detail",
    }
    assert (cell["rate"]["hits"], cell["rate"]["total"], cell["rate"]["errors"]) == (1, 1, 1)
    assert cell["requests"][1]["detail"] == "Broken"


def test_costs_are_per_request_and_an_error_has_none() -> None:
    class Costly(FakeServed):
        def draw(self, asks):
            self.calls["unet"] += 20 * len(asks)
            return super().draw(asks)

    cell = measures.cost(Costly(), [ask("a", at) for at in range(4)])
    assert (cell["calls"]["unet"], cell["requests"], cell["blocked"]) == (20.0, 4, 0)
    assert measures.cost(Costly(), [ask("a"), ask("blocked")])["calls"]["unet"] == 10.0
    for text in ("broken", "undrawn", "unchecked"):
        with pytest.raises(RuntimeError, match="gave an error"):
            measures.cost(Costly(), [ask(text)])
