"""Between the engine and checkpoints: which tensors and numbers make up a run.

Called by `Engine.save`, `load` and `full_state_dict`. The format is the checkpoint room's; what is
whole and what is cut is the state engine's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sixfold.base.errors import CheckpointError, SaveError, SixfoldError
from sixfold.checkpoint import Content, open_checkpoint
from sixfold.checkpoint import save as write

if TYPE_CHECKING:
    from sixfold.engine.engine import Engine

MASTER = "master"


def full_state_dict(engine: Engine) -> dict[str, torch.Tensor]:
    """The whole model on the CPU, under all its names."""
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in _model(engine).items()}
    return {**tensors, **{alias: tensors[name] for alias, name in engine.aliases.items()}}


def save(engine: Engine, folder: Path) -> None:
    """Rank 0 writes; every rank learns whether it went well, and tells the same if not."""
    failure: SixfoldError | None = None
    if engine.mesh.rank == 0:
        try:
            write(folder, _content(engine))
        except SixfoldError as error:
            failure = error
    told = engine.mesh.share_text(json.dumps(_words(failure)) if failure is not None else "")
    if failure is not None:
        raise failure
    if told:
        is_disk, given, rule, fix = json.loads(told)
        raise (SaveError if is_disk else CheckpointError)(f"rank 0: {given}", rule=rule, fix=fix)


def _words(failure: SixfoldError) -> tuple[bool, str, str, str]:
    return isinstance(failure, SaveError), failure.given, failure.rule, failure.fix


def load(engine: Engine, folder: Path) -> None:
    """Read everything, then change anything."""
    saved = open_checkpoint(folder)
    expected = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in _model(engine).items()}
    model = dict(saved.load_model(expected))
    optimizer = {name: saved.read_optimizer(name) for name in saved.optimizer_names}
    masters = {name: state.pop(MASTER) for name, state in optimizer.items() if MASTER in state}
    buffers = _persistent_buffers(engine)
    with torch.no_grad():
        for unit, slot in engine.state.slots():
            unit.slot_of(unit.master, slot).copy_(masters.get(slot.name, model[slot.name]))
        for name, buffer in buffers.items():
            buffer.copy_(model[name])
    engine.state.publish()
    engine.bound.load_named_state({name: state for name, state in optimizer.items() if state})
    engine.num_steps = int(saved.state["step"])
    engine.num_samples = int(saved.state["samples"])


def _content(engine: Engine) -> Content:
    optimizer: dict[str, dict[str, torch.Tensor]] = engine.bound.named_state()
    for unit, slot in engine.state.slots():
        # The model part holds the master already where both have one type.
        if unit.plan.trainable and engine.state.whole(unit, slot).dtype != unit.master.dtype:
            optimizer.setdefault(slot.name, {})[MASTER] = unit.slot_of(unit.master, slot)
    state: dict[str, Any] = {
        "step": engine.num_steps,
        "samples": engine.num_samples,
        "seed": engine.resolved.config.seed,
        "num_steps": engine.learning_rate.num_steps,
        "optimizer": engine.bound.settings(),
    }
    return Content(
        model=_model(engine),
        aliases=dict(engine.aliases),
        optimizer=optimizer,
        state=state,
        extra_files=_model_card(engine),
    )


def _model(engine: Engine) -> dict[str, torch.Tensor]:
    parameters = {slot.name: engine.state.whole(unit, slot) for unit, slot in engine.state.slots()}
    return {**parameters, **_persistent_buffers(engine)}


def _persistent_buffers(engine: Engine) -> dict[str, torch.Tensor]:
    kept = engine.module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in engine.module.named_buffers() if name in kept}


def _model_card(engine: Engine) -> dict[str, bytes]:
    """The configuration file that lets Hugging Face's `from_pretrained` read the model part."""
    describe = getattr(getattr(engine.module, "config", None), "to_json_string", None)
    return {"config.json": describe().encode()} if callable(describe) else {}
