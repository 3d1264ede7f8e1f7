"""Where models are cut: by cost, evenly, or as asked, and never into something else than ranges of blocks."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sixfold.base.errors import ConfigError, PlanError
from sixfold.config import LayoutConfig, layout_rules, load
from sixfold.plan import BlockCosts, StagePlan, decide_stages
from sixfold.program import SCHEDULES, splits_backward

COSTS = st.floats(0.0, 10.0)


def decided(costs: BlockCosts, **layout: object) -> StagePlan:
    return decide_stages(LayoutConfig(**layout), costs)  # type: ignore[arg-type]


def dearest(costs: BlockCosts, borders: tuple[int, ...]) -> float:
    edges = (0, *borders, len(costs.blocks))
    sums = [sum(costs.blocks[start:stop]) for start, stop in pairwise(edges)]
    sums[0] += costs.before
    sums[-1] += costs.after
    return max(sums)


@given(blocks=st.lists(COSTS, min_size=3, max_size=9), before=COSTS, after=COSTS, pipe=st.integers(2, 3))
def test_no_other_cut_has_a_cheaper_dearest_stage(
    blocks: list[float], before: float, after: float, pipe: int
) -> None:
    costs = BlockCosts(tuple(blocks), before, after)
    plan = decided(costs, pipe=pipe)
    assert [place for each in plan.blocks for place in each] == list(range(len(blocks)))
    fewest_last = 0 if after else 1
    tried = combinations(range(1, len(blocks) + 1 - fewest_last), pipe - 1)
    best = min(dearest(costs, borders) for borders in tried)
    found = dearest(costs, tuple(each.start for each in plan.blocks[1:]))
    assert found == pytest.approx(best, abs=1e-9)
    assert sum(plan.costs) == pytest.approx(1.0 if any((*blocks, before, after)) else 0.0)


def test_equal_blocks_are_shared_out_evenly() -> None:
    sizes = [len(each) for each in decided(BlockCosts((1.0,) * 7), pipe=3).blocks]
    assert sorted(sizes) == [2, 2, 3]


def test_a_dear_head_is_a_stage_of_its_own() -> None:
    plan = decided(BlockCosts((1.0,) * 3, after=9.0), pipe=2)
    assert plan.blocks == (range(3), range(3, 3))
    assert "rank 1: stage 1 with 0 block(s) (75%)" in str(plan)


def test_balance_is_obeyed() -> None:
    plan = decided(
        BlockCosts((1.0,) * 6), pipe=2, schedule="interleaved", virtual_stages=2, balance=(1, 2, 2, 1)
    )
    assert plan.blocks == (range(1), range(1, 3), range(3, 5), range(5, 6))
    assert plan.ranks == ((0, 2), (1, 3))
    assert [plan.rank_of(stage) for stage in range(4)] == [0, 1, 0, 1]
    with pytest.raises(PlanError, match="together 7 blocks"):
        decided(BlockCosts((1.0,) * 6), pipe=2, balance=(3, 4))


def test_too_few_blocks_are_refused() -> None:
    with pytest.raises(PlanError, match=r"set layout.pipe = 1 or less"):
        decided(BlockCosts((1.0, 1.0, 1.0)), pipe=2, schedule="zero-bubble-v")


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({"schedule": "gpipe"}, "set layout.pipe to the number"),
        ({"balance": [2, 2], "virtual_stages": 2}, "layout.virtual_stages and layout.balance"),
        ({"pipe": 2, "virtual_stages": 2}, "interleaved"),
        ({"pipe": 2, "schedule": "interleaved"}, "layout.virtual_stages"),
        ({"pipe": 2, "schedule": "zero-bubble-v", "virtual_stages": 3}, "2 stage"),
        ({"pipe": 2, "balance": [1, 2, 3]}, "give 2 numbers"),
        ({"pipe": 2, "balance": [1, 2], "cost": "measured"}, "only one of them"),
        ({"cost": "measured"}, "layout.cost is about several ranks along the pipe axis"),
        ({"pipe": 2, "schedule": "zero-bubble-h1", "compile": "inductor"}, "1f1b"),
    ],
)
def test_options_that_do_not_go_together_are_refused(layout: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(values={"layout": layout})


def test_rules_of_the_configuration_know_the_schedules_as_they_are() -> None:
    """It stands below the room that writes them, so it has some facts of its own."""
    for name, schedule in SCHEDULES.items():
        assert layout_rules._NUM_VIRTUAL.get(name, 1) == schedule.num_virtual
        assert name.startswith("zero-bubble") == splits_backward(name)
