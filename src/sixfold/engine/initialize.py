"""`sixfold.initialize`: from a module and a configuration to an engine.

Called once per model on every rank. It decides nothing itself: configuration, placement, plan, mesh,
weights, optimizer and state come from their rooms, in this order; each step here is a function of what the
ones before it gave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sixfold.checkpoint.remote import folder_at
from sixfold.checkpoint.together import Saving
from sixfold.checkpoint.weights import Weights
from sixfold.config import Config, Resolved, load
from sixfold.engine.admission import (
    check_agreement,
    check_batch_stats,
    tell_idle_settings,
)
from sixfold.engine.costs import axes_memory, check_example, crossing_memory, cut_by_measure
from sixfold.engine.decision import Decision, decide_alone
from sixfold.engine.engine import Engine
from sixfold.engine.persistence import Persistence
from sixfold.engine.watch import meet, patience_of, watch
from sixfold.engine.weights import find_weights, given_names, read_weights
from sixfold.mesh import Mesh, Streams, keep_pages
from sixfold.parallel import (
    Deferral,
    ModelBalance,
    Routing,
    Stage,
    change_forwards,
    chunk_loss,
    materialize,
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
from sixfold.plan import Plan, decide_learning_rate, exchange_memory
from sixfold.program import splits_backward
from sixfold.state import (
    BoundOptimizer,
    ModelState,
    bind,
    build_optimizer,
    make_optimizers,
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
        ConfigError, PlanError, ModelError, MeshError: before any training, with a change that works. Modules
            then run as before the call, so it may be made again; with a new model where this one's weights
            were cut already (`layout.zero` = 3, tensor, pipe, expert), as after `Engine.close`.
        CheckpointError: `weights` are not those of this model; lists what does not fit.
    """
    resolved = _resolve(config)
    asked = resolved.config
    learning_rate = decide_learning_rate(asked)
    if not isinstance(config, Resolved):
        tell_idle_settings(resolved)
        learning_rate.check_end()
    refuse_two_definitions(asked.optimizer, optimizer)
    check_example(asked, example)
    decided = decide_alone(model, asked, device, owns_loss=loss_fn is None)
    streams, loss_form = Streams(asked.seed, decided.device), LossForm(model, loss_fn)
    if decided.device.type == "cpu":
        keep_pages()
    # Undone from the last to the first: at once where something fails here, else when the engine is closed.
    with ExitStack() as ending:
        mesh = _meet(decided, ending)
        found, given = _find_first_weights(decided, mesh, weights)
        cut = cut_by_measure(decided.cut, model, asked, mesh, streams, loss_form, example)
        decided = replace(decided, cut=cut)
        mesh = _share_memory(decided, mesh, loss_form, example)
        balance = _change_forwards(decided, mesh, ending, owns_loss=loss_fn is None)
        made = make_optimizers(optimizer or build_optimizer(asked.optimizer, model, decided.blocks), model)
        decided = decided.grouped(made)
        plan = decided.plan()
        stages, deferral = _cut_stages(decided, mesh, ending)
        state = _make_state(decided, plan, mesh, stages, given, ending, puts_off=deferral is not None)
        if found:
            read_weights(model, state, found)
        bound = bind(made, state, asked.optimizer.ema_decay)
        return Engine(
            module=model,
            resolved=resolved,
            plan=plan,
            mesh=mesh,
            state=state,
            bound=bound,
            playing=_make_playing(
                decided, plan, mesh, stages, state, bound, streams, loss_form, deferral, balance
            ),
            persistence=Persistence(
                model,
                mesh,
                state,
                bound,
                decided.facts.aliases,
                keeps_settings=optimizer is not None,
                saving=Saving(mesh),
                asked=asked.checkpoint,
            ),
            learning_rate=learning_rate,
            ending=ending.pop_all(),
        )


def _meet(decided: Decision, ending: ExitStack) -> Mesh:
    """All ranks, watched, and sure that they were given the same.

    The process group is not ended where something fails later: that takes all ranks, and others may wait
    elsewhere. A further call takes it as it is.
    """
    asked = decided.asked
    mesh = meet(decided.geometry, decided.device, decided.rank, decided.address, asked.launch)
    ending.callback(watch(mesh, decided.address, asked.launch))
    check_agreement(mesh, decided.model, decided.facts, asked, decided.axes.agreed)
    check_batch_stats(decided.facts, asked, mesh)
    return mesh


