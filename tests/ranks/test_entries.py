"""How often an update enters the library's Python: a bound for each unit and parameter, in every preset."""

from __future__ import annotations

import pytest
import torch

import sixfold
from sixfold.testing.entries import bound, entries
from tests.ranks import plain

WARM_UP = 2


def called_here() -> list[int]:
    return [sum(range(number)) for number in range(3)]


def test_counts_only_the_library() -> None:
    model = torch.nn.Linear(2, 2)
    assert entries(called_here).total() == 0
    counts = entries(
        lambda: sixfold.plan.cut_units(sixfold.parallel.module_facts(model, blocks=()).parameters)
    )
    assert counts["plan/units.py cut_units"] == 1
    assert counts["parallel/facts.py module_facts"] == 1


@pytest.mark.xfail(strict=True, reason="two to five times the aim, see docs/numbers.md")
@pytest.mark.ranks(2)
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_an_update_stays_within_the_bound(zero: int) -> None:
    task = plain.TASKS["decoder"]
    with plain.small_units():
        engine = sixfold.initialize(task.build(), config={"layout": {"zero": zero}})
    share = plain.rows(task.batch(0), plain.cuts(plain.NUM_SAMPLES, 2, "even", 0)[engine.data_rank])
    for _ in range(WARM_UP):
        engine.train_step(share)
    counts = entries(lambda: engine.train_step(share))
    most, num_units = bound(engine), len(engine.state.units)
    engine.close()
    assert num_units > 2
    assert counts.total() <= most, counts.most_common(12)
