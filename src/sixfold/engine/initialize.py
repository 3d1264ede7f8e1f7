"""`sixfold.initialize`: from a module and a configuration to an engine.

Called once per model on every rank. It decides nothing itself: configuration, placement, plan, mesh,
weights, optimizer and state come from their rooms, in this order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sixfold.checkpoint.remote import folder_at
from sixfold.checkpoint.together import Saving
from sixfold.config import Config, Resolved, load
from sixfold.engine.admission import (
    check_agreement,
    check_batch_stats,
    check_block_options,
    check_capacity,
    check_model,
    tell_idle_settings,
)
from sixfold.engine.costs import axes_memory, check_example, crossing_memory, cut_by_measure
from sixfold.engine.engine import Engine
from sixfold.engine.persistence import Persistence
from sixfold.engine.watch import meet, patience_of, watch
from sixfold.engine.weights import find_weights, given_names, read_weights
from sixfold.launch import Placement, discover
from sixfold.mesh import Streams, keep_pages
from sixfold.parallel import (
    Deferral,
    ModelBalance,
    ModelCut,
    ModuleFacts,
    Routing,
    block_names,
    change_forwards,
    chunk_loss,
    decide_axes,
    materialize,
    module_facts,
    move_buffers,
    share_buffers,
)
from sixfold.pipeline import (
    Batch,
    LossForm,
    LossScaler,
    Passes,
    Player,
    Playing,
    SequenceCut,
    Transfers,
)
from sixfold.plan import Plan, decide, decide_geometry, decide_learning_rate, exchange_memory, placed
from sixfold.program import splits_backward
from sixfold.state import (
    ModelState,
    bind,
    build_optimizer,
    make_optimizers,
    optimized_facts,
    refuse_two_definitions,
    take_over,
)
from sixfold.state.making import OptimizerLike

LossFn = Callable[[Any, Any], Any]
ConfigLike = str | Path | Mapping[str, Any] | Config | Resolved | None


def initialize(
    model: nn.Module,
    *,
    config: ConfigLike = None,
    optimizer: OptimizerLike | None = None,
    loss_fn: LossFn | None = None,
    weights: str | Path | None = None,
    device: torch.device | str | None = None,
    example: Batch = None,
) -> Engine:
    """Make `model` trainable on every rank of this job.

    Args:
        model: any module, the same on every rank. With weights it keeps them (rank 0's); on the meta
            device it is initialised by its own rules, the same for every layout.
        config: a TOML, YAML or JSON file, a dictionary, or a Config.
        optimizer: a torch optimizer over the model's parameters, or several, each over its own; a
            factory that receives the parameters and returns such; None for the one that `config` names.
        loss_fn: `loss_fn(output, batch)` returning a loss or a pair (sum, weight); None when the
            model returns its loss.
        weights: what the model starts from instead: a folder of safetensors files with the model's own names,
            such as a Hugging Face one, one such file, or a checkpoint, of which the model part counts. With
            the model on meta each rank reads the elements that it owns, and nothing else is made.
        device: where this rank computes. None: its GPU where there is one, else the CPU.
        example: a batch as `train_step` will get it, needed where `layout.cost` is "measured". What stages
            hand to each other, and what ranks along tensor, context and expert exchange, in shared memory is
            priced by it.

    Raises:
        ConfigError, PlanError, ModelError, MeshError: before any training, with a change that works.
        CheckpointError: `weights` are not those of this model; lists what does not fit.
    """
    resolved = _resolve(config)
    asked = resolved.config
    if not isinstance(config, Resolved):
        tell_idle_settings(resolved)
    check_model(model, asked)
    check_capacity(model, asked.layout)
    check_example(asked, example)
    learning_rate = decide_learning_rate(asked)
    if not isinstance(config, Resolved):
        learning_rate.check_end()
    # A script that formed its process group itself has placed this process already.
    placement = None if dist.is_initialized() else discover(os.environ)
    place = torch.device(device) if device is not None else _own_device(placement)
    if place.type == "cpu":
        keep_pages()
    blocks = block_names(model, asked.layout.blocks)
    check_block_options(model, blocks, asked.layout, place)
    facts = module_facts(model, blocks=blocks)
    cut = ModelCut.decide(model, asked.layout)
    rank, address = _rank(placement), _address(placement)
    geometry = decide_geometry(asked.layout, _world_size(placement))
    axes = decide_axes(model, asked.layout, geometry, rank, owns_loss=loss_fn is None)

    def plan_of(facts: ModuleFacts) -> Plan:
        pieces = placed(facts.parameters, axes.places)
        mine = cut.facts_of(pieces, geometry.coordinate(rank, "pipe"))
        return decide(asked, mine, geometry.world_size, cut.plan)

    # Decided once on the model as it was handed over, so that what cannot run is refused before any
    # weight is made; the optimizer's groups, known only later, refine the units.
    plan_of(facts)
    mesh = meet(geometry, place, rank, address, asked.launch)
    ending = ExitStack()  # ended in the opposite order
    ending.callback(mesh.close)
    ending.callback(watch(mesh, address, asked.launch))
    check_agreement(mesh, model, facts, asked, axes.agreed)
    check_batch_stats(facts, asked, mesh)
    refuse_two_definitions(asked.optimizer, optimizer)
    streams = Streams(asked.seed, place)
    found = find_weights(model, folder_at(weights), facts.aliases, mesh) if weights else None
    given = given_names(model, found, facts.aliases) if found else set()
    if facts.on_meta:
        materialize(model, asked.seed, mesh, given)
    move_buffers(model, place)
    loss_form = LossForm(model, loss_fn)
    cut = cut_by_measure(cut, model, asked, mesh, streams, loss_form, example)
    # What ranks have told each other so far is little, and how much memory they share depends on the cut.
    mesh = mesh.sharing(
        asked.layout.transport,
        exchange_bytes=exchange_memory(plan_of(facts))
        + crossing_memory(cut, model, asked, mesh, loss_form, example)
        + axes_memory(axes, model, asked, loss_form, example),
        timeout_s=patience_of(asked.launch),
    )
    ending.callback(axes.apply(mesh))
    balance = ModelBalance.find(model, mesh.along("tensor")) if loss_fn is None else None
    if balance is not None:
        ending.callback(balance.remove)
    ending.callback(chunk_loss(model, asked.layout.loss_chunk, takes_scores=loss_fn is not None))
    ending.callback(change_forwards(model, blocks, asked.layout.recompute, asked.layout.compile))
    made = make_optimizers(optimizer or build_optimizer(asked.optimizer, model, blocks), model)
    facts = optimized_facts(model, made, blocks)
    stages = cut.stages(mesh.pipe_rank)
    for stage in stages:
        ending.callback(stage.remove)
    plan = plan_of(facts)
    take_over(model, stages, mesh, given, axes.places)
    deferral = None
    if cut.plan is not None and splits_backward(asked.layout.schedule or "1f1b"):
        deferral = Deferral()
        deferral.attach(stage.module for stage in stages)
        ending.callback(deferral.remove)
    prefetch_mb = asked.layout.prefetch_mb
    state = ModelState(
        model,
        plan,
        mesh,
        None if prefetch_mb is None else round(prefetch_mb * 1e6),
        given,
        stages=stages,
        buffer_sources=cut.buffer_sources(mesh.geometry),
        puts_off=deferral is not None,
    )
    ending.callback(state.remove)
    share_buffers(model, mesh)
    if found:
        read_weights(model, state, found)
    bound = bind(made, state, asked.optimizer.ema_decay)
    scaler = LossScaler(plan.loss_scaling)
    passes = Passes(
        state,
        scaler,
        last_stage=cut.plan.last if cut.plan else 0,
        transfers=Transfers(mesh, cut.plan.rank_of) if cut.plan else None,
        deferral=deferral,
    )
    player = Player(state, bound, mesh, passes, clip_norm=asked.optimizer.clip_norm, scaler=scaler)
    return Engine(
        module=model,
        resolved=resolved,
        plan=plan,
        mesh=mesh,
        state=state,
        bound=bound,
        playing=Playing(
            module=model,
            stages=stages,
            asked=asked,
            plan=plan,
            mesh=mesh,
            streams=streams,
            state=state,
            player=player,
            scaler=scaler,
            loss_form=loss_form,
            sequences=SequenceCut(
                model, axes.attention, place, asked.layout.tensor if asked.layout.sequence_parallel else 1
            ),
            routing=Routing(model, mesh, balance, parted=asked.layout.sequence_parallel),
        ),
        persistence=Persistence(
            model,
            mesh,
            state,
            bound,
            facts.aliases,
            keeps_settings=optimizer is not None,
            saving=Saving(mesh),
            asked=asked.checkpoint,
        ),
        learning_rate=learning_rate,
        ending=ending,
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


def _address(placement: Placement | None) -> str | None:
    """Where the ranks meet or, in a process group that the script formed, most likely met."""
    if placement is not None:
        return f"{placement.master_addr}:{placement.master_port}"
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    return f"{host}:{port}" if host and port and dist.is_initialized() else None


def _own_device(placement: Placement | None) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", placement.local_rank if placement else torch.cuda.current_device())
    torch.cuda.set_device(device)
    return device
