"""Between the engine and checkpoints: which tensors make up the model and its training, and which parts
of them this rank has.

The engine makes one `Persistence` and calls it from `save`, `load` and `full_state_dict`. The format and
the writing are the checkpoint room's; what is cut is the state engine's; counters are the engine's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sixfold.base.errors import CheckpointError
from sixfold.checkpoint import (
    MODEL,
    OPTIMIZER,
    Content,
    Keep,
    Piece,
    Saved,
    Spec,
    open_checkpoint,
    state_name,
)
from sixfold.checkpoint.together import Saving, together
from sixfold.checkpoint.weights import Weights, are_weights
from sixfold.config import CheckpointConfig
from sixfold.engine.weights import matching_weights, read_weights
from sixfold.mesh import Mesh
from sixfold.parallel import persistent_buffers, torch_type
from sixfold.plan import Slot
from sixfold.state import (
    Average,
    BoundOptimizer,
    Entry,
    ModelState,
    Unit,
    range_in,
    runs_of,
    state_bytes_per_weight,
    storage_type,
    zero_between,
)

MASTER, EMA = "master", "ema"
_BESIDE = {MASTER, EMA}
"""Keys under which numbers of the engine's own stand among the optimizer's."""
ADAPTERS = "adapters"

State = dict[nn.Parameter, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Persistence:
    """The parts of an engine that a checkpoint holds.

    Args:
        aliases: further names of tied parameters -> first name.
        keeps_settings: whether the optimizer's settings come from the checkpoint on load, as torch's
            own `load_state_dict` does it; otherwise they come from the configuration.
        saving: the saves of this engine.
        asked: whether saves wait, by themselves and for each other.
    """

    module: nn.Module
    mesh: Mesh
    state: ModelState
    bound: BoundOptimizer
    aliases: Mapping[str, str]
    keeps_settings: bool
    saving: Saving
    asked: CheckpointConfig

    def full_state_dict(self, averages: Average | None = None) -> dict[str, torch.Tensor]:
        """The whole model on the CPU, under all its names; with averages of the trained weights, if given."""
        if averages is None:
            self.state.edits.absorb()
        self.state.foreign.collect_buffers()
        whole = self.state.whole(averages.numbers if averages is not None else None)
        model = {**whole, **persistent_buffers(self.module)}
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in model.items()}
        return {**tensors, **{alias: tensors[name] for alias, name in self.aliases.items()}}

    # Saving.

    def save(
        self,
        folder: Path,
        counters: Mapping[str, Any],
        *,
        only: str | None,
        wait: bool | None,
        keep: Keep | None,
    ) -> None:
        """Begin a save, and see it through unless it goes on in the background; see `Saving.start`.

        Args:
            wait: whether to return after its end; None: as configured.
        """
        waits = not self.asked.asynchronous if wait is None else wait
        with self.mesh.phase("save"):
            self.saving.look()
            if self.saving.is_under_way and self.asked.when_busy == "refuse":
                raise CheckpointError(
                    f"engine.save({str(folder)!r}) while an earlier save is being written",
                    rule='with checkpoint.when_busy = "refuse" saves do not wait for each other',
                    fix='save less often, or set checkpoint.when_busy = "wait"',
                )
            self.state.edits.absorb()
            self.saving.start(folder, lambda: self._content(counters, only), snapshot=not waits, keep=keep)
            if waits:
                self.saving.wait()

    def wait(self) -> None:
        """See the save under way through."""
        with self.mesh.phase("save"):
            self.saving.wait()

    def rehearse(self, folder: Path) -> None:
        """See `Saving.rehearse`."""
        dtypes = {entry.group: torch_type(entry.master) for entry in self.state.catalog.trained}
        groups = range(len(self.bound.base_lrs))
        per_weight = state_bytes_per_weight(
            self.bound.inners, [dtypes.get(group, torch.float32) for group in groups]
        )
        needed = sum(each.nbytes for each in persistent_buffers(self.module).values())
        beside = self._beside()
        for name, entry in self.state.catalog.entries.items():
            needed += entry.numel * torch_type(entry.storage).itemsize
            if entry.trainable:
                kept = sum(torch_type(entry.master).itemsize for names, _ in beside.values() if name in names)
                needed += entry.numel * (per_weight[entry.group] + kept)
        with self.mesh.phase("save"):
            self.saving.rehearse(folder, needed)

    def _content(self, counters: Mapping[str, Any], only: str | None) -> Content:
        names = self._names(only)
        entries = self._entries(names)
        slots = [(unit, slot) for unit, slot in self.state.slots() if slot.name in names]
        buffers = {name: each for name, each in persistent_buffers(self.module).items() if name in names}
        model = {entry.name: Spec(entry.shape, torch_type(entry.storage)) for entry in entries}
        model |= {name: Spec(tuple(each.shape), each.dtype) for name, each in buffers.items()}
        masters = {unit: unit.master for unit in self.state.units}
        pieces = [Piece(MODEL, slot.name, start, part) for slot, start, part in _shares(slots, masters)]
        pieces += [
            Piece(MODEL, name, 0, buffer)
            for name, buffer in buffers.items()
            if self.state.foreign.source_of(name) == self.mesh.rank
        ]
        state: dict[str, Any] = dict(counters)
        optimizer: dict[str, Spec] = {}
        if names >= self._trained():
            specs = self.bound.state_specs()
            # In the order of the model, whatever the units are.
            optimizer = {
                state_name(entry.name, key): Spec(*spec)
                for entry in entries
                for key, spec in specs.get(entry.name, {}).items()
            }
            pieces += [
                Piece(OPTIMIZER, state_name(name, key), start, part)
                for name, key, start, part in self.bound.state_pieces()
            ]
            for key, (kept_names, numbers) in self._beside().items():
                kept = [(unit, slot) for unit, slot in slots if unit in numbers]
                optimizer |= {
                    state_name(entry.name, key): Spec(entry.shape, torch_type(entry.master))
                    for entry in entries
                    if entry.name in kept_names
                }
                pieces += [
                    Piece(OPTIMIZER, state_name(slot.name, key), start, part)
                    for slot, start, part in _shares(kept, numbers)
                ]
            state["optimizer"] = {"kind": self.bound.kind, "groups": self.bound.settings()}
        return Content(
            specs={MODEL: model, OPTIMIZER: optimizer},
            pieces=pieces,
            state=state,
            aliases={alias: name for alias, name in self.aliases.items() if name in names},
            extra_files=self._model_card() if only is None else {},
            only=only,
        )

    # Loading.

    def load(self, folder: Path) -> Mapping[str, Any] | None:
        """Read this rank's part of everything, then change anything.

        Returns:
            The counters; None for a part of the model without state of training.
        """
        self.wait()
        with self.mesh.phase("load"):
            self.state.edits.absorb()  # of what is not in the folder
            return self._load(folder)

    def _load(self, folder: Path) -> Mapping[str, Any] | None:
        incoming = together(self.mesh, folder, lambda: self._incoming(folder))
        if isinstance(incoming, Weights):
            read_weights(self.module, self.state, incoming)
            for unit, numbers in self._averages.items():
                numbers.copy_(unit.master)
            return None
        for unit, values in incoming.masters.items():
            unit.fill_own(values)
        for unit, values in incoming.averages.items():
            self._averages[unit].copy_(values)
        self.state.publish(None)
        with torch.no_grad():
            for name, buffer in persistent_buffers(self.module).items():
                if name in incoming.buffers:
                    buffer.copy_(incoming.buffers[name])
        training = incoming.counters.get("optimizer")
        if training is None:
            return None
        self.bound.adopt_state(incoming.optimizer)
        if self.keeps_settings and training["groups"] is not None:
            self.bound.load_settings(training["groups"])
        return incoming.counters

    def _incoming(self, folder: Path) -> _Incoming | Weights:
        if are_weights(folder):
            return matching_weights(self.module, folder, self.aliases)
        return self._read(folder)

    def _read(self, folder: Path) -> _Incoming:
        saved = open_checkpoint(folder)
        names = self._names(saved.manifest.only)
        slots = [(unit, slot) for unit, slot in self.state.slots() if slot.name in names]
        buffers = {name: each for name, each in persistent_buffers(self.module).items() if name in names}
        saved.check_model(
            {entry.name: (entry.shape, torch_type(entry.storage)) for entry in self._entries(names)}
            | {name: (tuple(each.shape), each.dtype) for name, each in buffers.items()}
        )
        counters = saved.state
        if "optimizer" in counters:
            self._check_optimizer(saved, counters["optimizer"])
        read = {name: torch.empty(each.shape, dtype=each.dtype) for name, each in buffers.items()}
        pieces = [Piece(MODEL, name, 0, tensor) for name, tensor in read.items()]
        masters = {unit: _blank(unit, unit.master, names) for unit in self.state.units}
        averages = {unit: _blank(unit, numbers, names) for unit, numbers in self._averages.items()}
        unsaved: list[tuple[torch.Tensor, torch.Tensor]] = []

        def read_into(unit: Unit, slot: Slot, mine: torch.Tensor, key: str | None) -> None:
            part, name = (MODEL, slot.name) if key is None else (OPTIMIZER, state_name(slot.name, key))
            begin = max(0, unit.own.start - slot.offset)
            pieces.extend(Piece(part, name, start, each) for start, each in runs_of(slot, begin, mine))

        for unit, slot in slots:
            held = saved.optimizer_specs.get(slot.name, {})
            mine = unit.part_of(masters[unit], slot)
            read_into(unit, slot, mine, MASTER if MASTER in held else None)
            if unit in averages and EMA in held:
                read_into(unit, slot, unit.part_of(averages[unit], slot), EMA)
            elif unit in averages:
                # An average that was not kept starts from its weight.
                unsaved.append((unit.part_of(averages[unit], slot), mine))
        state, wanted = self.bound.blank_state(
            {
                name: {key: (spec.shape, spec.dtype) for key, spec in keys.items() if key not in _BESIDE}
                for name, keys in saved.optimizer_specs.items()
                if keys.keys() - _BESIDE
            }
        )
        pieces += [Piece(OPTIMIZER, state_name(name, key), start, part) for name, key, start, part in wanted]
        saved.fill(pieces)
        for mine, source in unsaved:
            mine.copy_(source)
        return _Incoming(masters, averages, read, state, counters)

    def _check_optimizer(self, saved: Saved, settings: Mapping[str, Any]) -> None:
        kind = self.bound.kind
        trained = {entry.name: entry.group for entry in self.state.catalog.trained if entry.numel}
        held = {name for name, keys in saved.optimizer_specs.items() if keys.keys() - _BESIDE}
        # A whole group may have no state (SGD without momentum beside SGD with it).
        with_state = {group for name, group in trained.items() if name in held}
        needed = {name for name, group in trained.items() if group in with_state}
        strangers = sorted(held ^ needed)
        # An imported checkpoint tells neither.
        saved_kind = settings["kind"] or kind
        num_groups = len(settings["groups"] or self.bound.base_lrs)
        if saved_kind != kind or strangers or num_groups != len(self.bound.base_lrs):
            raise CheckpointError(
                f"{saved.folder} holds the state of {saved_kind} with {num_groups} "
                f"group(s); here is {kind} with {len(self.bound.base_lrs)}; trained on one side only: "
                f"{', '.join(strangers[:4]) or 'nothing'}",
                rule="optimizer state goes to the same optimizer over the same trained parameters",
                fix="build the optimizer that was saved, or read the weights alone with "
                "safetensors from model.safetensors",
            )

    # What there is.

    def _names(self, only: str | None) -> set[str]:
        """Names of parameters and buffers that `only` asks for, tied ones under their first name."""
        every = [*self.state.catalog.entries, *persistent_buffers(self.module)]
        if only is None:
            return set(every)
        if only == ADAPTERS:
            trained = self._trained()
            if len(trained) == len(self.state.catalog.entries):
                raise CheckpointError(
                    f"only={only!r}, but all {len(trained)} parameters are trained",
                    rule="adapters are the parameters that are trained while others are frozen",
                    fix="set requires_grad=False on the base before sixfold.initialize, or leave out `only`",
                )
            return trained
        found = {name for name in every if fnmatchcase(name, only)}
        found |= {name for alias, name in self.aliases.items() if fnmatchcase(alias, only)}
        if not found:
            near = get_close_matches(only, every, n=1, cutoff=0) or ["*"]
            raise CheckpointError(
                f"only={only!r} fits none of {len(every)} parameters and buffers",
                rule=f'only is "{ADAPTERS}" or a pattern for names, in which * stands for anything',
                fix=f"for example only={near[0]!r}",
            )
        return found

    def _trained(self) -> set[str]:
        return {entry.name for entry in self.state.catalog.trained}

    def _entries(self, names: set[str]) -> list[Entry]:
        """The parameters among `names`, in module order."""
        return [entry for name, entry in self.state.catalog.entries.items() if name in names]

    @property
    def _averages(self) -> Mapping[Unit, torch.Tensor]:
        return self.bound.average.numbers if self.bound.average is not None else {}

    def _beside(self) -> dict[str, tuple[set[str], Mapping[Unit, torch.Tensor]]]:
        """Key -> what stands beside the optimizer's own state, one number for each weight: names, and this
        rank's numbers [own]."""
        trained = self.state.catalog.trained
        # The model part holds the master already where both have one type.
        names = {entry.name for entry in trained if entry.storage != entry.master}
        masters = {
            unit: unit.master for unit in self.state.trained if storage_type(unit) != unit.master.dtype
        }
        averaged = self._trained() if self.bound.average is not None else set()
        return {MASTER: (names, masters), EMA: (averaged, self._averages)}

    def _model_card(self) -> dict[str, bytes]:
        """The configuration file that lets Hugging Face's `from_pretrained` read the model part."""
        describe = getattr(getattr(self.module, "config", None), "to_json_string", None)
        return {"config.json": describe().encode()} if callable(describe) else {}


