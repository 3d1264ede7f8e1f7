"""What a rank decides alone, before it meets the others: its device, the plan, and how the model is cut.

Called by `initialize`, which goes by the answer in all that it does. Other rooms decide; here they are asked,
in an order in which each has what it needs. No weight is touched.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from sixfold.config import Config
from sixfold.engine.admission import check_block_options, check_capacity, check_model
from sixfold.engine.device import own_device
from sixfold.launch import Placement, discover
from sixfold.parallel import ModelCut, ModuleFacts, block_names, decide_axes, module_facts
from sixfold.parallel.change import AxisChange
from sixfold.plan import Geometry, Plan, decide, decide_geometry, placed
from sixfold.state import optimized_facts


@dataclass(frozen=True)
class Decision:
    """What is decided of a model. Later stages are cut anew where costs are measured, and the groups of the
    optimizers refine its units.

    Args:
        model: as it was handed over.
        device: where this rank computes.
        rank: this process, among all.
        address: "host:port" where ranks meet; None where it is not known.
        blocks: names of the model's repeated blocks.
        facts: of its parameters.
        cut: into stages.
        axes: what the tensor, context and expert axes make of it.
    """

    model: nn.Module
    asked: Config
    device: torch.device
    rank: int
    address: str | None
    geometry: Geometry
    blocks: list[str]
    facts: ModuleFacts
    cut: ModelCut
    axes: AxisChange

    def plan(self) -> Plan:
        """This rank's plan.

        Raises:
            PlanError: there is none.
        """
        pieces = placed(self.facts.parameters, self.axes.places)
        mine = self.cut.facts_of(pieces, self.geometry.coordinate(self.rank, "pipe"))
        return decide(self.asked, mine, self.geometry.world_size, self.cut.plan)

    def grouped(self, optimizers: Sequence[Optimizer]) -> Decision:
        """The same, with parameters in the groups of their optimizers."""
        return replace(self, facts=optimized_facts(self.model, optimizers, self.blocks))


def decide_alone(
    model: nn.Module, asked: Config, device: torch.device | str | None, *, owns_loss: bool
) -> Decision:
    """Decide for `model` as it was handed over; what cannot run is refused here, before any weight is made.

    Args:
        device: as given to `initialize`.
        owns_loss: whether the model computes its loss by itself.

    Raises:
        ConfigError, ModelError, PlanError: it cannot be trained so, with a change that works.
    """
    check_model(model, asked)
    check_capacity(model, asked.layout)
    # A script that formed its process group itself has placed this process already.
    placement = None if dist.is_initialized() else discover(os.environ)
    place = own_device(device, placement)
    blocks = block_names(model, asked.layout.blocks)
    check_block_options(model, blocks, asked.layout, place)
    rank, geometry = _rank(placement), decide_geometry(asked.layout, _world_size(placement))
    decided = Decision(
        model=model,
        asked=asked,
        device=place,
        rank=rank,
        address=_address(placement),
        geometry=geometry,
        blocks=blocks,
        facts=module_facts(model, blocks=blocks),
        cut=ModelCut.decide(model, asked.layout),
        axes=decide_axes(model, asked.layout, geometry, rank, owns_loss=owns_loss),
    )
    decided.plan()
    return decided


def _world_size(placement: Placement | None) -> int:
    if dist.is_initialized():
        return dist.get_world_size()
    return placement.world_size if placement else 1


def _rank(placement: Placement | None) -> int:
    if dist.is_initialized():
        return dist.get_rank()
    return placement.rank if placement else 0


def _address(placement: Placement | None) -> str | None:
    """Where the ranks meet or, in a process group that the script formed, most likely met."""
    if placement is not None:
        return f"{placement.master_addr}:{placement.master_port}"
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    return f"{host}:{port}" if host and port and dist.is_initialized() else None
