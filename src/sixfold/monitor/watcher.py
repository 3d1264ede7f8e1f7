"""The watcher: a thread beside each rank that tells who is behind a hang.

The engine starts one where there are several ranks. It notes in the rank's ring every second that it
lives and where its main thread is; when an exchange was waited for longer than its phase allows, or
broke, it reads everyone's ring, has the verdict made and hands it over. It never joins an exchange and
never changes what the run does before that.

Note "Two ways to a ring". Rings lie in files mapped into memory: ranks of one host read each other's, also
those of processes that have died. A ring on another host is sent through the store by its own watcher
while somebody is alarmed. In quiet times one small message a second and rank goes to the store.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from sixfold.base.places import place_of
from sixfold.base.processes import is_running
from sixfold.base.ring import Block, Position, Ring, opened, read
from sixfold.monitor.verdict import LEFT, Verdict, is_complete, judge

QUIET_S = 1.0
ALARMED_S = 0.25
SETTLE_S = 0.2
"""After a broken exchange: time for the processes that it takes along to end."""
COME_S = 4.0
"""After a broken exchange: time for the others to come to it too, so that it shows who is alone."""
MEET_S = 30.0
"""How long rings of other ranks are looked for on this host."""
ANSWER_S = 2.5
"""How long a verdict waits for rings from other hosts."""
EXPLAIN_S = 8.0
"""How long an error of a broken exchange is held back for a verdict."""

VERDICT_OF = "ended on the verdict of rank"
"""The last words of a rank that tells a verdict, or has heard of one: who tells it follows."""

_JOIN_S = 2.0


class Store(Protocol):
    """The few methods of torch.distributed's stores that are used; the object is the watcher's alone."""

    def set(self, key: str, value: Any, /) -> Any: ...
    def get(self, key: str, /) -> bytes: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def check(self, keys: list[str], /) -> bool: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


class Recorded(Protocol):
    """What is watched: the mesh's dispatcher."""

    ring: Ring
    phase_name: str
    neighbours: dict[int, Block]
    on_broken: Callable[[RuntimeError], None] | None

    def settle(self) -> None: ...


