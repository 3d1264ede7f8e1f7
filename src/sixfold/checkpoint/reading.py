"""Opening a checkpoint and reading tensors out of it, each verified as it is read.

The engine opens a folder, checks it against the model it has, and has its pieces filled. A reader touches
only the bytes it asks for. This module never writes, and never changes a tensor's type
or shape to make it fit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sixfold.base.errors import CheckpointError
from sixfold.checkpoint.content import MODEL, OPTIMIZER, Piece
from sixfold.checkpoint.manifest import STATE, Manifest, TensorEntry, read_manifest
from sixfold.checkpoint.ranges import Ranges
from sixfold.checkpoint.retention import latest, old_name
from sixfold.checkpoint.tensorfile import Spec

_NUM_NEAR_NAMES = 20
"""Missing names that get their nearest spelling; the search is slow and one prefix explains them all."""


def open_checkpoint(folder: Path | str) -> Saved:
    """Open one complete checkpoint; checks its manifest and the size of every file.

    Raises:
        CheckpointError: not a checkpoint, not complete, damaged, or of another format version.
    """
    folder = Path(os.path.abspath(folder))
    if not folder.exists() and old_name(folder).exists():
        folder = old_name(folder)  # a save that replaced it was killed between its two renames
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is {'a file' if folder.exists() else 'not there'}",
            rule="a checkpoint is a folder",
            fix=_other_folder(folder),
        )
    try:
        return Saved(folder, read_manifest(folder))
    except CheckpointError as error:
        inside = latest(folder)
        if inside is None:
            raise
        raise CheckpointError(
            error.given, rule=error.rule, fix=f"open the newest inside it: {inside}"
        ) from error


def _other_folder(folder: Path) -> str:
    near = _near(folder.name, (path.name for path in folder.parent.glob("*") if path.is_dir()))
    if near:
        return f"did you mean {folder.with_name(near)}?"
    newest = latest(folder.parent)
    return f"open {newest}" if newest else "give the folder that `save` was given"


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
            name: {key: entry.spec for key, entry in entries.items()}
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
        problems = self._mismatches(expected)
        if strict:
            problems = [*self._unaccounted(expected), *problems]
        if problems:
            raise CheckpointError(
                f"{self.folder} does not fit the model, {len(problems)} problem(s):\n    "
                + "\n    ".join(problems),
                rule="the checkpoint holds every tensor of the model with its shape and type, and no other",
                fix="build the model that was saved, or read tensors with `read_model` and convert them"
                + ("; strict=False accepts missing and extra names" if strict else ""),
            )

    def fill(self, pieces: Iterable[Piece]) -> None:
        """Read each piece's elements into its tensor; on the disk nothing else is touched, but for at most
        64 KiB beyond each end of a run of neighbouring pieces.

        Raises:
            CheckpointError: damaged; what was filled is not to be used.
        """
        wanted: dict[str, list[tuple[int, memoryview]]] = {}
        for piece in pieces:
            entry = self._entries[piece.part].get(piece.name)
            if entry is None:
                raise self._unknown(piece.name, tuple(self._entries[piece.part]))
            if piece.tensor.dtype != entry.spec.dtype or piece.stop > entry.spec.numel:
                raise AssertionError(
                    f"{piece.name}: {entry.spec} cannot fill {piece.tensor.dtype} to {piece.stop}"
                )
            start = entry.start + piece.start * entry.spec.dtype.itemsize
            wanted.setdefault(entry.file, []).append((start, _memory_of(piece.tensor)))
        for file, ranges in wanted.items():
            self._ranges.fill(file, ranges)

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

    def _mismatches(self, expected: Mapping[str, tuple[Sequence[int], torch.dtype]]) -> list[str]:
        problems = []
        for name, (shape, dtype) in expected.items():
            entry = self._entries[MODEL].get(self.aliases.get(name, name))
            if entry is None:
                continue
            if entry.shape != tuple(shape):
                problems.append(f"{name}: shape {list(entry.shape)} saved, {list(shape)} expected")
            if entry.spec.dtype != dtype:
                problems.append(f"{name}: {entry.spec.dtype} saved, {dtype} expected")
        return problems

    def _unaccounted(self, expected: Iterable[str]) -> list[str]:
        expected = set(expected)
        missing = sorted(expected - set(self.model_names))
        wanted = {self.aliases.get(name, name) for name in expected}
        extra = sorted(name for name in self._entries[MODEL] if name not in wanted)
        near = {name: _near(name, extra) for name in missing[:_NUM_NEAR_NAMES]}
        return [
            *(f"missing: {name}" + (f" (saved: {near[name]})" if near.get(name) else "") for name in missing),
            *(f"extra: {name}" for name in extra),
        ]

    def _unknown(self, name: str, names: Sequence[str]) -> CheckpointError:
        near = _near(name, names)
        fix = f"did you mean {near!r}?" if near else f"ask for one of its {len(names)} names"
        return CheckpointError(
            f"{self.folder} holds no {name!r}",
            rule="names are those the model had when it was saved",
            fix=fix,
        )

    def _read(self, entry: TensorEntry) -> Tensor:
        tensor = torch.empty(entry.shape, dtype=entry.spec.dtype)
        self.fill([Piece(entry.part, entry.name, 0, tensor)])
        return tensor


def _near(name: str, names: Iterable[str]) -> str | None:
    return next(iter(get_close_matches(name, list(names), n=1)), None)


def _memory_of(tensor: Tensor) -> memoryview:
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise AssertionError(f"strides {tensor.stride()} on {tensor.device}: not contiguous host memory")
    return tensor.reshape(-1).view(torch.uint8).numpy().data
