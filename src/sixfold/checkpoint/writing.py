"""Saving: every rank writes its own bytes; the folder appears under its name complete, or not at all.

`Saving` runs one `Save` on every rank, in a thread. Rank 0 makes the files at full size in a hidden sibling
folder; each rank writes its ranges, makes them durable and leaves a record of their checksums; when
rank 0 has all records it writes the manifest and renames the folder. Ranks meet through names in that
folder alone. A kill at any moment leaves the previous or the new checkpoint. Nothing is ever pickled.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sixfold.base.errors import CheckpointError, SaveError
from sixfold.base.units import bytes_text
from sixfold.checkpoint.cells import Cells
from sixfold.checkpoint.content import Content, Piece, check_content
from sixfold.checkpoint.files import Buffer, Files
from sixfold.checkpoint.manifest import MANIFEST, STATE, SUMS, FileEntry, Manifest, TensorEntry, read_manifest
from sixfold.checkpoint.remote import copy_folder, folder_at, is_remote, staging_folder
from sixfold.checkpoint.retention import Keep, next_serial, old_name, prune, temporary_name
from sixfold.checkpoint.sums import Tally, crc32, joined
from sixfold.checkpoint.tensorfile import TAGS, Slot, TensorFile, chunks_of, index_json, plan_files

MAX_FILE_BYTES = 5 * 10**9

_FIRST_POLL_S, _LAST_POLL_S = 0.002, 0.1
_CLEARINGS = 3


@dataclass(frozen=True)
class Plan:
    """The files of one save, known on every rank before a byte is written.

    Args:
        tensor_files: pairs of part and file.
        other_files: whole small files.
    """

    tensor_files: tuple[tuple[str, TensorFile], ...]
    other_files: Mapping[str, bytes]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by file name, in the manifest's order."""
        tensors = {file.name: file.size for _, file in self.tensor_files}
        return {**tensors, **{name: len(data) for name, data in self.other_files.items()}}

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes.values())

    @property
    def digest(self) -> int:
        """Equal on ranks whose tensors would lie at the same places."""
        return crc32(b"".join(file.name.encode() + file.header for _, file in self.tensor_files))

    def slots(self) -> dict[tuple[str, str], tuple[str, Slot]]:
        """(part, tensor) -> its file and place."""
        return {
            (part, slot.name): (file.name, slot) for part, file in self.tensor_files for slot in file.slots
        }


class Cancelled(Exception):
    """The save was given up because of another rank."""


def save(
    folder: Path | str, content: Content, *, max_file_bytes: int = MAX_FILE_BYTES, files: Files | None = None
) -> None:
    """Write one checkpoint folder from one process; an earlier checkpoint of this name is replaced.

    Args:
        folder: the folder to appear; its parents are made.
        content: what it holds.
        max_file_bytes: tensor data per file before a part is cut into numbered files with an index.
        files: the file system.

    Raises:
        CheckpointError: the content cannot be saved, or the folder holds something else.
        SaveError: the disk refused. The previous checkpoint is untouched and no temporary folder is left.
    """
    check_content(content)
    Save(folder_at(folder), content, plan(content, max_file_bytes), files=files or Files()).run()


def plan(content: Content, max_file_bytes: int = MAX_FILE_BYTES) -> Plan:
    """Lay out the files of a content.

    Raises:
        CheckpointError: an extra file has a name that is taken or not plain.
    """
    tensor_files: list[tuple[str, TensorFile]] = []
    other = {STATE: json.dumps(content.state, indent=1).encode()}
    for part, specs in content.specs.items():
        planned = plan_files(part, specs, max_file_bytes)
        tensor_files += [(part, file) for file in planned]
        if len(planned) > 1:
            other[f"{part}.safetensors.index.json"] = index_json(planned)
    taken = {MANIFEST, SUMS, *other, *(file.name for _, file in tensor_files)}
    for name in content.extra_files:
        if not name or name in taken or name.startswith(".") or Path(name).name != name or "\\" in name:
            raise CheckpointError(
                f"the extra file name {name!r} cannot be used",
                rule=f"an extra file has a plain name besides {', '.join(sorted(taken))}",
                fix=f"call it {'extra-' + Path(name).name.lstrip('.')!r}",
            )
    return Plan(tuple(tensor_files), {**other, **content.extra_files})


