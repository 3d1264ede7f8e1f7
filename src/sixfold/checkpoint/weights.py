"""Weights alone, from a folder of safetensors files as Hugging Face tools save them, or from a checkpoint.

`initialize(weights=...)` and `engine.load` read them into any layout, a rank its own elements and no more;
`importing` copies them. Numbers of another floating type are converted on the way. It never writes, and
knows nothing of optimizers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sixfold.base.errors import CheckpointError
from sixfold.checkpoint.content import MODEL, Piece
from sixfold.checkpoint.fitting import refuse_misfits
from sixfold.checkpoint.manifest import MANIFEST, STATE, SUMS
from sixfold.checkpoint.placing import Place, fill_pieces
from sixfold.checkpoint.ranges import read_into
from sixfold.checkpoint.reading import open_checkpoint
from sixfold.checkpoint.remote import open_bytes
from sixfold.checkpoint.tensorfile import HeaderError, Spec, slots_in

INDEX = "model.safetensors.index.json"
_ONE_FILE = "model.safetensors"
_MAX_HEADER_BYTES = 100 * 2**20


@dataclass(frozen=True)
class Weights:
    """Whole logical tensors by name, and where each lies.

    Args:
        folder: for messages.
        places: name -> its place.
        read: fills memories with the bytes of a file from a number on.
    """

    folder: Path
    places: Mapping[str, Place]
    read: Callable[[str, list[tuple[int, memoryview]]], None]

    def under(self, aliases: Mapping[str, str]) -> Weights:
        """The same, with tied tensors under the model's first name for them alone.

        Args:
            aliases: further names of tied tensors -> first name.
        """
        places = dict(self.places)
        for alias, name in aliases.items():
            if alias in places:
                places.setdefault(name, places[alias])
                del places[alias]
        return replace(self, places=places)

    def check(self, expected: Mapping[str, Spec], passed_over: Iterable[str] = ()) -> None:
        """Raise one error that lists all that does not fit.

        Args:
            expected: every tensor that is to be filled.
            passed_over: names that may be here besides.

        Raises:
            CheckpointError: a tensor is missing or extra, of another shape, or of a kind of numbers that is
                not converted.
        """
        found = {name: place.spec for name, place in self.places.items()}
        also = {name: found[name] for name in passed_over if name in found and name not in expected}
        refuse_misfits(self.folder, found, {**expected, **also}, converts=True)

    def fill(self, pieces: Iterable[Piece]) -> None:
        """Read the elements of pieces of the model part into their tensors, straight into place where the
        type is the same.

        Raises:
            CheckpointError: a file is gone or cannot be read; what was filled is not to be used.
        """
        fill_pieces(pieces, lambda piece: self.places[piece.name], self.read)


def open_weights(source: Path) -> Weights:
    """The weights in a folder of safetensors files, in one such file, or in a checkpoint; no number is read.

    Of several files in a folder those of its index count, else `model.safetensors`, else all.

    Raises:
        CheckpointError: there are none, a file is damaged, or one that the index names is missing.
    """
    if (source / MANIFEST).exists():
        saved = open_checkpoint(source)
        return Weights(source, saved.places(MODEL), saved.read_ranges)
    folder = source.parent if source.is_file() else source
    places: dict[str, Place] = {}
    for file in safetensors_files(source):
        for name, place in _places_in(file).items():
            if name in places:
                raise CheckpointError(
                    f"{folder}: {name!r} is in {places[name].file} and in {file.name}",
                    rule="several files without an index hold different tensors",
                    fix="name the one file that is meant",
                )
            places[name] = place
    _check_index(folder, places)
    return Weights(folder, places, _reader(folder))


def are_weights(source: Path) -> bool:
    """Whether there are weights that are no checkpoint, nor what is left of one."""
    if source.is_file():
        return source.suffix == ".safetensors"
    parts_of_a_save = any((source / name).exists() for name in (MANIFEST, SUMS, STATE))
    return not parts_of_a_save and any(source.glob("*.safetensors"))


def safetensors_files(source: Path) -> list[Path]:
    """See `open_weights`."""
    if source.is_file() and source.suffix == ".safetensors":
        return [source]
    index = source / INDEX
    if index.exists():
        return [source / name for name in sorted(set(_weight_map(index).values()))]
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else []
    if not files:
        raise CheckpointError(
            f"{source} holds neither a {MANIFEST} nor safetensors files",
            rule="weights come from a checkpoint, a folder of safetensors files or one such file",
            fix="name the folder in which model.safetensors lies",
        )
    return [file for file in files if file.name == _ONE_FILE] or files


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_bytes())["weight_map"]
        if not all(isinstance(file, str) and Path(file).name == file for file in found.values()):
            raise ValueError("a file outside of the folder is named")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(index, str(error)) from error
    return dict(found)


def _check_index(folder: Path, places: Mapping[str, Place]) -> None:
    index = folder / INDEX
    if not index.exists():
        return
    listed = _weight_map(index)
    missing = sorted(name for name, file in listed.items() if name not in places or places[name].file != file)
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} tensor(s) of {INDEX} are not in their files: {', '.join(missing[:4])}",
            rule="the index names the file of every tensor",
            fix="download the folder again",
        )


def _places_in(file: Path) -> dict[str, Place]:
    try:
        size = file.stat().st_size
        with open_bytes(file) as handle:
            head = handle.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise HeaderError(f"it is cut short, or no safetensors file ({size} bytes)")
            header = bytearray(length)
            read_into(handle, memoryview(header))
        return {slot.name: Place(file.name, slot.start, slot.spec) for slot in slots_in(header, size)}
    except (OSError, HeaderError) as error:
        raise _damaged(file, getattr(error, "strerror", None) or str(error)) from error


def _damaged(file: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: {problem}",
        rule="every safetensors file of the folder, and its index, is whole",
        fix="download the folder again",
    )


def _reader(folder: Path) -> Callable[[str, list[tuple[int, memoryview]]], None]:
    def read(file: str, ranges: list[tuple[int, memoryview]]) -> None:
        try:
            with open_bytes(folder / file) as handle:
                for start, memory in sorted(ranges, key=lambda pair: pair[0]):
                    handle.seek(start)
                    if read_into(handle, memory) < len(memory):
                        raise OSError("it became shorter")
        except OSError as error:
            raise _damaged(folder / file, error.strerror or str(error)) from error

    return read
