"""What an example of a batch tells before training: what parts cost on this machine, and what stages hand on.

Called by `initialize`, once ranks have met. Costs are measured by rank 0, and all ranks cut by its figures;
sizes are found by every rank without computing anything.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from sixfold.base.errors import ConfigError, ModelError
from sixfold.config import Config
from sixfold.mesh import Mesh, Streams
from sixfold.parallel import AxisChange, ModelCut, compute_type, handed_bytes, measured_costs, on_meta
from sixfold.parallel.change import nothing
from sixfold.pipeline import Batch, LossForm, Piece, split, to_device
from sixfold.plan import BlockCosts, offered_memory, programs_for, transfer_memory

_log = logging.getLogger(__name__)


def check_example(asked: Config, example: Batch) -> None:
    """Raise ConfigError where costs are to be measured and there is nothing to measure them with."""
    if asked.layout.cost == "measured" and example is None:
        raise ConfigError(
            f'layout.cost = "{asked.layout.cost}", and sixfold.initialize was given no example',
            rule="costs are measured on a batch of the real shape",
            fix="give sixfold.initialize(..., example=batch), a batch as train_step will get it, or leave "
            "layout.cost unset",
        )


def cut_by_measure(
    cut: ModelCut,
    model: nn.Module,
    asked: Config,
    mesh: Mesh,
    streams: Streams,
    form: LossForm,
    example: Batch,
) -> ModelCut:
    """The model cut anew by measured costs, where that is asked for. A collective.

    Args:
        cut: by estimated costs.
        model: with weights on rank 0.
        example: a batch; its first micro-batch is run.

    Raises:
        ModelError: rank 0 could not run the model; on every rank.
    """
    if asked.layout.cost != "measured" or cut.plan is None:
        return cut
    failure: Exception | None = None
    told = ""
    if mesh.rank == 0:
        try:
            told = json.dumps(_measured(cut, model, asked, mesh.device, streams, form, example))
        except Exception as error:  # of the model's own code
            failure = error
            told = json.dumps(f"{type(error).__name__}: {error}")
    found = json.loads(mesh.share_text(told))
    if isinstance(found, str):
        raise ModelError(
            f"rank 0 could not run {type(model).__name__} to measure its parts: {found}",
            rule="the model is run forward and backward on the example, as in training",
            fix="mend what the message names, or leave layout.cost unset",
        ) from failure
    blocks, before, after = found
    return ModelCut.decide(model, asked.layout, BlockCosts(tuple(blocks), before, after))


def crossing_memory(
    cut: ModelCut, model: nn.Module, asked: Config, mesh: Mesh, form: LossForm, example: Batch
) -> int:
    """Bytes of this rank's transfers along the pipe that are under way at most; 0 where no example tells."""
    if cut.plan is None or example is None:
        return 0
    sizes: dict[str, int] = {}

    def traced(run: Callable[[], object]) -> None:
        sizes.update(handed_bytes(model, cut.parts, run))

    if not _run_on_meta(traced, model, asked, form, example):
        return 0
    handed = [sizes.get(cut.parts.blocks[blocks.stop - 1], 0) if blocks else 0 for blocks in cut.plan.blocks]
    programs = programs_for(asked.layout, "training", len(split(example, asked.batch.micro)))
    # Sequences are cut over ranks, and each hands on its own part.
    return transfer_memory(cut.plan, programs, mesh.pipe_rank, handed) // mesh.geometry.degree("context")


def axes_memory(axes: AxisChange, model: nn.Module, asked: Config, form: LossForm, example: Batch) -> int:
    """Bytes that this rank offers others inside forward and backward at most, with even load of experts; 0
    where no example tells.

    Args:
        model: whole, as it was handed over.
    """
    if example is None or axes.trace is nothing:
        return 0
    offers: list[tuple[str, int]] = []

    def traced(run: Callable[[], object]) -> None:
        undo = axes.trace(lambda kind, num_bytes: offers.append((kind, num_bytes)))
        try:
            with torch.no_grad():
                run()
        finally:
            undo()

    _run_on_meta(traced, model, asked, form, example)
    # Where sequences are cut, the first batch is tried on a part of it, with other sizes, none larger.
    num_runs = 2 if asked.layout.context > 1 else 1
    return num_runs * offered_memory(offers)


def _run_on_meta(
    traced: Callable[[Callable[[], object]], None],
    model: nn.Module,
    asked: Config,
    form: LossForm,
    example: Batch,
) -> bool:
    """Have the first micro-batch run, without numbers; returns whether it came to its end."""
    compute = compute_type(asked.precision.compute)
    part = to_device(split(example, asked.batch.micro)[0], torch.device("meta"), compute)
    args, kwargs = form.arguments(part)
    try:
        traced(partial(on_meta(model, compute), *args, **kwargs))
    except Exception as error:  # of the model's own code: it looks at numbers, and on meta there are none
        _log.info("not all is priced: %s does not run on meta (%s)", type(model).__name__, error)
        return False
    return True


def _measured(
    cut: ModelCut,
    model: nn.Module,
    asked: Config,
    device: torch.device,
    streams: Streams,
    form: LossForm,
    example: Batch,
) -> tuple[tuple[float, ...], float, float]:
    compute = compute_type(asked.precision.compute)
    micro, *_ = split(example, asked.batch.micro)
    part = to_device(micro, device, None)
    args, kwargs = form.arguments(part, cast=compute)

    def run(call: Any) -> torch.Tensor:
        return form.read(call(*args, **kwargs), Piece(part), 1.0).value

    with streams.keyed("cost"), torch.enable_grad():
        costs = measured_costs(model, cut.parts, run, device=device, compute=compute)
    return costs.blocks, costs.before, costs.after
