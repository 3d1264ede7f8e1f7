"""Where a model is cut into stages: contiguous ranges of its blocks, by cost or as asked.

Decided once from plain numbers before any weight is made; `parallel.pipe` carries it out. It knows no module
and no schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import inf

from sixfold.base.errors import PlanError
from sixfold.config import LayoutConfig
from sixfold.program import stages_of


@dataclass(frozen=True)
class BlockCosts:
    """What the parts of a model cost in one forward, in any unit.

    Args:
        blocks: of each block, in order.
        before: of what runs before the first one (embeddings).
        after: of what runs behind the last one (norm and head).
    """

    blocks: tuple[float, ...]
    before: float = 0.0
    after: float = 0.0


@dataclass(frozen=True)
class StagePlan:
    """The stages of a pipeline.

    Args:
        blocks: of each stage the blocks [start, stop); what runs before the first belongs to the first stage,
            what runs behind the last to the last.
        costs: of each stage, as parts of the whole.
        ranks: stages of each rank of the pipeline, in the order in which a micro-batch passes them.
        ties: sets of stages that hold some weights in common.
    """

    blocks: tuple[range, ...]
    costs: tuple[float, ...]
    ranks: tuple[tuple[int, ...], ...]
    ties: tuple[tuple[int, ...], ...] = ()

    @property
    def last(self) -> int:
        """The stage that computes the loss."""
        return len(self.blocks) - 1

    def rank_of(self, stage: int) -> int:
        """The rank of the pipeline that has a stage."""
        return next(rank for rank, stages in enumerate(self.ranks) if stage in stages)

    def __str__(self) -> str:
        return "; ".join(
            f"rank {rank}: "
            + ", ".join(
                f"stage {stage} with {len(self.blocks[stage])} block(s) ({self.costs[stage]:.0%})"
                for stage in stages
            )
            for rank, stages in enumerate(self.ranks)
        )


def decide_stages(layout: LayoutConfig, costs: BlockCosts) -> StagePlan:
    """Cut a model into the stages that `layout` asks for.

    Without `layout.balance` the dearest stage is as cheap as it can be with every stage a range of whole
    blocks. The last stage may be what runs behind the blocks alone.

    Raises:
        PlanError: there are too few blocks, or `layout.balance` does not add up to their number.
    """
    ranks = stages_of(layout.schedule or "1f1b", layout.pipe, layout.virtual_stages)
    num_stages = sum(map(len, ranks))
    if layout.balance is not None:
        if sum(layout.balance) != len(costs.blocks):
            raise PlanError(
                f"layout.balance = {list(layout.balance)}, together {sum(layout.balance)} blocks",
                rule=f"every block is in one stage, and the model has {len(costs.blocks)}",
                fix=f"give {num_stages} numbers that add up to {len(costs.blocks)}",
            )
        sizes = layout.balance
    else:
        least = num_stages if not costs.after else num_stages - 1
        if len(costs.blocks) < least:
            raise PlanError(
                f"{num_stages} stages for a model of {len(costs.blocks)} blocks",
                rule="a stage has at least one block; the last one may have the head alone",
                fix=f"set layout.pipe = {max(1, len(costs.blocks) // max(map(len, ranks)))} or less, or "
                "fewer layout.virtual_stages",
            )
        sizes = _cheapest(costs, num_stages)
    stops = list(accumulate(sizes))
    blocks = tuple(range(stop - size, stop) for size, stop in zip(sizes, stops, strict=True))
    own = [sum(costs.blocks[place] for place in each) for each in blocks]
    own[0] += costs.before
    own[-1] += costs.after
    whole = sum(own) or 1.0
    return StagePlan(blocks, tuple(cost / whole for cost in own), ranks)


def _cheapest(costs: BlockCosts, num_stages: int) -> tuple[int, ...]:
    """Sizes of the stages whose dearest is cheapest, and the others as even as goes with that."""
    sums = [0.0, *accumulate(costs.blocks)]
    num_blocks = len(costs.blocks)
    fewest_last = 0 if costs.after and num_stages > 1 else 1

    @cache
    def best(stage: int, start: int) -> tuple[float, float, tuple[int, ...]]:
        """For the stages from `stage` on, with the blocks from `start` on: the dearest, the sum of squares,
        and their sizes."""
        before = costs.before if stage == 0 else 0.0
        if stage == num_stages - 1:
            size = num_blocks - start
            cost = before + sums[num_blocks] - sums[start] + costs.after
            return (cost if size >= fewest_last else inf), cost**2, (size,)
        found: tuple[float, float, tuple[int, ...]] = (inf, inf, ())
        for size in range(num_blocks - start, 0, -1):
            cost = before + sums[start + size] - sums[start]
            dearest, squares, sizes = best(stage + 1, start + size)
            found = min(found, (max(dearest, cost), squares + cost**2, (size, *sizes)))
        return found

    return best(0, 0)[2]
