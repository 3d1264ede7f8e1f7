"""Where models can be cut into stages, and the stages of one rank.

Called by `initialize`. The order of a model's parts is found in an nn.Sequential, taken from a Hugging Face
model's own plan, or said by the model; costs are estimated from shapes. How a stage runs is `stage.py`. It
moves no numbers and sends nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from sixfold.base.errors import ModelError
from sixfold.config import LayoutConfig
from sixfold.parallel.stage import PARTS, Border, Stage, Watch, children_of, view_of
from sixfold.plan import BlockCosts, Geometry, ParameterFacts, StagePlan, decide_stages


@dataclass(frozen=True)
class Parts:
    """What a model runs in which order, by names of modules.

    Args:
        before: embeddings and the like; a part that the head uses as well stands in both.
        blocks: one after the other, each with what the one before returned as its first argument.
        after: norm and head.
    """

    before: tuple[str, ...]
    blocks: tuple[str, ...]
    after: tuple[str, ...]

    def stages_of(self, name: str, plan: StagePlan) -> set[int]:
        """The stages that run the part which holds a parameter or module."""
        found = {0} if any(_is_in(name, part) for part in self.before) else set()
        found |= {plan.last} if any(_is_in(name, part) for part in self.after) else set()
        for stage, blocks in enumerate(plan.blocks):
            found |= {stage} if any(_is_in(name, self.blocks[place]) for place in blocks) else set()
        return found


def _is_in(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")


def find_parts(model: nn.Module) -> Parts:
    """The parts of a model that can be cut into stages.

    Raises:
        ModelError: no way to cut it is known, with the reason.
    """
    declared, plan = getattr(model, PARTS, None), getattr(model, "pp_plan", None)
    if declared is not None:
        parts = _declared(model, tuple(declared))
    elif isinstance(model, nn.Sequential):
        parts = Parts((), tuple(children_of(model)), ())
    elif isinstance(plan, Mapping) and plan:
        parts = _planned(model, plan)
    else:
        raise _uncuttable(model, "it is no nn.Sequential, and says nothing of the order of its parts")
    inside = (*parts.before, *parts.blocks, *parts.after)
    strangers = [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if not any(_is_in(name, part) for part in inside)
    ]
    if strangers:
        raise _uncuttable(model, f"no part of it holds {', '.join(strangers[:4])}")
    return parts


def _declared(model: nn.Module, names: tuple[str, ...]) -> Parts:
    places = [
        place
        for place, name in enumerate(names)
        if isinstance(model.get_submodule(name), nn.ModuleList | nn.Sequential)
    ]
    if len(places) != 1:
        raise _uncuttable(model, f"{PARTS} names {len(places)} lists of blocks")
    (place,) = places
    blocks = tuple(f"{names[place]}.{name}" for name in children_of(model.get_submodule(names[place])))
    return Parts(names[:place], blocks, names[place + 1 :])


def _planned(model: nn.Module, plan: Mapping[str, Any]) -> Parts:
    """From the pipeline plan of a Hugging Face model: part -> (names of inputs, names of outputs)."""
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        raise _uncuttable(model, "its loss takes the routing of all layers (output_router_logits)")
    here = {name for name, _ in model.named_modules()}
    if not here.issuperset(plan):
        missing = ", ".join(sorted(plan.keys() - here))
        raise _uncuttable(model, f"its pipeline plan names {missing}, and it has no such part")
    lists = [name for name in plan if isinstance(model.get_submodule(name), nn.ModuleList)]
    if len(lists) != 1:
        raise _uncuttable(model, f"its pipeline plan names {len(lists)} lists of blocks")
    early = {"input_ids", "inputs_embeds"}
    before = tuple(name for name, (inputs, _) in plan.items() if early & set(inputs))
    blocks = tuple(f"{lists[0]}.{name}" for name in children_of(model.get_submodule(lists[0])))
    after = [name for name in plan if name not in (*before, lists[0])]
    # Heads that no plan names, such as a classifier: what stands beside the base model runs behind it.
    base = getattr(model, "base_model_prefix", "")
    after += [name for name, _ in model.named_children() if name != base and name not in plan]
    return Parts(before, blocks, tuple(after))


def _uncuttable(model: nn.Module, reason: str) -> ModelError:
    return ModelError(
        f"layout.pipe with {type(model).__name__}: {reason}",
        rule="a model that is cut into stages is an nn.Sequential, a Hugging Face model with a pipeline "
        "plan (model.pp_plan), or names its parts in the order in which they run",
        fix=f'for example model.{PARTS} = ("embed", "layers", "norm", "head"), with a ModuleList "layers" '
        "whose blocks run one after the other; or set layout.pipe = 1",
    )


def block_costs(model: nn.Module, parts: Parts) -> BlockCosts:
    """Estimated costs: parameters that a token is multiplied with; a table that is only looked up counts as
    one row."""

    def cost(name: str, *, is_lookup: bool = True) -> float:
        total = 0.0
        for module in model.get_submodule(name).modules():
            if is_lookup and isinstance(module, nn.Embedding | nn.EmbeddingBag):
                total += module.embedding_dim
            else:
                total += sum(parameter.numel() for parameter in module.parameters(recurse=False))
        return total

    return BlockCosts(
        tuple(map(cost, parts.blocks)),
        sum(map(cost, parts.before)),
        sum(cost(name, is_lookup=False) for name in parts.after),
    )


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
    def decide(cls, model: nn.Module, layout: LayoutConfig) -> ModelCut:
        """Decide where `model` is cut.

        Raises:
            ModelError: no way to cut it is known.
            PlanError: not into so many stages.
        """
        if layout.pipe == 1:
            return cls(model, Parts((), (), ()), None, {})
        parts = find_parts(model)
        plan = decide_stages(layout, block_costs(model, parts))
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
        return Stage(number, module, own, border, mirrors, is_last, Watch(own_blocks))


def _holders(model: nn.Module, parts: Parts, plan: StagePlan) -> dict[str, tuple[int, ...]]:
    stages: dict[int, set[int]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        stages.setdefault(id(parameter), set()).update(parts.stages_of(name, plan))
    return {name: tuple(sorted(stages[id(parameter)])) for name, parameter in model.named_parameters()}
