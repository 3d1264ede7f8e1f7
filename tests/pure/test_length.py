"""Runs that are to take a time, played on a clock of our own: however wrong the first guess was."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import pytest

from sixfold.train.length import TimeBudget

SECONDS = 120.0


def play(
    guessed_s: float, seconds_of: Callable[[float], float], start: int = 0
) -> tuple[float, list[int], list[int]]:
    """The time that updates took, every length in turn, and after which updates they were corrected.

    Args:
        guessed_s: what an update takes according to the rehearsal.
        seconds_of: what one takes that begins at a time.
    """
    budget = TimeBudget(SECONDS, start)
    lengths, looks = [budget.guess(guessed_s)], []
    step, spent_s, last = start, 0.0, []
    while step < lengths[-1]:
        last.append(seconds_of(spent_s))
        spent_s, step = spent_s + last[-1], step + 1
        if budget.is_due(step):
            lengths.append(budget.correct(step, spent_s=spent_s, pace_s=median(last[-20:])))
            looks.append(step)
    return spent_s, lengths, looks


@pytest.mark.parametrize("start", [0, 1000])
@pytest.mark.parametrize("wrong", [0.01, 0.1, 0.5, 1.0, 3.0, 10.0, 60.0, 100.0, 1000.0])
def test_a_rehearsal_under_load_or_by_luck_leaves_the_time_as_it_is(wrong: float, start: int) -> None:
    spent_s, lengths, _ = play(0.5 * wrong, lambda now: 0.5, start)
    assert lengths[0] == start + max(1, round(240 / wrong))
    assert lengths[-1] == start + 240
    assert spent_s == SECONDS


@pytest.mark.parametrize(
    ("seconds_of", "what"),
    [
        (lambda now: 0.5 if now < 60 else 1.5, "slower from the middle on"),
        (lambda now: 1.5 if now < 60 else 0.5, "faster from the middle on"),
        (lambda now: 1.5 if now % 40 < 20 else 0.5, "now and then"),
        (lambda now: 0.5 if now < 110 else 0.01, "much faster in the end"),
    ],
)
def test_who_computes_besides_changes_the_number_of_updates_and_hardly_the_time(
    seconds_of: Callable[[float], float], what: str
) -> None:
    spent_s, _, looks = play(0.5, seconds_of)
    assert spent_s == pytest.approx(SECONDS, rel=1 / 8), what
    assert len(looks) < 40


@pytest.mark.parametrize("guessed", [1, 2, 3])
def test_a_first_update_that_is_slow_does_not_end_the_run(guessed: int) -> None:
    spent_s, lengths, _ = play(SECONDS / guessed, lambda now: 0.5 if now else 60.0)
    assert lengths[0] == guessed
    assert spent_s == pytest.approx(SECONDS, abs=0.5)


def test_a_length_that_drifts_is_told_when_it_has_come_far() -> None:
    budget = TimeBudget(SECONDS)
    assert budget.guess(1.2) == 100
    drift = [(length, budget.outdated(length)) for length in range(104, 129, 4)]
    assert [(length, before) for length, before in drift if before is not None] == [(112, 100), (124, 112)]


def test_a_length_is_corrected_early_and_seldom() -> None:
    _, _, looks = play(0.01, lambda now: 0.01)
    assert looks[:8] == [4, 8, 16, 32, 64, 128, 256, 512]
    assert len(looks) < 30


def test_updates_longer_than_the_time_are_made_once() -> None:
    assert TimeBudget(SECONDS, start=7).guess(1000.0) == 8
    assert TimeBudget(SECONDS).correct(4, spent_s=500.0, pace_s=1.0) == 5, "the last one ends the schedule"
    budget = TimeBudget(SECONDS)
    assert budget.guess(1.0) == 120
    assert budget.correct(120, spent_s=500.0, pace_s=1.0) == 120, "it has ended"
