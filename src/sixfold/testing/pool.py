"""The pool: ranks forked from a warm server, one crew of them per world size, kept from run to run.

Used by the pytest plugin and from scripts. A crew joins its world once, through a file (no port), and
is thrown away after any failure, leak or time-out, after 200 runs, or when it has grown by 300 MB; the
next run forks a new one. It never retries: a retry would hide the hang it is there to explain.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sixfold.base.errors import WorkerError
from sixfold.base.malloc import malloc_variables
from sixfold.testing import report, server, stacks, wire

DEFAULT_TIMEOUT_S = 60.0
PRELOAD = ("torch", "torch.distributed", "numpy", "sixfold.engine")
_START_LIMIT_S = 60.0
_CLOSE_LIMIT_S = 30.0
_GRACE_S = 1.0
"""How long the others may still report an error of their own once a rank has failed."""
_DUMP_LIMIT_S = 10.0
_MAX_RUNS = 200
_MAX_GROWTH_BYTES = 300 * 1000 * 1000


@dataclass
class Stats:
    """What a pool did: `growths` holds the largest growth of a rank in bytes per function name."""

    runs: int = 0
    crews: int = 0
    discarded: int = 0
    start_s: float = 0.0
    growths: dict[str, int] = field(default_factory=dict)


class Pool:
    """Runs functions on gloo ranks of this machine.

    A rank is a fork of a process that has torch imported already, with one compute thread and
    torch.distributed initialised for exactly the world that was asked for; torchrun's variables
    (RANK, WORLD_SIZE, LOCAL_RANK, ...) are set. One crew of processes per world size, because the
    default group of a process belongs to one world: so it is joined once and never rebuilt.

        with Pool() as pool:
            totals = pool.run(my_module.total, 3, ranks=2)

    Args:
        max_ranks: the largest world that may be asked for.
        preload: modules the server imports before it forks; those that are absent are left out.
        rewrite: explain failing asserts as pytest does (needs pytest).
    """

    def __init__(
        self, max_ranks: int = 4, *, preload: Iterable[str] = PRELOAD, rewrite: bool = False
    ) -> None:
        self.max_ranks = max_ranks
        self.stats = Stats()
        self.printed: list[str] = []
        """What each rank printed in the last run that passed."""
        self._preload = tuple(preload)
        self._rewrite = rewrite
        self._server: _Server | None = None
        self._crews: dict[int, _Crew] = {}

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        ranks: int,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        fresh: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Run `function(*args, **kwargs)` on ranks 0..ranks-1 and return what each returned, by rank.

        The function is sent by module and qualified name, arguments and results as pickles: keep
        them small. pytest.skip and pytest.xfail inside it act in the calling process. With `fresh`
        it gets new processes, which end with it: it may destroy the world, and leaks are not looked for.

        Raises:
            RankFailure: a rank raised, died, hung or left something behind.
            WorkerError: the function or an argument cannot be sent, or `ranks` is out of range.
        """
        return self.run_task(function, kwargs, args, ranks=ranks, timeout_s=timeout_s, fresh=fresh)

    def run_task(
        self,
        function: Callable[..., Any],
        kwargs: dict[str, Any],
        args: tuple[Any, ...] = (),
        *,
        ranks: int,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        fresh: bool = False,
    ) -> list[Any]:
        """`run` for arguments that may have the names of its own parameters."""
        self._check(ranks)
        task = _task(function, args, kwargs)
        if fresh:
            self.discard(ranks)
        crew = self._crew(ranks)
        try:
            kind, reason, values = crew.play(task, timeout_s, check=not fresh)
        except BaseException:
            self.discard(ranks)
            raise
        self.stats.runs += 1
        self.stats.growths[task.qualname] = max(crew.growth_bytes, self.stats.growths.get(task.qualname, 0))
        self.printed = [crew.log_of(rank) for rank in range(ranks)]
        if fresh or crew.is_worn:
            self.discard(ranks)
        if kind != "passed":
            import pytest  # only a body that imported it can skip

            (pytest.skip if kind == "skipped" else pytest.xfail)(reason)
        return values

    def discard(self, ranks: int) -> None:
        """Kill the crew of this world size, with everything it started; the next run makes a new one."""
        crew = self._crews.pop(ranks, None)
        if crew is not None and self._server is not None:
            self.stats.discarded += 1
            crew.drop(self._server)

    def pids(self) -> list[int]:
        """The processes of the pool: the server, then all ranks."""
        ranks = [pid for crew in self._crews.values() for pid in crew.pids]
        return [self._server.process.pid, *ranks] if self._server else []

    def close(self) -> None:
        """End every process and remove the pool's folder. A closed pool starts again when used."""
        server, self._server = self._server, None
        self._crews.clear()
        if server is not None:
            server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, ranks: int) -> None:
        if not 1 <= ranks <= self.max_ranks:
            wanted = max(ranks, 1)
            raise WorkerError(
                f"ranks = {ranks}, in a pool of at most {self.max_ranks}",
                rule=f"ranks is between 1 and {self.max_ranks}",
                fix=f"ask for ranks={min(wanted, self.max_ranks)}, or make Pool(max_ranks={wanted})",
            )

    def _crew(self, ranks: int) -> _Crew:
        if ranks not in self._crews:
            began = time.monotonic()
            if self._server is not None and self._server.process.poll() is not None:
                self.close()
            if self._server is None:
                self._server = _Server(self._preload, self._rewrite)
                self.stats.start_s = time.monotonic() - began
            self._crews[ranks] = crew = _Crew(ranks, self._server, self.stats.crews)
            self.stats.crews += 1
            try:
                crew.meet()
            except BaseException:
                self.discard(ranks)
                raise
        return self._crews[ranks]


