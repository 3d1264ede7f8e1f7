"""Which rank tells a verdict when the store of the run ends while it is being made, or before."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sixfold.base.ring import Block, Ring, Topic
from sixfold.monitor.verdict import Verdict
from sixfold.monitor.watcher import VERDICT_OF, Watcher

TOPIC = Topic("all-reduce", 2, "float32", 8, "0-2")


class Keeper:
    """A store that rank 0 keeps, and that ends with it `before` or after it has heard of a verdict."""

    def __init__(self, end: Callable[[], None], *, before: bool) -> None:
        self.values: dict[str, Any] = {}
        self._end, self._before = end, before
        self.has_ended = False

    def set(self, key: str, value: Any, /) -> None:
        self._answer()
        self.values[key] = value

    def get(self, key: str, /) -> bytes:
        self._answer()
        return bytes(self.values[key])

    def add(self, key: str, amount: int, /) -> int:
        self._answer()
        return 0

    def check(self, keys: list[str], /) -> bool:
        self._answer()
        return all(key in self.values for key in keys)

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        self._answer()
        if key == "verdict":
            self._end()
            self.has_ended = True
            if self._before:
                self._answer()
        return str(self.values.setdefault(key, desired)).encode()

    def _answer(self) -> None:
        if self.has_ended:
            raise ConnectionError("the store has ended")


class Watched:
    """Rank 2's dispatcher, as far as it is watched."""

    phase_name = "step"
    on_broken: Callable[[RuntimeError], None] | None = None

    def __init__(self) -> None:
        self.ring = Ring()
        self.neighbours: dict[int, Block] = {}

    def settle(self) -> None:
        pass


class Scene:
    """Ranks 0 and 2 wait for rank 1, which died of an exception; this is rank 2.

    Args:
        last_words: how rank 0 ends when rank 2 has its verdict; empty where it is killed.
        before: whether it ends before it has answered rank 2.
        tells_deaths: as of `Watcher`.
    """

    def __init__(self, folder: Path, *, last_words: str, before: bool, tells_deaths: bool = True) -> None:
        self._folder, self._last_words = folder, last_words
        self._tells_deaths = tells_deaths
        self._told: list[Verdict | None] = []
        self._is_told = threading.Event()
        self._rings = {0: Ring(), 1: Ring()}
        self._store = Keeper(self._end_of_zero, before=before)

    def told(self) -> list[Verdict | None]:
        """What rank 2 tells of the death of rank 1."""
        with self.watching() as (_, watched):
            for ring in (self._rings[0], self._rings[1], watched.ring):
                ring.post(TOPIC, 3, "train.py:9")
            self._rings[1].write("end", "ended with ValueError: boom")
            self._store.set("ring/1", self._rings[1].snapshot())
            Path(self._path(1)).unlink()
            assert self._is_told.wait(20)
        return self._told

    def told_of_a_broken_exchange(self, *, is_kept: bool = False) -> list[Verdict | None]:
        """What rank 2 tells where rank 0 has ended first, and its store with it unless that `is_kept`."""
        with self.watching() as (watcher, watched):
            for ring in (self._rings[1], watched.ring):
                ring.post(TOPIC, 3, "train.py:9")
            self._store.set("verdict", b"0")
            self._end_of_zero()
            self._store.has_ended = not is_kept
            watcher.explain(RuntimeError("connection reset by peer"))
        return self._told

    @contextmanager
    def watching(self) -> Iterator[tuple[Watcher, Watched]]:
        """The watcher of rank 2, which has met the others."""
        watched = Watched()
        watcher = Watcher(
            watched,
            self._store,
            rank=2,
            world_size=3,
            timeouts={"step": 1.0},
            tell=self._tell,
            tells_deaths=self._tells_deaths,
            folder=self._folder,
        )
        try:
            for rank in self._rings:
                self._rings[rank].share(self._path(rank))
            deadline = time.monotonic() + 20
            while len(watched.neighbours) < 2:
                assert time.monotonic() < deadline, "the watcher has not met its neighbours"
                time.sleep(0.01)
            yield watcher, watched
        finally:
            watcher.close()

    def _tell(self, verdict: Verdict | None) -> None:
        self._told.append(verdict)
        self._is_told.set()

    def _path(self, rank: int) -> str:
        (own,) = (str(path) for path in self._folder.glob("*-2.ring"))
        return own.replace("-2.ring", f"-{rank}.ring")

    def _end_of_zero(self) -> None:
        if self._last_words:
            self._rings[0].write("end", self._last_words)
        else:
            pid = ended_process()
            with pytest.MonkeyPatch.context() as patch:  # what it wrote is left, and its process is no more
                patch.setattr(os, "getpid", lambda: pid)
                self._rings[0].beat("train.py:9")
        for path in self._folder.glob("*-0.ring"):
            path.unlink()


def ended_process() -> int:
    """The id of a process that has ended and was waited for."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("before", "last_words"),
    [(False, f"{VERDICT_OF} 2"), (True, f"{VERDICT_OF} 2"), (True, "")],
    ids=["answered", "unanswered", "killed"],
)
def test_who_is_to_tell_does_so_though_the_store_ends(before: bool, last_words: str, tmp_path: Path) -> None:
    """Rank 0 sees in its store that rank 2 has a verdict, and ends."""
    (verdict,) = Scene(tmp_path, last_words=last_words, before=before).told()
    assert verdict is not None
    assert verdict.guilty == (1,)
    assert "rank 1 died before the end of all-reduce #3" in verdict.headline
    assert "ended with ValueError: boom" in verdict.headline


def test_a_verdict_that_another_tells_is_not_told_again(tmp_path: Path) -> None:
    """Rank 0 tells and ends before rank 2 can ask whether it shall."""
    assert Scene(tmp_path, last_words=f"{VERDICT_OF} 0", before=True).told() == [None]


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_verdict_heard_of_ends_this_rank_whatever_it_would_find_itself(
    is_kept: bool, tmp_path: Path
) -> None:
    """To rank 2, who told and ended looks like one that died, which it leaves to the launcher: also where it
    asked whether there is a verdict before there was one."""
    scene = Scene(tmp_path, last_words=f"{VERDICT_OF} 0", before=True, tells_deaths=False)
    assert scene.told_of_a_broken_exchange(is_kept=is_kept) == [None]


def test_a_rank_that_an_error_takes_along_says_which(tmp_path: Path) -> None:
    """The watcher is closed on the way of the error, before anything has printed it."""
    scene = Scene(tmp_path, last_words="", before=False)
    with pytest.raises(ValueError, match="boom"), scene.watching() as (_, watched):
        raise ValueError("boom\n  rule: none")
    assert watched.ring.position().end == "ended with ValueError: boom"