@dataclass
class Save:
    """One rank's part in one save.

    Args:
        folder: the folder to appear.
        key: a word of this save alone, the same on every rank, that tells its records from older ones.
        is_cancelled: asked between operations; True makes `run` give up.
        keep: which checkpoints beside it stay afterwards; None: all.
    """

    folder: Path
    content: Content
    plan: Plan
    rank: int = 0
    num_ranks: int = 1
    key: str = ""
    files: Files = field(default_factory=Files)
    is_cancelled: Callable[[], bool] = lambda: False
    keep: Keep | None = None

    def __post_init__(self) -> None:
        self.folder = folder_at(self.folder)
        self._target = staging_folder(self.folder) if is_remote(self.folder) else self.folder
        self._temporary = temporary_name(self._target)
        self._cells = Cells(tuple(self.plan.sizes.values()))

    def run(self) -> None:
        """Do this rank's part; on rank 0 the checkpoint is complete afterwards.

        Raises:
            CheckpointError: the folder holds something else.
            SaveError: the disk refused.
            Cancelled: another rank could not do its part.
        """
        place = self._target
        try:
            if self.rank == 0:
                self._create()
            else:
                self._await(self._ready)
            record = self._write()
            if self.rank == 0:
                self._commit(record)
                if is_remote(self.folder):
                    place = self.folder
                    self._deliver()
            else:
                self._leave_record(record)
        except BaseException as error:
            if self.rank == 0:
                self._clear_up()
            if isinstance(error, OSError):
                # Once a save is given up, rank 0 takes the folder away under the others' hands.
                self._check()
                raise _refused(self.folder, place, self.plan.num_bytes, error, self.files) from error
            raise
        if self.rank == 0 and self.keep is not None:
            prune(self.folder.parent, self.keep, files=self.files)

    def _deliver(self) -> None:
        """Copy what was made to where it belongs; an earlier checkpoint of this name is there until then."""
        old = old_name(self.folder)
        if (self.folder / MANIFEST).exists():
            self.files.remove(old)
            copy_folder(self.folder, old, first=SUMS, last=MANIFEST)
        self.files.remove(self.folder)
        copy_folder(self._target, self.folder, first=SUMS, last=MANIFEST)
        self.files.remove(old)
        self.files.remove(self._target.parent)

    def _clear_up(self) -> None:
        for _ in range(_CLEARINGS):
            with suppress(OSError):
                self.files.remove(self._target.parent if is_remote(self.folder) else self._temporary)
                return
            time.sleep(_LAST_POLL_S)  # a rank that does not know yet has just put a file there

    # Meeting.

    @property
    def _ready(self) -> str:
        return f"ready-{self.key}"

    def _record(self, rank: int) -> str:
        return f"record-{self.key}-{rank}"

    def _await(self, *names: str) -> None:
        began = time.monotonic()
        while not self.files.names(self._temporary).issuperset(names):
            self._check()
            # As often as it takes to lose little of the time that was waited anyway.
            time.sleep(min(max(_FIRST_POLL_S, (time.monotonic() - began) / 16), _LAST_POLL_S))

    def _check(self) -> None:
        if self.is_cancelled():
            raise Cancelled

    # The parts of a save, in order.

    def _create(self) -> None:
        """Rank 0: all files at full size, so that a full disk is met here."""
        target, files = self._target, self.files
        _refuse_foreign(self.folder)
        if is_remote(self.folder):
            files.remove(target.parent)  # of a save that was killed
        files.make_folder(target.parent)
        files.remove(self._temporary)
        if files.free_bytes(target.parent) < self.plan.num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        files.make_folder(self._temporary)
        for name, size in self.plan.sizes.items():
            files.create(self._temporary / name, size).close()
        if self.num_ranks > 1:
            files.create(self._temporary / self._ready, 0).close()

    def _write(self) -> bytes:
        """This rank's ranges, file by file; returns the record of their checksums."""
        tally = Tally(self._cells)
        ranges = self._ranges()
        # Not all ranks begin with one file: a file system may take one writer of a file at a time.
        numbered = list(enumerate(self.plan.sizes))
        first = len(numbered) * self.rank // self.num_ranks
        written = []
        for number, name in (*numbered[first:], *numbered[:first]):
            mine = sorted(ranges.get(name, ()), key=lambda pair: pair[0])
            if not mine and self.rank:
                continue
            written.append(self._temporary / name)
            with self.files.reopen(written[-1]) as handle:
                for start, chunks in mine:
                    for chunk in chunks:
                        self._check()
                        tally.add(number, start, chunk)
                        self.files.write(handle, chunk, start)
                        start += len(chunk)
        # All of them at the end: until then the disk works beside this. Opened anew, since a process may not
        # have as many files open as a checkpoint may have.
        for path in written:
            with self.files.reopen(path) as handle:
                self.files.sync(handle)
        return tally.to_bytes()

    def _ranges(self) -> dict[str, list[tuple[int, Iterable[Buffer]]]]:
        """File name -> (first byte, its bytes in chunks) of each range that this rank writes."""
        ranges: dict[str, list[tuple[int, Iterable[Buffer]]]] = {}
        if self.rank == 0:
            for _, file in self.plan.tensor_files:
                ranges[file.name] = [(0, [file.header])]
            for name, data in self.plan.other_files.items():
                ranges[name] = [(0, [data])]
        slots = self.plan.slots()
        for piece in self.content.pieces:
            file_name, slot = slots[piece.part, piece.name]
            start = slot.start + piece.start * slot.spec.dtype.itemsize
            ranges.setdefault(file_name, []).append((start, _chunks(piece, slot)))
        return ranges

    def _leave_record(self, record: bytes) -> None:
        """Named when it is whole: rank 0 looks for the name."""
        name = self._record(self.rank)
        unfinished = self._temporary / f"unfinished-{name}"
        with self.files.create(unfinished, 0) as handle:
            self.files.write(handle, record, 0)
        self.files.rename(unfinished, self._temporary / name)

    def _commit(self, own_record: bytes) -> None:
        """Rank 0: wait for all records, write checksums and manifest, and give the folder its name."""
        others = [self._record(rank) for rank in range(1, self.num_ranks)]
        self._await(*others)
        records = [own_record, *((self._temporary / name).read_bytes() for name in others)]
        sums = joined(self._cells, records)
        for name in (*others, *([self._ready] if others else [])):
            self.files.remove_file(self._temporary / name)
        self._write_file(SUMS, sums)
        self._write_file(MANIFEST, self._manifest(crc32(sums)).to_bytes())
        self.files.sync_folder(self._temporary)
        self._take_name()

    def _write_file(self, name: str, data: bytes) -> None:
        with self.files.create(self._temporary / name, len(data)) as handle:
            self.files.write(handle, data, 0)
            self.files.sync(handle)

    def _manifest(self, sums_crc32: int) -> Manifest:
        step = self.content.state["step"]
        if not isinstance(step, int):
            raise AssertionError(f"check_content let the step {step!r} through")
        slots = self.plan.slots()
        return Manifest(
            step=step,
            serial=next_serial(self.folder.parent),
            files=tuple(FileEntry(name=name, size=size) for name, size in self.plan.sizes.items()),
            # In the caller's order, not the file's.
            tensors=tuple(
                _entry(part, *slots[part, name])
                for part, specs in self.content.specs.items()
                for name in specs
            ),
            aliases=dict(self.content.aliases),
            sums_crc32=sums_crc32,
            only=self.content.only,
        )

    def _take_name(self) -> None:
        """A folder that is not empty cannot be renamed over, so an earlier checkpoint steps aside first;
        until the new one has the name, readers find the earlier one under its `old_name`."""
        target, files = self._target, self.files
        old = old_name(target)
        if target.exists():
            if _is_complete(target):
                files.remove(old)
                files.rename(target, old)
            else:
                files.remove(target)
        files.rename(self._temporary, target)
        files.sync_folder(target.parent)
        files.remove(old)