class Watcher:
    """Watches one rank and, with the others' watchers, all of them.

    Args:
        watched: the dispatcher of this rank.
        store: reaches the watchers of all ranks.
        rank: this rank.
        world_size: all ranks.
        timeouts: seconds by phase; a phase without its own has that of "step".
        tell: receives a verdict on the rank that tells it, None on all others; ends the process.
        tells_deaths: whether a death that broke an exchange is told; not where a launcher does it.
        folder: where rings lie; None for the system's folder of temporary files.
    """

    def __init__(
        self,
        watched: Recorded,
        store: Store,
        *,
        rank: int,
        world_size: int,
        timeouts: Mapping[str, float],
        tell: Callable[[Verdict | None], None],
        tells_deaths: bool = True,
        folder: Path | None = None,
    ) -> None:
        self._watched, self._store = watched, store
        self._rank, self._world_size = rank, world_size
        self._timeouts, self._tell, self._tells_deaths = timeouts, tell, tells_deaths
        self._quiet_s = min(QUIET_S, min(timeouts.values()) / 4)
        self._main = threading.main_thread().ident
        self._is_broken = self._is_over = False
        self._began = self._broken_at = time.monotonic()
        self._wake = threading.Event()
        self._alarms = 0
        self._answers_by: float | None = None
        self._asked: dict[int, bytes | None] = {}
        # The first to come names this run; the host keeps apart what lies in a folder that hosts share.
        run = store.compare_set("run", "", secrets.token_hex(8)).decode()
        self._rings = f"{folder or tempfile.gettempdir()}/sixfold-{run}-{platform.node()}-"
        self._ring = watched.ring
        self._ring.share(self._path(rank))
        watched.on_broken = self.explain
        self._thread = threading.Thread(target=self._run, name="sixfold-watcher", daemon=True)
        self._thread.start()

    def explain(self, error: RuntimeError) -> None:
        """Hold back the error of a broken exchange; returns if no rank is found to blame for it."""
        self._broken_at = time.monotonic()
        self._is_broken = True
        self._wake.set()
        deadline = time.monotonic() + EXPLAIN_S
        while self._is_broken and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)

    def close(self, how: str | None = None) -> None:
        """End the thread and leave word for those who still count on this rank.

        Args:
            how: how this rank ends; None: as the interpreter knows it.
        """
        if self._is_over:
            return
        self._is_over = True
        self._watched.on_broken = None
        self._wake.set()
        if self._thread is not threading.current_thread():
            self._thread.join(_JOIN_S)
        self._ring.write("end", how or _last_words())
        with contextlib.suppress(Exception):  # the store may have ended before
            self._store.set(f"ring/{self._rank}", self._ring.snapshot())
        self._remove(self._rank)
        self._watched.neighbours.clear()

    # The thread.

    def _run(self) -> None:
        while not self._is_over:
            self._meet_neighbours()
            self._wake.wait(ALARMED_S if self._is_broken or self._is_late(0.5) else self._quiet_s)
            self._wake.clear()
            if self._is_over:
                return
            self.look()

    def look(self) -> None:
        """One round: leave a sign of life, listen to the others, judge if it is time."""
        self._watched.settle()
        frame = sys._current_frames().get(self._main or 0)
        self._ring.beat(place_of(frame, besides="mesh"))
        try:
            self._listen()
        except Exception:
            # Without its store, which may have died with the rank that kept it, and in whatever else may
            # happen to a watcher: what lies on this host must do.
            self._judge_alone()

    def _meet_neighbours(self) -> None:
        known = self._watched.neighbours
        if len(known) < self._world_size - 1 and time.monotonic() - self._began < MEET_S:
            for rank in range(self._world_size):
                if rank != self._rank and rank not in known and (block := opened(self._path(rank))):
                    known[rank] = block

    def _is_late(self, part: float = 1.0) -> bool:
        blocked = self._ring.position().blocked
        timeout = self._timeouts.get(self._watched.phase_name, self._timeouts["step"])
        return blocked is not None and (blocked.wait_s or 0.0) > part * timeout

    def _listen(self) -> None:
        """Answer the others' alarms; when it is time, ask for their rings and judge."""
        alarms = self._store.add("alarms", 0)
        if alarms != self._alarms:
            self._alarms = alarms
            if (teller := self._told()) is not None:
                self._end(None, teller)
                return
            self._store.set(f"ring/{self._rank}", self._ring.snapshot())
        if not self._is_broken and not self._is_late():
            self._answers_by = None
            return
        if self._is_broken:
            time.sleep(SETTLE_S)
        if self._answers_by is None:
            far = [rank for rank in range(self._world_size) if self._near(rank) is None]
            self._asked = {rank: self._sent(rank) for rank in far}
            self._answers_by = time.monotonic() + (ANSWER_S if far else 0.0)
            self._store.add("alarms", 1)
        if time.monotonic() >= self._answers_by:
            self._judge(is_last=not self._is_broken or time.monotonic() - self._broken_at > COME_S)

    def _judge(self, *, is_last: bool) -> None:
        """Have the verdict made; unless `is_last`, only when all have come to what broke or have died."""
        positions = {rank: self._position(rank) for rank in range(self._world_size)}
        if not is_last and not is_complete(positions, self._ring.position()):
            return
        verdict = self._verdict(positions)
        self._answers_by = None
        if verdict is not None:
            self._end(verdict, self._teller())
        elif (teller := self._told()) is not None:
            # A verdict that was told meanwhile has ended ranks, who then seem to have died by themselves.
            self._end(None, teller)
        else:
            self._is_broken = False

    def _judge_alone(self) -> None:
        positions = {rank: self._near(rank) for rank in range(self._world_size)}
        teller = self._heard()
        if teller is not None and teller != self._rank:
            # Before a judgement of one's own: who told it and ended would count as one more that died.
            self._end(None, teller)
            return
        if not self._is_broken and not self._is_late():
            return
        verdict = self._verdict(positions)
        self._is_broken = False
        if verdict is not None:
            self._end(verdict, self._rank)

    def _teller(self) -> int:
        """Which rank tells the verdict, now that this rank has made it.

        The rank that keeps the store may hear of a verdict and end before the others have their answer.
        """
        try:
            teller = int(self._store.compare_set("verdict", "", str(self._rank)))
        except Exception:
            heard = self._heard()
            return self._rank if heard is None else heard
        with contextlib.suppress(Exception):
            self._store.add("alarms", 1)
        return teller

    def _told(self) -> int | None:
        """Who tells a verdict that another rank has made; None where there is none."""
        return int(self._store.get("verdict")) if self._store.check(["verdict"]) else self._heard()

    def _heard(self) -> int | None:
        """Who tells a verdict, as ranks of this host have left word: their rings stay mapped here."""
        for block in list(self._watched.neighbours.values()):
            left, _, teller = read(block).end.rpartition(" ")
            if left == VERDICT_OF:
                return int(teller)
        return None

    def _verdict(self, positions: Mapping[int, Position | None]) -> Verdict | None:
        verdict = judge(positions)
        if verdict is None or not self._is_broken:
            return verdict
        # A link that breaks by itself has an error of its own, which says more.
        is_told = verdict.kind != "network" and (self._tells_deaths or verdict.kind != "died")
        return verdict if is_told else None

    def _end(self, verdict: Verdict | None, teller: int) -> None:
        # An exchange that breaks from now on is held back until the process has ended.
        self._is_over = True
        self._ring.write("end", f"{VERDICT_OF} {teller}")
        self._remove(self._rank)
        told = verdict if teller == self._rank else None
        if told is not None:
            for rank in told.guilty:  # it may have died
                self._remove(rank)
        self._tell(told)

    # Rings.

    def _path(self, rank: int) -> str:
        return f"{self._rings}{rank}.ring"

    def _remove(self, rank: int) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._path(rank))

    def _near(self, rank: int) -> Position | None:
        """The position of a rank on this host, also of one that has ended if its ring was met before."""
        block = self._ring.snapshot() if rank == self._rank else opened(self._path(rank))
        block = block or self._watched.neighbours.get(rank)
        if block is None:
            return None
        position = read(block)
        silent_s = max(0.0, time.time() - position.beat)
        return replace(position, silent_s=silent_s, is_alive=is_running(position.pid))

    def _sent(self, rank: int) -> bytes | None:
        key = f"ring/{rank}"
        return self._store.get(key) if self._store.check([key]) else None

    def _position(self, rank: int) -> Position | None:
        near = self._near(rank)
        if near is not None:
            return near
        sent = self._sent(rank)
        if sent is None:
            return None
        return replace(read(sent), is_alive=sent != self._asked.get(rank))


def _last_words() -> str:
    """How a plain script ends: with the exception that is on its way or was printed, or in peace."""
    error = sys.exc_info()[1] or getattr(sys, "last_value", None)
    said = str(error).partition("\n")[0]
    return f"ended with {type(error).__name__}: {said}" if error is not None else LEFT
