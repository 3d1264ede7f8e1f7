"""One save by all ranks: what they agree on before, and how its end comes to all of them at once.

The engine owns one `Saving`. Writers are threads that meet in the folder; ranks exchange a few numbers
on their main threads, at the start and whenever somebody looks, so that training may go on meanwhile
and a failure on one rank is raised by all at the same point. It never looks at what is saved.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from sixfold.base.errors import CheckpointError, SaveError, SixfoldError
from sixfold.base.units import bytes_text
from sixfold.checkpoint.content import MODEL, Content, Piece, check_content
from sixfold.checkpoint.files import Files
from sixfold.checkpoint.reading import open_checkpoint
from sixfold.checkpoint.remote import is_remote, staging_place
from sixfold.checkpoint.retention import Keep
from sixfold.checkpoint.tensorfile import Spec
from sixfold.checkpoint.writing import Cancelled, Plan, Save, plan
from sixfold.mesh import Mesh

T = TypeVar("T")

_FIRST_POLL_S, _LAST_POLL_S = 0.001, 0.02
_REHEARSAL = ".rehearsal"
_REHEARSAL_LIMIT_S = 90.0
"""A shared file system may take a minute to show one host what another has written."""


class Saving:
    """The saves of one engine, at most one under way.

    Args:
        files: the file system.
    """

    def __init__(self, mesh: Mesh, files: Files | None = None) -> None:
        self._mesh = mesh
        self._files = files or Files()
        self._flight: _Flight | None = None
        self._failed: _Flight | None = None  # its writers may still be clearing up

    @property
    def is_under_way(self) -> bool:
        """Whether a save was begun and its end is not known yet; the same on every rank."""
        return self._flight is not None

    def start(
        self, folder: Path, make: Callable[[], Content], *, snapshot: bool, keep: Keep | None = None
    ) -> None:
        """Begin a save on every rank, after the one under way has ended.

        Args:
            make: this rank's content; may be a collective.
            snapshot: copy it into host memory, so that the state may change at once.
            keep: which checkpoints beside it stay.

        Raises:
            CheckpointError: it cannot be saved, or the save before failed; on every rank.
        """
        self.wait()
        if self._failed is not None:
            self._failed.join()  # on every rank before any writes: it may have had the same name
            self._failed = None

        def prepared() -> tuple[Content, Plan, str | None]:
            content = make()
            check_content(content)
            return content, plan(content), staging_place() if is_remote(folder) else None

        content, planned, staging = together(self._mesh, folder, prepared)
        row = [secrets.token_hex(8), planned.digest, staging]
        rows = [json.loads(text) for text in self._mesh.texts(json.dumps(row))]
        strangers = [str(rank) for rank, row in enumerate(rows) if row[1] != rows[0][1]]
        if strangers:
            raise CheckpointError(
                f"rank(s) {', '.join(strangers)} would lay out {folder} differently from rank 0",
                rule="every rank has the same tensors by name, shape and type",
                fix="build the model and its optimizer from the same code on every rank",
            )
        strangers = [f"rank {rank}: {row[2]}" for rank, row in enumerate(rows) if row[2] != rows[0][2]]
        if strangers:
            raise CheckpointError(
                f"{folder} without a common temporary folder: rank 0: {rows[0][2]}, {strangers[0]}",
                rule="a checkpoint behind a URL is made whole by all ranks of one host before it is copied",
                fix="mount the store on all hosts and name the folder there, or set one TMPDIR for all ranks",
            )
        save = Save(
            folder,
            content.snapshot() if snapshot else content,
            planned,
            rank=self._mesh.rank,
            num_ranks=self._mesh.world_size,
            key=rows[0][0],
            files=self._files,
            keep=keep,
        )
        self._flight = _Flight(save)

    def look(self) -> None:
        """Learn whether the save under way has ended; with none under way nothing is exchanged.

        Raises:
            SaveError, CheckpointError: it failed on some rank; on every rank.
        """
        flight = self._flight
        if flight is None:
            return
        is_over = flight.is_over  # before the error: a writer sets that first
        failed, over = self._mesh.total(float(flight.error is not None), float(is_over))
        if failed:
            flight.cancelled.set()
            self._flight, self._failed = None, flight
            error = flight.error
            raise_together(self._mesh, _told(flight.folder, error) if error is not None else None)
        if over == self._mesh.world_size:
            self._flight = None

    def wait(self, limit_s: float | None = None) -> None:
        """Return when no save is under way.

        Args:
            limit_s: give the save up after so long.

        Raises:
            SaveError, CheckpointError: it failed on some rank; on every rank.
        """
        flight, began, pause = self._flight, time.monotonic(), _FIRST_POLL_S
        try:
            while flight is not None and self._flight is flight:
                flight.await_end(pause)
                pause = min(2 * pause, _LAST_POLL_S)
                if limit_s is not None and time.monotonic() - began > limit_s and not flight.is_over:
                    flight.error = flight.error or _lonely(flight.folder, limit_s)
                self.look()
        finally:
            if flight is not None:
                flight.join()

    def rehearse(self, folder: Path, num_bytes: int) -> None:
        """Save a number of every rank's into `folder`, read them all on every rank, and remove it all.

        Args:
            num_bytes: room that a checkpoint will need.

        Raises:
            SaveError: it could not be written, one rank does not see what others wrote, or there is less
                room; on every rank.
        """
        target, name = folder / _REHEARSAL, f"rank-{self._mesh.rank}"
        names = [f"rank-{rank}" for rank in range(self._mesh.world_size)]
        content = Content(
            specs={MODEL: {each: Spec((1,), torch.int64) for each in names}},
            pieces=[Piece(MODEL, name, 0, torch.tensor([self._mesh.rank]))],
            state={"step": 0},
        )
        self.start(target, lambda: content, snapshot=False)
        self.wait(_REHEARSAL_LIMIT_S)

        def check() -> None:
            try:
                open_checkpoint(target).verify()
                free = self._files.free_bytes(folder)
            except (OSError, CheckpointError) as error:
                raise SaveError(
                    f"{target} was written by all ranks, and rank {self._mesh.rank} cannot read it: {error}",
                    rule="what was saved can be loaded on every rank",
                    fix="name a folder on a file system that all hosts share and may read",
                ) from error
            if free < num_bytes:
                raise SaveError(
                    f"{folder} has {bytes_text(free)} left, and one checkpoint takes {bytes_text(num_bytes)}",
                    rule="there is room for a checkpoint before training begins",
                    fix="free some, or save to another disk",
                )

        try:
            together(self._mesh, target, check)
        finally:
            if self._mesh.rank == 0:
                self._files.remove(target)


class _Flight:
    """One rank's writer.

    The interpreter waits for it at its end, so a script that ends right after a save has saved.
    """

    def __init__(self, save: Save) -> None:
        self.folder = save.folder
        self.cancelled = threading.Event()
        self.error: Exception | None = None
        self._over = threading.Event()
        save.is_cancelled = self.cancelled.is_set
        self._thread = threading.Thread(target=self._write, args=(save,), name="sixfold-save")
        self._thread.start()

    @property
    def is_over(self) -> bool:
        return self._over.is_set()

    def await_end(self, limit_s: float) -> None:
        self._over.wait(limit_s)

    def join(self) -> None:
        self._thread.join()

    def _write(self, save: Save) -> None:
        try:
            save.run()
        except Cancelled:
            pass
        except Exception as error:
            self.error = error
        finally:
            self._over.set()


def together(mesh: Mesh, place: Path, call: Callable[[], T]) -> T:
    """What `call` gives on this rank, after it has come to its end on all of them. A collective.

    Args:
        place: what it reads or writes.

    Raises:
        SaveError, CheckpointError: of the first rank on which it raised, on every rank; so none goes on to
            wait for one that has failed, whatever of.
    """
    try:
        result = call()
    except Exception as error:
        raise_together(mesh, _told(place, error))
        raise
    raise_together(mesh, None)
    return result


def raise_together(mesh: Mesh, failure: SixfoldError | None) -> None:
    """Raise the first rank's failure, if any has one, on every rank. A collective.

    Later ones may only follow from it, as where rank 0 has taken the folder away.
    """
    words = [type(failure).__name__, failure.given, failure.rule, failure.fix] if failure else None
    everyones = [json.loads(text) for text in mesh.texts(json.dumps(words))]
    for rank, row in enumerate(everyones):
        if row is not None and rank == mesh.rank and failure is not None:
            raise failure
        if row is not None:
            kind = SaveError if row[0] == SaveError.__name__ else CheckpointError
            raise kind(f"rank {rank}: {row[1]}", rule=row[2], fix=row[3])


def _lonely(folder: Path, limit_s: float) -> SaveError:
    return SaveError(
        f"the ranks did not find each other's files beside {folder} in {limit_s:g} s",
        rule="all ranks save into one folder",
        fix="name a folder on a file system that all hosts share",
    )


def _told(place: Path, error: Exception) -> SixfoldError:
    if isinstance(error, SixfoldError):
        return error
    told = CheckpointError(
        f"{place}: {type(error).__name__}: {error}",
        rule="what all ranks save or load together works on each of them; state is tensors and plain values",
        fix="mend what the message names; its rank shows the original error above this one",
    )
    told.__cause__ = error
    return told
