"""Opening a checkpoint and reading tensors out of it, each verified as it is read.

The engine opens a folder, checks it against the model it has, and has its pieces filled. A reader touches
only the bytes it asks for. This module never writes, and never changes a tensor's type
or shape to make it fit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sixfold.base.errors import CheckpointError
from sixfold.checkpoint.content import MODEL, OPTIMIZER, Piece
from sixfold.checkpoint.finding import find, nearest
from sixfold.checkpoint.fitting import refuse_misfits
from sixfold.checkpoint.manifest import STATE, Manifest, TensorEntry
from sixfold.checkpoint.placing import Place, fill_pieces
from sixfold.checkpoint.ranges import Ranges
from sixfold.checkpoint.tensorfile import DTYPES, Spec


def open_checkpoint(folder: Path | str) -> Saved:
    """Open one complete checkpoint; checks its manifest and the size of every file.

    Raises:
        CheckpointError: not a checkpoint, not complete, damaged, or of another format version.
    """
    return Saved(*find(folder))


@dataclass(frozen=True)
class Saved:
    """One complete checkpoint.

    Every read verifies the bytes it reads and raises a `CheckpointError` that names the damaged file.
    """

    folder: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def aliases(self) -> dict[str, str]:
        """Each further name of a tied tensor -> the name it is stored under."""
        return self.manifest.aliases

    @cached_property
    def state(self) -> dict[str, Any]:
        """The JSON state as it was saved, tuples as lists."""
        state: dict[str, Any] = json.loads(self.read_file(STATE))
        return state

    @cached_property
    def model_names(self) -> tuple[str, ...]:
        """Names of the model part, aliases at the end."""
        return (*self._entries[MODEL], *self.aliases)

    @cached_property
    def optimizer_names(self) -> tuple[str, ...]:
        """Names of the parameters that have optimizer state."""
        return tuple(self._optimizer)

    @cached_property
    def optimizer_specs(self) -> dict[str, dict[str, Spec]]:
        """Parameter name -> state key -> global shape and type."""
        return {
            name: {key: _spec_of(entry) for key, entry in entries.items()}
            for name, entries in self._optimizer.items()
        }

    def read_model(self, name: str) -> Tensor:
        """One tensor of the model part, on the CPU, by its name or an alias."""
        entry = self._entries[MODEL].get(self.aliases.get(name, name))
        if entry is None:
            raise self._unknown(name, self.model_names)
        return self._read(entry)

    def read(self, part: str, name: str) -> Tensor:
        """One tensor of either part by its name in the files."""
        entry = self._entries.get(part, {}).get(name)
        if entry is None:
            raise self._unknown(name, tuple(self._entries.get(part, {})))
        return self._read(entry)

    def read_optimizer(self, name: str) -> dict[str, Tensor]:
        """State key -> tensor of one parameter; empty for a model tensor that has no state."""
        if name not in self._optimizer and name not in self.model_names:
            raise self._unknown(name, self.optimizer_names)
        return {key: self._read(entry) for key, entry in self._optimizer.get(name, {}).items()}

    def read_file(self, name: str) -> bytes:
        """One whole file, such as an extra file."""
        sizes = {file.name: file.size for file in self.manifest.files}
        if name not in sizes:
            raise self._unknown(name, tuple(sizes))
        data = bytearray(sizes[name])
        self._ranges.fill(name, [(0, memoryview(data))])
        return bytes(data)

    def model(self) -> Iterator[tuple[str, Tensor]]:
        """All stored tensors of the model part, one in memory at a time; aliases are not repeated."""
        return ((name, self._read(entry)) for name, entry in self._entries[MODEL].items())

    def optimizer(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The state of all parameters that have one, one parameter in memory at a time."""
        return ((name, self.read_optimizer(name)) for name in self._optimizer)

    def load_model(
        self, expected: Mapping[str, tuple[Sequence[int], torch.dtype]], *, strict: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """The expected tensors as (name, tensor), read one at a time after everything was checked.

        Args:
            expected: name -> (global shape, dtype) of every parameter and buffer, tied names included.
            strict: False leaves out names that only one side has. Shapes and types must always agree.

        Raises:
            CheckpointError: at the call, before anything is read: lists all that does not fit.
        """
        self.check_model(expected, strict=strict)
        known = set(self.model_names)
        return ((name, self.read_model(name)) for name in expected if name in known)

    def check_model(
        self, expected: Mapping[str, tuple[Sequence[int], torch.dtype]], *, strict: bool = True
    ) -> None:
        """The check of `load_model` alone."""
        wanted = {name: Spec(tuple(shape), dtype) for name, (shape, dtype) in expected.items()}
        found = {name: _spec_of(entry) for name, entry in self._entries[MODEL].items()}
        for alias, name in self.aliases.items():
            if alias in wanted:
                found[alias] = found[name]
                if name not in wanted:
                    found.pop(name)
        refuse_misfits(self.folder, found, wanted, strict=strict)

    def places(self, part: str) -> dict[str, Place]:
        """Where each tensor of a part lies."""
        return {name: _place(entry) for name, entry in self._entries[part].items()}

    def read_ranges(self, file: str, wanted: Sequence[tuple[int, memoryview]]) -> None:
        """Fill each memory with the bytes of a file from its number on, verified."""
        self._ranges.fill(file, wanted)

    def fill(self, pieces: Iterable[Piece]) -> None:
        """Read each piece's elements into its tensor, converted where it has another type. On disk nothing
        else is touched, but for at most 64 KiB beyond each end of a run of neighbouring pieces.

        Raises:
            CheckpointError: damaged; what was filled is not to be used.
        """
        fill_pieces(pieces, self._place_of, self.read_ranges)

    def _place_of(self, piece: Piece) -> Place:
        entry = self._entries[piece.part].get(piece.name)
        if entry is None:
            raise self._unknown(piece.name, tuple(self._entries[piece.part]))
        return _place(entry)

    def verify(self, files: Iterable[str] | None = None) -> None:
        """Compare files with their checksums, all of them where none are named; raises one
        `CheckpointError` that lists the damaged ones."""
        self._ranges.verify(files)

    # How names lead to bytes.

    @cached_property
    def _ranges(self) -> Ranges:
        return Ranges(self.folder, self.manifest)

    @cached_property
    def _entries(self) -> dict[str, dict[str, TensorEntry]]:
        entries: dict[str, dict[str, TensorEntry]] = {MODEL: {}, OPTIMIZER: {}}
        for entry in self.manifest.tensors:
            entries.setdefault(entry.part, {})[entry.name] = entry
        return entries

    @cached_property
    def _optimizer(self) -> dict[str, dict[str, TensorEntry]]:
        states: dict[str, dict[str, TensorEntry]] = {}
        for full_name, entry in self._entries[OPTIMIZER].items():
            name, _, key = full_name.rpartition("/")
            states.setdefault(name, {})[key] = entry
        return states

    def _unknown(self, name: str, names: Sequence[str]) -> CheckpointError:
        near = nearest(name, names)
        fix = f"did you mean {near!r}?" if near else f"ask for one of its {len(names)} names"
        return CheckpointError(
            f"{self.folder} holds no {name!r}",
            rule="names are those the model had when it was saved",
            fix=fix,
        )

    def _read(self, entry: TensorEntry) -> Tensor:
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        self.fill([Piece(entry.part, entry.name, 0, tensor)])
        return tensor


def _place(entry: TensorEntry) -> Place:
    return Place(entry.file, entry.start, _spec_of(entry))


def _spec_of(entry: TensorEntry) -> Spec:
    return Spec(entry.shape, DTYPES[entry.dtype])
