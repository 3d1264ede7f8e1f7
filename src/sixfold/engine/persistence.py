"""Between the engine and checkpoints: which tensors make up the whole logical model and its training.

The engine makes one `Persistence` and calls it from `save`, `load` and `full_state_dict`. The format is
the checkpoint room's; what is whole and what is cut is the state engine's; counters are the engine's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sixfold.base.errors import CheckpointError, SaveError, SixfoldError
from sixfold.checkpoint import Content, Saved, open_checkpoint
from sixfold.checkpoint import save as write
from sixfold.mesh import Mesh
from sixfold.state import Average, BoundOptimizer, ModelState

MASTER = "master"


@dataclass(frozen=True)
class Persistence:
    """The parts of an engine that a checkpoint holds.

    Args:
        aliases: further names of tied parameters -> first name.
        keeps_settings: whether the optimizer's settings come from the checkpoint on load, as torch's
            own `load_state_dict` does it; otherwise they come from the configuration.
    """

    module: nn.Module
    mesh: Mesh
    state: ModelState
    bound: BoundOptimizer
    aliases: Mapping[str, str]
    keeps_settings: bool

    def full_state_dict(self, averages: Average | None = None) -> dict[str, torch.Tensor]:
        """The whole model on the CPU, under all its names; with averages of the trained weights, if given."""
        averaged = averages.named() if averages is not None else {}
        model = self._model(self.state.masters() | averaged)
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in model.items()}
        return {**tensors, **{alias: tensors[name] for alias, name in self.aliases.items()}}

    def save(self, folder: Path, counters: Mapping[str, Any]) -> None:
        """Rank 0 writes; every rank learns whether it went well, and tells the same if not."""
        content = self._content(counters)  # on every rank: what is cut is gathered
        failure: SixfoldError | None = None
        if self.mesh.rank == 0:
            try:
                write(folder, content)
            except SixfoldError as error:
                failure = error
            except Exception as error:
                # Told like any other, or the other ranks would wait for this one.
                failure = CheckpointError(
                    f"{folder}: {type(error).__name__}: {error}",
                    rule="model, optimizer state and counters can be written as tensors and plain values",
                    fix="see the original error above this one",
                )
                failure.__cause__ = error
        told = self.mesh.share_text(json.dumps(_words(failure)) if failure is not None else "")
        if failure is not None:
            raise failure
        if told:
            is_disk, given, rule, fix = json.loads(told)
            raise (SaveError if is_disk else CheckpointError)(f"rank 0: {given}", rule=rule, fix=fix)

    def load(self, folder: Path) -> Mapping[str, Any]:
        """Read everything, then change anything; returns the counters."""
        saved = open_checkpoint(folder)
        expected = {
            **{slot.name: (slot.shape, self.state.storage_type(unit)) for unit, slot in self.state.slots()},
            **{name: (tuple(each.shape), each.dtype) for name, each in self._persistent_buffers().items()},
        }
        model = dict(saved.load_model(expected))
        self._check_optimizer(saved, folder)
        optimizer = {name: saved.read_optimizer(name) for name in saved.optimizer_names}
        masters = {name: state.pop(MASTER) for name, state in optimizer.items() if MASTER in state}
        buffers = self._persistent_buffers()
        with torch.no_grad():
            for unit in self.state.units:
                whole = torch.zeros(unit.plan.numel, dtype=unit.master.dtype, device=unit.master.device)
                for slot in unit.plan.slots:
                    unit.slot_of(whole, slot).copy_(masters.get(slot.name, model[slot.name]))
                unit.fill(whole)
            for name, buffer in buffers.items():
                buffer.copy_(model[name])
        self.bound.load_named_state({name: state for name, state in optimizer.items() if state})
        if self.keeps_settings:
            self.bound.load_settings(saved.state["optimizer"]["groups"])
        return saved.state

    def _check_optimizer(self, saved: Saved, folder: Path) -> None:
        kind = self.bound.kind
        trained = {slot.name: slot.group for unit, slot in self.state.slots() if unit.plan.trainable}
        held = set(saved.optimizer_names)
        # A whole group may have no state (SGD without momentum beside SGD with it).
        with_state = {group for name, group in trained.items() if name in held}
        needed = {name for name, group in trained.items() if group in with_state}
        strangers = sorted(held ^ needed)
        settings = saved.state["optimizer"]
        if settings["kind"] != kind or strangers or len(settings["groups"]) != len(self.bound.base_lrs):
            raise CheckpointError(
                f"{folder} holds the state of {settings['kind']} with {len(settings['groups'])} group(s); "
                f"here is {kind} with {len(self.bound.base_lrs)}; trained on one side only: "
                f"{', '.join(strangers[:4]) or 'nothing'}",
                rule="optimizer state goes to the same optimizer over the same trained parameters",
                fix="build the optimizer that was saved, or read the weights alone with "
                "safetensors from model.safetensors",
            )

    def _content(self, counters: Mapping[str, Any]) -> Content:
        optimizer: dict[str, dict[str, torch.Tensor]] = self.bound.named_state()
        masters = self.state.masters()
        for unit, slot in self.state.slots():
            # The model part holds the master already where both have one type.
            if unit.plan.trainable and self.state.storage_type(unit) != unit.master.dtype:
                optimizer.setdefault(slot.name, {})[MASTER] = masters[slot.name]
        return Content(
            model=self._model(masters),
            aliases=dict(self.aliases),
            optimizer=optimizer,
            state={
                **counters,
                "optimizer": {"kind": self.bound.kind, "groups": self.bound.settings()},
            },
            extra_files=self._model_card(),
        )

    def _model(self, masters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        parameters = {
            slot.name: masters[slot.name].to(self.state.storage_type(unit))
            for unit, slot in self.state.slots()
        }
        return {**parameters, **self._persistent_buffers()}

    def _persistent_buffers(self) -> dict[str, torch.Tensor]:
        kept = self.module.state_dict(keep_vars=True)
        return {name: buffer for name, buffer in self.module.named_buffers() if name in kept}

    def _model_card(self) -> dict[str, bytes]:
        """The configuration file that lets Hugging Face's `from_pretrained` read the model part."""
        describe = getattr(getattr(self.module, "config", None), "to_json_string", None)
        return {"config.json": describe().encode()} if callable(describe) else {}


def _words(failure: SixfoldError) -> tuple[bool, str, str, str]:
    return isinstance(failure, SaveError), failure.given, failure.rule, failure.fix
