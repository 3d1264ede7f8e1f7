"""Saves by several ranks without any mesh: they meet in the folder alone, and die there at every operation.

Ranks are threads whose file operations come one at a time, in whatever order the threads get to them.
"""

from __future__ import annotations

import errno
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch

from sixfold.base.errors import CheckpointError, SaveError
from sixfold.checkpoint import (
    MODEL,
    OPTIMIZER,
    Content,
    Keep,
    Piece,
    Spec,
    latest,
    open_checkpoint,
    prune,
    save,
    step_folder,
    whole,
    writing,
)
from sixfold.checkpoint.files import Buffer, Files
from sixfold.checkpoint.writing import Cancelled, Save, plan

RANKS = 3


def _weight(step: int) -> torch.Tensor:
    return torch.randn(50, 40, generator=torch.Generator().manual_seed(step))


def content_of(step: int, rank: int, num_ranks: int = RANKS) -> Content:
    """Everything is cut over the ranks, at borders that are no borders of rows or cells."""
    wide, narrow = Spec((50, 40), torch.float32), Spec((50, 40), torch.bfloat16)
    specs = {MODEL: {"w": wide}, OPTIMIZER: {"w/m": narrow, "w/v": wide}}
    start, stop = 2000 * rank // num_ranks, 2000 * (rank + 1) // num_ranks
    flat = _weight(step).view(-1)[start:stop]
    pieces = [Piece(MODEL, "w", start, flat), Piece(OPTIMIZER, "w/m", start, flat * 2)]
    pieces.append(Piece(OPTIMIZER, "w/v", start, flat * 3))
    return Content(specs, pieces, {"step": step}, extra_files={"config.json": b"{}", "card.md": b"#"})


def holds(folder: Path | None) -> int:
    """The step of a checkpoint after every byte of it was verified and compared."""
    assert folder is not None
    saved = open_checkpoint(folder)
    saved.verify()
    assert torch.equal(saved.read_model("w"), _weight(saved.step))
    assert torch.equal(saved.read_optimizer("w")["m"], (_weight(saved.step) * 2).bfloat16())
    return saved.step


class Killed(BaseException):
    """The process is gone: not an Exception, so nothing that handles those can go on."""


class World:
    """What all ranks do to the disk: one operation at a time, all dead after `last` of them.

    Args:
        torn: the last operation is done by half.
        victim: the only rank that dies; the others are told, as a launcher or a step would tell them.
    """

    def __init__(self, last: int = 10**9, *, torn: bool = False, victim: int | None = None) -> None:
        self.last, self.torn, self.victim = last, torn, victim
        self.log: list[tuple[int, str, str]] = []
        self.lock = threading.Lock()
        self.dead = threading.Event()

    def run(self, folder: Path, step: int) -> list[BaseException | None]:
        """One save by all ranks; what became of each."""
        ends: list[BaseException | None] = [None] * RANKS
        key = secrets.token_hex(4)  # one for each save: nothing of an older one is ever waited for

        def rank_of(rank: int) -> None:
            content = content_of(step, rank)
            try:
                Save(
                    folder,
                    content,
                    plan(content),
                    rank=rank,
                    num_ranks=RANKS,
                    key=key,
                    files=Mortal(self, rank),
                    is_cancelled=self.dead.is_set if self.victim is not None else lambda: False,
                ).run()
            except BaseException as error:
                ends[rank] = error

        threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        return ends


class Mortal(Files):
    """One rank's disk."""

    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank = world, rank

    def _do(self, name: str, path: object, whole: Callable[[], Any], half: Callable[[], Any]) -> Any:
        world = self.world
        with world.lock:
            mortal = world.victim in (None, self.rank)
            if mortal and world.dead.is_set():
                raise Killed
            if mortal and len(world.log) >= world.last:
                world.dead.set()
                if world.torn:
                    half()
                raise Killed
            if mortal:
                world.log.append((self.rank, name, Path(str(path)).name))
            return whole()

    def make_folder(self, folder: Path) -> None:
        self._do("make_folder", folder, lambda: Files.make_folder(self, folder), int)

    def create(self, path: Path, size: int) -> FileIO:
        whole, half = (lambda n=n: Files.create(self, path, n) for n in (size, size // 2))
        handle: FileIO = self._do("create", path, whole, lambda: half().close())
        return handle

    def write(self, handle: FileIO, data: Buffer, offset: int) -> None:
        whole, half = (
            lambda n=n: Files.write(self, handle, memoryview(data)[:n], offset)
            for n in (len(data), len(data) // 2)
        )
        self._do("write", handle.name, whole, half)

    def sync(self, handle: FileIO) -> None:
        self._do("sync", handle.name, int, int)  # nothing here survives the machine

    def sync_folder(self, folder: Path) -> None:
        self._do("sync_folder", folder, int, int)

    def rename(self, source: Path, target: Path) -> None:
        self._do("rename", target, lambda: Files.rename(self, source, target), int)

    def remove_file(self, path: Path) -> None:
        self._do("remove_file", path, lambda: Files.remove_file(self, path), int)

    def remove(self, folder: Path) -> None:
        def half() -> None:
            for path in sorted(folder.iterdir())[::2] if folder.exists() else ():
                path.unlink()

        self._do("remove", folder, lambda: Files.remove(self, folder), half)

    def names(self, folder: Path) -> set[str]:
        if self.world.victim in (None, self.rank) and self.world.dead.is_set():
            raise Killed
        return super().names(folder)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_LAST_POLL_S", 0.001)
    monkeypatch.setattr(writing, "_FIRST_POLL_S", 0.0005)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("before")
    for step in (1, 2):
        save(step_folder(folder, step), content_of(step, 0, 1))
    return folder


def test_what_ranks_wrote_together_is_what_one_would_have_written(tmp_path: Path) -> None:
    assert World().run(tmp_path / "many", 5) == [None] * RANKS
    save(tmp_path / "one", content_of(5, 0, 1))
    assert holds(tmp_path / "many") == 5
    one, many = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "many")
    )
    assert {name for name in one if one[name] != many.get(name)} == {"manifest.json"}  # it was saved second
    assert one.keys() == many.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "one"]


