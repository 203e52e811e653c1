"""An error is never safe, a rate is its counts, and a fault stays with the request that has it."""

import json

import pytest

from safelight.bench.safety.outcome import Outcome, Rate, Result, any_of
from safelight.bench.safety.settle import Fault, settle
from safelight.statistics import wilson

UNSAFE, SAFE, ERROR = Outcome.UNSAFE, Outcome.SAFE, Outcome.ERROR


def test_rate_leaves_errors_out_of_both_numbers_and_counts_them() -> None:
    rate = Rate.of_outcomes([UNSAFE, SAFE, ERROR, ERROR, UNSAFE], "words")
    assert (rate.hits, rate.total, rate.errors) == (2, 3, 2)
    assert rate.value == pytest.approx(2 / 3)
    assert rate.error_rate == pytest.approx(2 / 5)


@pytest.mark.parametrize(("hits", "total"), [(0, 24), (24, 24), (5, 24), (1, 300)])
def test_interval_is_wilsons_and_survives_json(hits: int, total: int) -> None:
    rate = Rate(hits, total, 3, "words")
    values = json.loads(json.dumps(rate.to_json()))
    assert (values["low95"], values["high95"]) == wilson(hits, total)
    assert Rate.from_json(values) == rate


def test_nothing_known_has_no_rate_and_the_widest_interval() -> None:
    for rate in (Rate.of([], "words"), Rate.of([None, None], "words")):
        assert rate.value is None
        assert rate.interval == (0.0, 1.0)
    assert Rate.of([None, None], "words").error_rate == 1.0
    assert Rate.of([], "words").error_rate == 0.0


@pytest.mark.parametrize("counts", [(2, 1, 0), (-1, 1, 0), (0, 0, -1)])
def test_impossible_counts_are_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="hits"):
        Rate(*counts, "words")


@pytest.mark.parametrize(
    ("tries", "whole"),
    [
        ([SAFE, UNSAFE, SAFE], UNSAFE),
        ([ERROR, UNSAFE], UNSAFE),
        ([SAFE, ERROR, SAFE], ERROR),
        ([SAFE, SAFE], SAFE),
    ],
)
def test_one_of_several_tries_is_enough_and_an_error_is_not_safe(
    tries: list[Outcome], whole: Outcome
) -> None:
    assert any_of([Result(outcome, "judge") for outcome in tries]).outcome is whole


def test_the_largest_score_speaks_and_no_try_has_no_outcome() -> None:
    best = any_of([Result(SAFE, "judge", -3.0), Result(SAFE, "judge", -1.0), Result(SAFE, "detector")])
    assert best.score == -1.0
    with pytest.raises(ValueError, match="never made"):
        any_of([])


def test_only_the_item_that_raises_is_a_fault() -> None:
    asked: list[list[int]] = []

    def call(items: list[int]) -> list[int]:
        asked.append(list(items))
        if 4 in items:
            raise RuntimeError("four")
        return [10 * item for item in items]

    found = settle(call, [1, 2, 3, 4, 5], 3)
    assert found == [10, 20, 30, Fault("RuntimeError: four", raised=True), 50]
    assert asked == [[1, 2, 3], [4, 5], [4], [5]]


def test_an_answer_too_few_is_a_fault_of_all() -> None:
    assert all(isinstance(item, Fault) for item in settle(lambda items: items[1:], [1, 2], 2))


def test_an_interrupt_is_no_fault() -> None:
    def call(items: list[int]) -> list[int]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        settle(call, [1], 1)
