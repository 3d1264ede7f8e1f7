"""The manifest: the one file, written last, that makes a folder a checkpoint.

`writing` makes it; `reading` and `retention` trust nothing that it does not list. It holds files with
sizes and every tensor's place, so that a reader finds any range of bytes without opening another
header. It never holds tensor data, and nothing about the ranks that wrote it. No tensor library is loaded
to read it.
"""

from __future__ import annotations

import json
import math
import zlib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sixfold.base.errors import CheckpointError
from sixfold.base.units import item_bytes
from sixfold.checkpoint.cells import Cells
from sixfold.checkpoint.files import MANIFEST as MANIFEST

STATE = "state.json"
SUMS = "checksums.crc32"
FORMAT: Final = "sixfold-checkpoint"
VERSION: Final = 2

TAGS = (
    *("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "U16", "I16", "F16", "BF16"),
    *("U32", "I32", "F32", "U64", "I64", "F64", "C64"),
)
"""The format's names of number types; what torch calls them is in `tensorfile`."""

Count = Annotated[int, Field(ge=0)]
Crc32 = Annotated[int, Field(ge=0, lt=2**32)]
FileName = Annotated[str, Field(pattern=r"^[^/\\]+$")]


class OtherVersionError(CheckpointError):
    """A checkpoint that another version of the format describes; it may be whole."""


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileEntry(_Entry):
    """One file of the folder."""

    name: FileName
    size: Count


class TensorEntry(_Entry):
    """One whole logical tensor: bytes `start` to `stop` of `file`, row-major, little-endian."""

    part: str
    name: str
    file: FileName
    dtype: str
    shape: tuple[Count, ...]
    start: Count
    stop: Count

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * item_bytes(self.dtype)


class Manifest(_Entry):
    """Everything a complete checkpoint holds.

    `serial` counts the saves into the parent folder: a run that went back to an earlier step saves
    lower steps later, and the newest is the one saved last. `files` are all but the manifest and the
    checksums, whose cells follow in this order; `sums_crc32` is the sum of the checksums. `only` is
    what was asked for where it holds a part of a model.
    """

    format: Literal["sixfold-checkpoint"] = FORMAT
    version: Literal[2] = VERSION
    step: Count
    serial: Count
    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...]
    aliases: dict[str, str]
    sums_crc32: Crc32
    only: str | None = None

    @model_validator(mode="after")
    def _places_exist(self) -> Manifest:
        sizes = {file.name: file.size for file in self.files}
        for tensor in self.tensors:
            known = tensor.dtype in TAGS
            size = tensor.stop - tensor.start
            if not known or size != tensor.num_bytes or tensor.stop > sizes[tensor.file]:
                raise ValueError(
                    f"the place of {tensor.part} {tensor.name!r} does not fit its shape and file"
                )
        return self

    @cached_property
    def cells(self) -> Cells:
        """How the checksums are counted."""
        return Cells(tuple(file.size for file in self.files))

    def to_bytes(self) -> bytes:
        body = self.model_dump(mode="json")
        return json.dumps({**body, "crc32": _crc32(body)}, indent=1).encode()


def _crc32(body: dict[str, Any]) -> int:
    """Sum of the meaning, not of the spaces: a manifest that was only re-indented stays valid."""
    return zlib.crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete checkpoint: it parses, its own sum holds, files have their sizes.

    Raises:
        OtherVersionError: written by another version of the format.
        CheckpointError: no manifest, a damaged one, or files missing or cut short (all are listed).
    """
    path = folder / MANIFEST
    try:
        body = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{folder} has no {MANIFEST}",
            rule="the manifest is written last; a folder without one is not a complete checkpoint",
            fix="open a folder that has one, such as the newest beside it",
        ) from None
    except (OSError, ValueError) as error:
        raise damaged(folder, [f"{MANIFEST}: not readable ({error})"]) from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise damaged(folder, [f"{MANIFEST}: not the manifest of a checkpoint"])
    if body.get("version") != VERSION:
        raise OtherVersionError(
            f"{path} has format version {body.get('version')!r}",
            rule=f"this version of sixfold reads format version {VERSION}",
            fix="use the version of sixfold that wrote it; its tensors open with safetensors in any case",
        )
    if body.pop("crc32", None) != _crc32(body):
        raise damaged(folder, [f"{MANIFEST}: its content does not match its own crc32"])
    try:
        manifest = Manifest.model_validate_json(json.dumps(body))
    except (ValidationError, KeyError) as error:
        raise damaged(folder, [f"{MANIFEST}: {error}"]) from error
    if problems := _size_problems(folder, manifest):
        raise damaged(folder, problems)
    return manifest


def _size_problems(folder: Path, manifest: Manifest) -> list[str]:
    problems = []
    sums = FileEntry(name=SUMS, size=4 * manifest.cells.num_cells)
    for file in (*manifest.files, sums):
        try:
            size = (folder / file.name).stat().st_size
        except OSError:
            problems.append(f"{file.name}: missing")
            continue
        if size != file.size:
            problems.append(f"{file.name}: {size} bytes, the manifest says {file.size}")
    return problems


def damaged(folder: Path, problems: list[str]) -> CheckpointError:
    """The error for a folder whose bytes are not those that were saved."""
    return CheckpointError(
        f"the checkpoint {folder} is damaged:\n    " + "\n    ".join(problems),
        rule="every file has the size and the checksums that were saved with it",
        fix="copy the files named above again from where they came, or open an earlier checkpoint",
    )
