"""`sixfold.initialize`: from a module and a configuration to an engine.

Called once per model on every rank. It decides nothing itself: configuration, placement, plan, mesh,
weights, optimizer and state come from their rooms, in this order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sixfold.config import Config, Resolved, load
from sixfold.engine.admission import check_agreement, check_batch_stats, check_model, tell_idle_settings
from sixfold.engine.engine import Engine
from sixfold.engine.persistence import Persistence
from sixfold.launch import Placement, discover
from sixfold.mesh import Mesh, Streams
from sixfold.parallel import materialize, module_facts, move_buffers
from sixfold.pipeline import LossForm
from sixfold.plan import decide, decide_learning_rate
from sixfold.state import ModelState, bind, build_optimizer, make_optimizer, refuse_two_definitions
from sixfold.state.optimizer import OptimizerLike

LossFn = Callable[[Any, Any], Any]
ConfigLike = str | Path | Mapping[str, Any] | Config | Resolved | None


def initialize(
    model: nn.Module,
    *,
    config: ConfigLike = None,
    optimizer: OptimizerLike | None = None,
    loss_fn: LossFn | None = None,
    device: torch.device | str | None = None,
) -> Engine:
    """Make `model` trainable on every rank of this job.

    Args:
        model: any module, the same on every rank. With weights it keeps them (rank 0's); on the meta
            device it is initialised by its own rules, the same for every layout.
        config: a TOML, YAML or JSON file, a dictionary, or a Config.
        optimizer: a torch optimizer over the model's parameters, a factory that receives them, or
            None for the one that `config` names.
        loss_fn: `loss_fn(output, batch)` returning a loss or a pair (sum, weight); None when the
            model returns its loss.
        device: where this rank computes. None: its GPU where there is one, else the CPU.

    Raises:
        ConfigError, PlanError, ModelError, MeshError: before any training, with a change that works.
    """
    resolved = _resolve(config)
    asked = resolved.config
    if not isinstance(config, Resolved):
        tell_idle_settings(resolved)
    check_model(model, asked)
    learning_rate = decide_learning_rate(asked)
    if not isinstance(config, Resolved):
        learning_rate.check_end()
    # A script that formed its process group itself has placed this process already.
    placement = None if dist.is_initialized() else discover(os.environ)
    place = torch.device(device) if device is not None else _own_device(placement)
    facts = module_facts(model, blocks=asked.layout.blocks)
    # Decided once on the model as it was handed over, so that what cannot run is refused before any
    # weight is made; the optimizer's groups, known only later, refine the units.
    draft = decide(asked, facts.parameters, _world_size(placement))
    mesh = Mesh.form(
        draft.geometry,
        place,
        rank=_rank(placement),
        address=f"{placement.master_addr}:{placement.master_port}" if placement else None,
        timeout_s=asked.launch.timeout_s,
    )
    check_agreement(mesh, model, facts, asked)
    check_batch_stats(facts, asked, mesh)
    refuse_two_definitions(asked.optimizer, optimizer)
    streams = Streams(asked.seed, place)
    if facts.on_meta:
        materialize(model, asked.seed, mesh)
    move_buffers(model, place)
    made = make_optimizer(optimizer or build_optimizer(asked.optimizer), model)
    groups = [group["params"] for group in made.param_groups]
    facts = module_facts(model, groups, blocks=asked.layout.blocks)
    plan = decide(asked, facts.parameters, mesh.world_size)
    prefetch_mb = asked.layout.prefetch_mb
    state = ModelState(model, plan, mesh, None if prefetch_mb is None else round(prefetch_mb * 1e6))
    state.share_buffers(model.buffers())
    bound = bind(made, state)
    return Engine(
        module=model,
        resolved=resolved,
        plan=plan,
        mesh=mesh,
        streams=streams,
        state=state,
        bound=bound,
        loss_form=LossForm(model, loss_fn),
        persistence=Persistence(
            model, mesh, state, bound, facts.aliases, keeps_settings=optimizer is not None
        ),
        learning_rate=learning_rate,
    )


def _resolve(config: ConfigLike) -> Resolved:
    if isinstance(config, Resolved):
        return config
    if isinstance(config, str | Path):
        return load(config)
    return load(values=config)


def _world_size(placement: Placement | None) -> int:
    if dist.is_initialized():
        return dist.get_world_size()
    return placement.world_size if placement else 1


def _rank(placement: Placement | None) -> int:
    if dist.is_initialized():
        return dist.get_rank()
    return placement.rank if placement else 0


def _own_device(placement: Placement | None) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", placement.local_rank if placement else torch.cuda.current_device())
    torch.cuda.set_device(device)
    return device
