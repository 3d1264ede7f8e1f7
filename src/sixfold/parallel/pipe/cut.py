"""Where models can be cut into stages, and the stages of one rank.

Called by `initialize`. The order of a model's parts is known to `parts.py`, what they cost to `costs.py`; how
a stage runs is `stage.py`. It moves no numbers and sends nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from sixfold.config import LayoutConfig
from sixfold.parallel.pipe.costs import estimated_costs
from sixfold.parallel.pipe.parts import Parts, find_parts
from sixfold.parallel.pipe.stage import BlockOrder, Border, Stage, view_of
from sixfold.plan import BlockCosts, Geometry, ParameterFacts, StagePlan, decide_stages


@dataclass(frozen=True)
class ModelCut:
    """A model and where it is cut.

    Args:
        parts: what it runs in which order.
        plan: its stages; None in a pipeline of one stage.
        holders: the stages that hold each parameter, by its first name.
    """

    model: nn.Module
    parts: Parts
    plan: StagePlan | None
    holders: Mapping[str, tuple[int, ...]]

    @classmethod
    def decide(cls, model: nn.Module, layout: LayoutConfig, costs: BlockCosts | None = None) -> ModelCut:
        """Decide where `model` is cut.

        Args:
            costs: of its parts; None: estimated from shapes.

        Raises:
            ModelError: no way to cut it is known.
            PlanError: not into so many stages.
        """
        if layout.pipe == 1:
            return cls(model, Parts((), (), ()), None, {})
        parts = find_parts(model)
        plan = decide_stages(layout, costs or estimated_costs(model, parts))
        holders = _holders(model, parts, plan)
        ties = sorted({stages for stages in holders.values() if len(stages) > 1})
        return cls(model, parts, replace(plan, ties=tuple(ties)), holders)

    def facts_of(self, facts: Sequence[ParameterFacts], pipe_rank: int) -> Sequence[ParameterFacts]:
        """Facts of the parameters of a rank's stages, one stage after the other.

        Args:
            facts: of the whole model.
        """
        if self.plan is None:
            return facts
        return [
            replace(
                each,
                stage=stage,
                tied=self.holders[each.name] if len(self.holders[each.name]) > 1 else (),
                block=each.block if len(self.holders[each.name]) == 1 else None,
            )
            for stage in sorted(self.plan.ranks[pipe_rank])
            for each in facts
            if stage in self.holders[each.name]
        ]

    def buffer_sources(self, geometry: Geometry) -> dict[str, int]:
        """A rank whose stage uses each buffer; none in a pipeline of one stage."""
        if self.plan is None:
            return {}
        stages = {name: self.parts.stages_of(name, self.plan) for name, _ in self.model.named_buffers()}
        return {
            name: geometry.first_rank(self.plan.rank_of(min(found)))
            for name, found in stages.items()
            if found
        }

    def stages(self, pipe_rank: int) -> list[Stage]:
        """The stages of one rank, in order.

        A parameter that several of them hold (tied weights) is the model's own in the first of them, and a
        copy in the others.
        """
        if self.plan is None:
            return [Stage.whole(self.model)]
        named = dict(self.model.named_parameters())
        taken: set[str] = set()
        stages = []
        for number in sorted(self.plan.ranks[pipe_rank]):
            own = {
                name: nn.Parameter(torch.empty_like(parameter), parameter.requires_grad)
                if name in taken
                else parameter
                for name, parameter in named.items()
                if number in self.holders[name]
            }
            taken.update(own)
            stages.append(self._stage(self.plan, number, own, named))
        return stages

    def _stage(
        self, plan: StagePlan, number: int, own: Mapping[str, nn.Parameter], named: Mapping[str, nn.Parameter]
    ) -> Stage:
        parts, blocks, is_last = self.parts, plan.blocks[number], number == plan.last
        border = Border() if number > 0 else None
        elsewhere: dict[str, Border | None] = {}
        if not is_last:
            elsewhere |= {name: None for name in parts.after if name not in parts.before}
        if number > 0:
            elsewhere |= dict.fromkeys(parts.before, border)
        elsewhere |= {
            name: border if place < blocks.start else None
            for place, name in enumerate(parts.blocks)
            if place not in blocks
        }
        copies = {id(named[name]): each for name, each in own.items() if each is not named[name]}
        module, mirrors = view_of(self.model, elsewhere, copies)
        # The order of an nn.Sequential is certain, and what its children return is the next one's affair.
        is_certain = isinstance(self.model, nn.Sequential)
        own_blocks = () if is_certain else [self.model.get_submodule(parts.blocks[place]) for place in blocks]
        return Stage(number, module, own, border, mirrors, is_last, BlockOrder(own_blocks))


def _holders(model: nn.Module, parts: Parts, plan: StagePlan) -> dict[str, tuple[int, ...]]:
    stages: dict[int, set[int]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        stages.setdefault(id(parameter), set()).update(parts.stages_of(name, plan))
    return {name: tuple(sorted(stages[id(parameter)])) for name, parameter in model.named_parameters()}