class _Server:
    """The process that forks, seen from here."""

    def __init__(self, preload: tuple[str, ...], rewrite: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sixfold-ranks-"))
        ours, theirs = socket.socketpair()
        present = tuple(name for name in preload if _is_present(name))
        with theirs:
            command = server.command(theirs.fileno(), str(self.folder), present, rewrite, sys.path)
            # A session of its own: Ctrl-C reaches pytest alone, which then closes the connection.
            self.process = subprocess.Popen(
                [sys.executable, *command],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **malloc_variables(os.environ), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.control = Connection(ours.detach())
        num_threads = self._answer(_START_LIMIT_S)
        if num_threads != 1:
            self.close()
            raise WorkerError(
                f"the forking process has {num_threads} threads after importing {', '.join(present)}",
                rule="ranks are forked from one thread: a fork copies the locks of others, not their owners",
                fix="leave the module that starts a thread out of `preload` (in pytest: ranks_preload)",
            )

    def ask(self, verb: str, argument: Any, *, handle: int | None = None) -> Any:
        try:
            wire.send(self.control, (verb, argument))
            if handle is not None:
                with socket.socket(fileno=os.dup(self.control.fileno())) as channel:
                    socket.send_fds(channel, [b"."], [handle])
        except OSError:
            raise self._lost() from None
        return self._answer(_CLOSE_LIMIT_S)

    def close(self) -> None:
        self.control.close()
        try:
            self.process.wait(_CLOSE_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _answer(self, limit_s: float) -> Any:
        try:
            if self.control.poll(limit_s):
                return wire.receive(self.control)
        except (EOFError, OSError):
            pass
        raise self._lost()

    def _lost(self) -> WorkerError:
        self.process.kill()
        code = self.process.wait()
        return WorkerError(
            f"the process that forks ranks ended with exit code {code}",
            rule="it lives as long as the pool",
            fix="see its message above; a module in `preload` that ends the interpreter must be left out",
        )


class _Crew:
    """The ranks of one world."""

    def __init__(self, num_ranks: int, server: _Server, serial: int) -> None:
        self.num_ranks = num_ranks
        self.growth_bytes = 0
        self.pids: list[int] = []
        self._server = server
        self._folder = server.folder / f"crew-{serial}"
        self._folder.mkdir()
        self._connections: list[Connection] = []
        self._runs = 0
        self._first_bytes: list[int] = []
        self._last_bytes: list[int] = []
        for rank in range(num_ranks):
            self._start(rank)

    @property
    def is_worn(self) -> bool:
        pairs = zip(self._last_bytes, self._first_bytes, strict=True)
        grown = max((now - first for now, first in pairs), default=0)
        return self._runs >= _MAX_RUNS or grown > _MAX_GROWTH_BYTES

    def meet(self) -> None:
        """Wait until every rank has joined the world."""
        outcomes = self._collect(_START_LIMIT_S)
        if any(outcome.kind != "passed" for outcome in outcomes):
            raise report.failure("joining the world", outcomes, _START_LIMIT_S, self.log_of)

    def play(self, task: wire.Task, limit_s: float, *, check: bool) -> tuple[wire.Kind, str, list[Any]]:
        """One run: (how it ended on all ranks, why if skipped, values by rank).

        With `check`, every rank then looks for leaks, and all meet once more.
        """
        for connection in self._connections:
            with contextlib.suppress(OSError):  # a rank that died meanwhile is found when collecting
                wire.send(connection, task)
        outcomes = self._collect(limit_s)
        kinds = {outcome.kind for outcome in outcomes}
        if len(kinds) > 1 or kinds & {"failed", "died", "stuck"}:
            raise report.failure(task.qualname, outcomes, limit_s, self.log_of)
        if check:
            self._close(task)
        values = [pickle.loads(outcome.value) if outcome.value else None for outcome in outcomes]
        return outcomes[0].kind, outcomes[0].summary, values

    def drop(self, server: _Server) -> None:
        for connection in self._connections:
            connection.close()
        with contextlib.suppress(WorkerError):  # a lost server took its ranks along
            server.ask("kill", self.pids)
        shutil.rmtree(self._folder, ignore_errors=True)

    def log_of(self, rank: int) -> str:
        path = self._folder / f"rank-{rank}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _start(self, rank: int) -> None:
        spec = wire.RankSpec(
            rank=rank,
            world_size=self.num_ranks,
            store=str(self._folder / "store"),
            log=str(self._folder / f"rank-{rank}.log"),
            stacks=str(self._folder / f"rank-{rank}.stacks"),
        )
        ours, theirs = socket.socketpair()
        with theirs:
            self.pids.append(self._server.ask("start", spec, handle=theirs.fileno()))
        self._connections.append(Connection(ours.detach()))

    def _collect(self, limit_s: float) -> list[wire.Outcome]:
        """One outcome per rank: those that arrive in time, and a verdict on the others."""
        found: dict[int, wire.Outcome] = {}
        deadline = time.monotonic() + limit_s
        while len(found) < self.num_ranks:
            ready = self._ready(set(range(self.num_ranks)) - found.keys(), deadline)
            if not ready:
                break
            for rank in ready:
                found[rank] = self._outcome(rank)
                if found[rank].kind in ("failed", "died"):
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        found.update(self._stuck(set(range(self.num_ranks)) - found.keys()))
        return [found[rank] for rank in range(self.num_ranks)]

    def _ready(self, ranks: set[int], deadline: float) -> list[int]:
        ready = wait([self._connections[rank] for rank in ranks], max(0.0, deadline - time.monotonic()))
        return [rank for rank in ranks if self._connections[rank] in ready]

    def _outcome(self, rank: int) -> wire.Outcome:
        try:
            outcome = wire.receive(self._connections[rank])
        except (EOFError, OSError):
            how = self._server.ask("ended", self.pids[rank]) or "a closed connection"
            return wire.Outcome(rank, "died", time.monotonic(), summary=how)
        assert isinstance(outcome, wire.Outcome), f"rank {rank} sent {type(outcome).__name__} for an outcome"
        return outcome

    def _stuck(self, ranks: set[int]) -> dict[int, wire.Outcome]:
        """Have each rank dump its stacks; the signal handler runs even inside a blocked collective."""
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], signal.SIGUSR1)
        deadline = time.monotonic() + _DUMP_LIMIT_S
        dumps = dict.fromkeys(ranks, "")
        while time.monotonic() < deadline and not all(map(stacks.is_complete, dumps.values())):
            time.sleep(0.01)
            dumps = {rank: (self._folder / f"rank-{rank}.stacks").read_text() for rank in ranks}
        now = time.monotonic()
        return {rank: wire.Outcome(rank, "stuck", now, trace=dump) for rank, dump in dumps.items()}

    def _close(self, task: wire.Task) -> None:
        """Let every rank check itself; one that finds a leak says so instead of joining the last barrier."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                wire.send(connection, "close")
        found = self._collect(_CLOSE_LIMIT_S)
        name = task.qualname
        closings = [outcome.closing for outcome in found if outcome.closing is not None]
        if any(closing.leaks for closing in closings):
            raise report.leak(name, found)
        if any(outcome.kind != "passed" for outcome in found):
            raise report.failure(
                f"the barrier after {name}, whose ranks issued different collectives,",
                found,
                _CLOSE_LIMIT_S,
                self.log_of,
            )
        self._weigh([closing.resident_bytes for closing in closings])

    def _weigh(self, resident: list[int]) -> None:
        last = self._last_bytes or resident
        self.growth_bytes = max(now - before for now, before in zip(resident, last, strict=True))
        self._first_bytes = self._first_bytes or resident
        self._last_bytes = resident
        self._runs += 1


def _task(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> wire.Task:
    qualname = getattr(function, "__qualname__", repr(function))
    file = inspect.getsourcefile(inspect.unwrap(function)) if hasattr(function, "__code__") else None
    if file is None or "<" in qualname:
        raise WorkerError(
            f"{qualname} cannot be found by its name",
            rule="ranks import the function: it is a plain function or method at the top of a module",
            fix="move it to the top of its file and pass what it closed over as arguments",
        )
    return wire.Task(
        module=function.__module__,
        file=os.path.realpath(file),
        qualname=qualname,
        arguments=_packed(qualname, args, kwargs),
        sys_path=tuple(sys.path),
        folder=os.getcwd(),
    )


def _packed(qualname: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    for name, value in [*enumerate(args), *kwargs.items()]:
        try:
            pickle.dumps(value)
        except Exception as error:
            raise WorkerError(
                f"argument {name} of {qualname} is a {type(value).__name__}, which does not pickle: {error}",
                rule="arguments and values of fixtures travel to the ranks as pickles",
                fix="pass plain values, paths or tensors, and make the object inside the function",
            ) from None
    return pickle.dumps((args, kwargs))


def _is_present(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