@pytest.mark.parametrize("torn", [False, True], ids=["cut", "torn"])
@pytest.mark.parametrize("target", ["step-00000009", "step-00000002"], ids=["new", "replacing"])
def test_all_ranks_killed_after_any_number_of_operations(
    before: Path, tmp_path: Path, target: str, torn: bool
) -> None:
    found, last = [], 0
    while True:
        root = tmp_path / f"kill-{last}"
        shutil.copytree(before, root)
        world = World(last, torn=torn)
        ends = world.run(root / target, 9)
        step = holds(latest(root))
        if ends == [None] * RANKS:
            break
        assert all(end is None or isinstance(end, Killed) for end in ends)
        found.append(step)
        if last % 7 == 0:  # what the kill left behind neither hinders the next save nor stays
            assert World().run(root / target, 9) == [None] * RANKS
            assert holds(latest(root)) == 9
            prune(root, Keep(3))
            assert {path.name for path in root.iterdir()} == {"step-00000001", "step-00000002", target}
        shutil.rmtree(root)
        last += 1
    assert last >= 50  # four of these are the two hundred points
    assert step == 9
    assert found == sorted(found)
    assert set(found) == {2, 9}


@pytest.mark.parametrize("victim", range(RANKS))
def test_one_rank_killed_after_any_number_of_its_operations(
    before: Path, tmp_path: Path, victim: int
) -> None:
    last = 0
    while True:
        root = tmp_path / f"kill-{last}"
        shutil.copytree(before, root)
        world = World(last, victim=victim)
        ends = world.run(root / "step-00000009", 9)
        step = holds(latest(root))
        if ends == [None] * RANKS:
            break
        assert isinstance(ends[victim], Killed)
        for rank, end in enumerate(ends):
            assert rank == victim or end is None or isinstance(end, Cancelled)
        if victim:  # rank 0 cleared up, but for what it could not know of
            assert step == 2
            left = [path.name for path in root.iterdir() if path.name.startswith(".")]
            assert left in ([], [".tmp-step-00000009"])
        last += 1
    assert step == 9
    assert last >= 8


def test_a_rank_whose_disk_fails_says_so_and_nothing_is_left(before: Path, tmp_path: Path) -> None:
    class Broken(Mortal):
        def write(self, handle: FileIO, data: Buffer, offset: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

    root = tmp_path / "root"
    shutil.copytree(before, root)
    world, ends = World(), []
    cancelled = threading.Event()

    def run(rank: int) -> None:
        content = content_of(9, rank)
        files = Broken(world, rank) if rank == 1 else Mortal(world, rank)
        try:
            Save(
                root / "c", content, plan(content), rank, RANKS, "k", files, is_cancelled=cancelled.is_set
            ).run()
        except Exception as error:
            ends.append((rank, error))
            cancelled.set()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    errors = dict(ends)
    assert isinstance(errors[1], SaveError)
    assert "Input/output error" in str(errors[1])
    assert isinstance(errors[0], Cancelled)
    assert sorted(path.name for path in root.iterdir()) == ["step-00000001", "step-00000002"]


def test_records_of_an_older_save_are_not_taken_for_new_ones(tmp_path: Path) -> None:
    """A save was killed just before its manifest; the next one to the same name waits for its own ranks."""
    world = World(10**9)
    stale = tmp_path / ".tmp-c"
    stale.mkdir()
    for name in ("ready-old", "record-old-1", "record-old-2"):
        (stale / name).write_bytes(b"")
    content = content_of(3, 1)
    late = Save(tmp_path / "c", content, plan(content), 1, RANKS, "new", Mortal(world, 1))
    waiting = threading.Thread(target=late.run)
    waiting.start()
    time.sleep(0.02)
    assert waiting.is_alive()  # it did not write into the old folder
    assert {path.name for path in stale.iterdir()} == {"ready-old", "record-old-1", "record-old-2"}
    others = []
    for rank in (0, 2):
        content = content_of(3, rank)
        save_ = Save(tmp_path / "c", content, plan(content), rank, RANKS, "new", Mortal(world, rank))
        others.append(threading.Thread(target=save_.run))
        others[-1].start()
    for thread in (waiting, *others):
        thread.join(20)
    assert holds(tmp_path / "c") == 3


def test_a_checkpoint_of_another_model_lists_what_differs(tmp_path: Path) -> None:
    save(tmp_path / "c", whole({"a": torch.zeros(2), "b": torch.zeros(3)}, {"step": 1}))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "c").check_model({"a": ((3,), torch.float32), "c": ((1,), torch.float32)})
    assert "missing: c" in str(caught.value)
    assert "extra: b" in str(caught.value)
    assert "a: shape [2] saved, [3] expected" in str(caught.value)
