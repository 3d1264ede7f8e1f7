"""What a model runs in which order, so that it can be cut between its parts.

Asked by `cut.py`. The order is found in an nn.Sequential, taken from a Hugging Face model's own plan, or
said by the model. It cuts nothing and runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sixfold.base.errors import ModelError
from sixfold.parallel.pipe.stage import PARTS, children_of
from sixfold.plan import StagePlan


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