def _blank(unit: Unit, numbers: torch.Tensor, names: set[str]) -> torch.Tensor:
    """Host memory for a unit's `numbers` [own], with those in it that are not to be read."""
    blank = torch.empty(numbers.shape, dtype=numbers.dtype)
    parts = [(slot, unit.part_of(blank, slot)) for slot in unit.plan.slots]
    for slot, part in parts:
        if slot.name not in names:
            part.copy_(unit.part_of(numbers, slot))
    return zero_between(blank, [range_in(blank, part) for _, part in parts])


@dataclass(frozen=True)
class _Incoming:
    """What one rank has read, in host memory, before anything is changed.

    Args:
        masters: [own] of every unit.
        averages: [own] of those that have one.
    """

    masters: Mapping[Unit, torch.Tensor]
    averages: Mapping[Unit, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]
    optimizer: State
    counters: Mapping[str, Any]


def _shares(
    slots: Sequence[tuple[Unit, Slot]], numbers: Mapping[Unit, torch.Tensor]
) -> Iterator[tuple[Slot, int, torch.Tensor]]:
    """(slot, first element of the whole, elements) of what this rank writes of `numbers` [own]."""
    for unit, slot in slots:
        start = max(slot.offset, unit.share.start)
        stop = min(slot.offset + slot.numel, unit.share.stop)
        if start < stop:
            mine = numbers[unit][start - unit.own.start : stop - unit.own.start]
            for first, part in runs_of(slot, start - slot.offset, mine):
                yield slot, first, part