def _find_first_weights(
    decided: Decision, mesh: Mesh, source: str | Path | None
) -> tuple[Weights | None, set[str]]:
    """The weights that the model starts from, and the names of those that are read later; the others are in
    the model now, and all of it is on its device."""
    model, facts = decided.model, decided.facts
    found = find_weights(model, folder_at(source), facts.aliases, mesh) if source else None
    given = given_names(model, found, facts.aliases) if found else set()
    if facts.on_meta:
        materialize(model, decided.asked.seed, mesh, given)
    move_buffers(model, decided.device)
    return found, given


def _share_memory(decided: Decision, mesh: Mesh, form: LossForm, example: Batch) -> Mesh:
    """The mesh with memory shared where that is possible; how much depends on the cut, and what ranks have
    told each other before is little."""
    cut, model, asked = decided.cut, decided.model, decided.asked
    return mesh.sharing(
        asked.layout.transport,
        exchange_bytes=exchange_memory(decided.plan())
        + crossing_memory(cut, model, asked, mesh, form, example)
        + axes_memory(decided.axes, model, asked, form, example),
        timeout_s=patience_of(asked.launch),
    )


def _change_forwards(
    decided: Decision, mesh: Mesh, ending: ExitStack, *, owns_loss: bool
) -> ModelBalance | None:
    """Have modules run as the layout wants it; the loss that balances all layers, where the model has one."""
    model, layout = decided.model, decided.asked.layout
    ending.callback(decided.axes.apply(mesh))
    balance = ModelBalance.find(model, mesh.along("tensor")) if owns_loss else None
    if balance is not None:
        ending.callback(balance.remove)
    ending.callback(chunk_loss(model, layout.loss_chunk, takes_scores=not owns_loss))
    ending.callback(change_forwards(model, decided.blocks, layout.recompute, layout.compile))
    return balance


def _cut_stages(decided: Decision, mesh: Mesh, ending: ExitStack) -> tuple[list[Stage], Deferral | None]:
    """This rank's stages, and what puts off their weight gradients where the schedule splits backwards."""
    stages = decided.cut.stages(mesh.pipe_rank)
    for stage in stages:
        ending.callback(stage.remove)
    if decided.cut.plan is None or not splits_backward(decided.asked.layout.schedule or "1f1b"):
        return stages, None
    deferral = Deferral()
    ending.callback(deferral.remove)
    deferral.attach(stage.module for stage in stages)
    return stages, deferral


def _make_state(
    decided: Decision,
    plan: Plan,
    mesh: Mesh,
    stages: list[Stage],
    given: set[str],
    ending: ExitStack,
    *,
    puts_off: bool,
) -> ModelState:
    """The units behind the model's parameters, from rank 0's numbers; `given` ones are still to be read."""
    model, prefetch_mb = decided.model, decided.asked.layout.prefetch_mb
    take_over(model, stages, mesh, given, decided.axes.places)
    state = ModelState(
        model,
        plan,
        mesh,
        None if prefetch_mb is None else round(prefetch_mb * 1e6),
        given,
        stages=stages,
        buffer_sources=decided.cut.buffer_sources(mesh.geometry),
        puts_off=puts_off,
    )
    ending.callback(state.remove)
    share_buffers(model, mesh)
    return state


def _make_playing(
    decided: Decision,
    plan: Plan,
    mesh: Mesh,
    stages: list[Stage],
    state: ModelState,
    bound: BoundOptimizer,
    streams: Streams,
    loss_form: LossForm,
    deferral: Deferral | None,
    balance: ModelBalance | None,
) -> Playing:
    """What plays batches."""
    model, asked, cut = decided.model, decided.asked, decided.cut
    scaler = LossScaler(plan.loss_scaling)
    passes = Passes(
        state,
        scaler,
        last_stage=cut.plan.last if cut.plan else 0,
        transfers=Transfers(mesh, cut.plan.rank_of) if cut.plan else None,
        deferral=deferral,
    )
    return Playing(
        module=model,
        stages=stages,
        asked=asked,
        plan=plan,
        mesh=mesh,
        streams=streams,
        state=state,
        player=Player(state, bound, mesh, passes, clip_norm=asked.optimizer.clip_norm, scaler=scaler),
        scaler=scaler,
        loss_form=loss_form,
        sequences=SequenceCut(
            model,
            decided.axes.attention,
            decided.device,
            asked.layout.tensor if asked.layout.sequence_parallel else 1,
        ),
        routing=Routing(model, mesh, balance, parted=asked.layout.sequence_parallel),
    )


def _resolve(config: ConfigLike) -> Resolved:
    if isinstance(config, Resolved):
        return config
    if isinstance(config, str | Path):
        return load(config)
    return load(values=config)