def _chunks(piece: Piece, slot: Slot) -> Iterator[Buffer]:
    return chunks_of(piece.tensor, slot.spec.dtype)


def _entry(part: str, file: str, slot: Slot) -> TensorEntry:
    return TensorEntry(
        part=part,
        name=slot.name,
        file=file,
        dtype=TAGS[slot.spec.dtype],
        shape=slot.spec.shape,
        start=slot.start,
        stop=slot.stop,
    )


def _refuse_foreign(target: Path) -> None:
    """A folder of the user's that is no checkpoint is never replaced."""
    marks = (target / MANIFEST, target / SUMS, old_name(target) / MANIFEST)  # the latter of a broken upload
    if target.is_dir() and (any(mark.exists() for mark in marks) or not any(target.iterdir())):
        return
    if target.exists():
        raise CheckpointError(
            f"{target} exists and is not a checkpoint",
            rule="a save replaces an earlier checkpoint and nothing else",
            fix=f"save to a new name, such as {target / 'checkpoint'}"
            if target.is_dir()
            else f"save to a new name, such as {target.with_name(target.name + '-checkpoint')}",
        )


def _is_complete(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except CheckpointError:
        return False
    return True


def _refused(folder: Path, place: Path, needed: int, error: OSError, files: Files) -> SaveError:
    """What to change when saving `folder` failed at `place`: the same, or where it is made before a copy."""
    is_staged = is_remote(folder) and not is_remote(place)
    target = place.parent if is_staged else place  # what lies in the temporary folder itself
    free = "an unknown amount free"
    if not is_remote(target):
        with suppress(OSError):
            free = f"{bytes_text(files.free_bytes(target.parent))} free"
    given = f"saving {folder} failed: {error.strerror or error} ({bytes_text(needed)} needed, {free})"
    if is_staged:
        return SaveError(
            given,
            rule=f"a checkpoint behind a URL is made whole in {target.parent} before it is copied",
            fix=f"set TMPDIR to a writable folder with {bytes_text(needed)} of room",
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SaveError(
            given,
            rule="a new checkpoint is written beside the previous one before it replaces anything",
            fix=f"free {bytes_text(needed)} on the disk of {target.parent}, or save to another disk",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return SaveError(
            given,
            rule=f"the folder {target.parent} must be writable",
            fix=f"`chmod u+w {target.parent}` as its owner, or save to a folder of your own",
        )
    return SaveError(
        given,
        rule="every file must be written and made durable before the checkpoint gets its name",
        fix=f"check the file system of {target.parent}, or save to another one; the previous one is intact",
    )
