"""What `initialize` lets in: checks of a model and a configuration before anything is made of them.

Called by `initialize` alone. Each check raises with a change that works, or says in the log what has no
effect; nothing is changed here.
"""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from sixfold.base.errors import ModelError
from sixfold.config import Config, LayoutConfig, Resolved
from sixfold.mesh import Mesh, agree
from sixfold.models.moe import Router
from sixfold.parallel import BATCH_NORMS, ModuleFacts, check_backend, check_blocks, dtype_name
from sixfold.state import Absent

_log = logging.getLogger(__name__)
_USED = (
    *("seed", "batch.", "layout.", "precision.", "optimizer.", "lr_schedule."),
    *("train.steps", "model.batch_stats", "launch.timeout_s"),
    *("launch.start_timeout_s", "launch.save_timeout_s"),
    *("checkpoint.asynchronous", "checkpoint.when_busy"),
)
"""What `initialize` reads of the configuration; the rest describes the job of `sixfold train`."""


def check_model(model: nn.Module, asked: Config) -> None:
    """Raise ModelError for what cannot be trained, whatever the layout."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"a {type(model).__name__} as model",
            rule="the model is a torch.nn.Module",
            fix="wrap a function or a list in a Module, for example torch.nn.Sequential(*layers)",
        )
    absent = [name for name, part in model.named_parameters() if isinstance(part, Absent)]
    if absent:
        raise ModelError(
            f"{len(absent)} parameter(s) without numbers, first {absent[0]}",
            rule="under layout.zero = 3 or layout.pipe the numbers of a module are with its engine",
            fix="make the module anew, and load what engine.save or engine.full_state_dict saved",
        )
    if isinstance(model, DataParallel | DistributedDataParallel):
        raise ModelError(
            f"a model inside {type(model).__name__}",
            rule="ranks are brought together by the engine itself",
            fix="hand over the module inside: model.module",
        )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name for name, part in tensors if isinstance(part, UninitializedParameter | UninitializedBuffer)]
    if lazy:
        raise ModelError(
            f"{len(lazy)} tensor(s) without a shape yet, first {lazy[0]}",
            rule="shapes are known before the model is divided",
            fix="run one forward of the model first; lazy modules take their shapes from it",
        )
    strange = [name for name, part in model.named_parameters() if part.requires_grad and part.is_complex()]
    if strange:
        raise ModelError(
            f"{len(strange)} trainable complex parameter(s), first {strange[0]}",
            rule="trained numbers are real",
            fix="keep them as real tensors with a last dim of 2, and use torch.view_as_complex in forward",
        )
    statistics = {
        dtype_name(part.running_mean.dtype)
        for part in model.modules()
        if isinstance(part, BATCH_NORMS) and part.running_mean is not None
    }
    if asked.precision.compute is not None and statistics - {asked.precision.compute}:
        raise ModelError(
            f'precision.compute = "{asked.precision.compute}" with BatchNorm, whose running statistics stay '
            f"{', '.join(sorted(statistics))}",
            rule="a BatchNorm computes in the type of its statistics",
            fix=f'set precision.compute = "{min(statistics)}", or use GroupNorm',
        )


def check_capacity(model: nn.Module, layout: LayoutConfig) -> None:
    """Raise ModelError where experts of limited capacity would see parts of samples."""
    limits = [part.config.capacity_factor for part in model.modules() if isinstance(part, Router)]
    if any(limit is not None for limit in limits) and (layout.context > 1 or layout.sequence_parallel):
        option = "context" if layout.context > 1 else "sequence_parallel"
        raise ModelError(
            f"layout.{option} = {str(getattr(layout, option)).lower()} with experts of limited capacity",
            rule="capacity counts the tokens of one sample, and here no rank has all of them",
            fix=f"set capacity_factor = None, or leave layout.{option} unset",
        )


def check_agreement(mesh: Mesh, model: nn.Module, facts: ModuleFacts, asked: Config, cuts: str) -> None:
    """Raise MeshError on every rank unless all hold the same model and configuration, and cut it alike.

    Args:
        cuts: what axes decided, see `AxisChange.agreed`.
    """
    own_launch = asked.model_copy(update={"launch": None})
    agree(
        mesh,
        {
            "parameter names": " ".join(fact.name for fact in facts.parameters),
            "parameter shapes": " ".join(str(fact.shape) for fact in facts.parameters),
            "parameter types": " ".join(fact.dtype for fact in facts.parameters),
            "requires_grad": " ".join(str(fact.trainable) for fact in facts.parameters),
            "buffers": " ".join(f"{name}{tuple(part.shape)}" for name, part in model.named_buffers()),
            "tied names": " ".join(f"{alias}={name}" for alias, name in sorted(facts.aliases.items())),
            "cuts of the model": cuts,
            "configuration": own_launch.model_dump_json(warnings=False),
        },
    )


def check_batch_stats(facts: ModuleFacts, asked: Config, mesh: Mesh) -> None:
    """Raise ModelError where BatchNorm would make the numbers depend on the layout, unasked."""
    is_cut = mesh.data_ranks > 1 or asked.batch.micro is not None
    if facts.has_batch_stats and is_cut and asked.model.batch_stats is None:
        raise ModelError(
            f"the model takes batch statistics (BatchNorm) and batches are cut over {mesh.data_ranks} "
            f"data rank(s), batch.micro = {asked.batch.micro}",
            rule="batch statistics depend on how the batch is cut, so the layout would change the numbers",
            fix='set model.batch_stats = "micro" to take them over each micro-batch, or use GroupNorm',
        )


def check_block_options(
    model: nn.Module, blocks: list[str], layout: LayoutConfig, place: torch.device
) -> None:
    """Raise ModelError or ConfigError where blocks cannot be recomputed or compiled as asked."""
    if layout.recompute is not None or layout.compile is not None:
        check_blocks(model, blocks, layout.recompute)
    if layout.compile is not None:
        check_backend(layout.compile, place)


def tell_idle_settings(resolved: Resolved) -> None:
    """Say which settings only `sixfold train` acts on; one file may serve both."""
    given = (path for path, origin in resolved.origins.items() if origin != "default")
    idle = [path for path in given if not path.startswith(_USED)]
    if idle and not (dist.is_initialized() and dist.get_rank()):
        _log.warning("without effect here, for `sixfold train` alone: %s", ", ".join(idle))
