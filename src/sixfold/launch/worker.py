"""What a rank does for its own supervision: answer stop requests, say how far it is, record its failure.

The training worker and the script runner open `worker_session` around everything they do; loops read
`current_session()`. It works the same under this library's launcher, torchrun, Slurm and Kubernetes,
and stands idle in a plain process. It never decides what to save and never talks to other ranks.

Files: a session tells its supervisor things through two small files in the launcher's scratch folder,
`rank-N.progress` (phase and step, 40 bytes overwritten in place) and `rank-N.failure.json`. They are
not in the run folder, because the failure to tell may be that the run folder's disk is full.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from sixfold.base.errors import EXIT_INTERRUPTED, EXIT_WORKER
from sixfold.launch.environment import Placement, discover
from sixfold.launch.failure import Failure, from_exception, render, told_elsewhere

SCRATCH = "SIXFOLD_SCRATCH"
"""Set by the launcher for its ranks: the folder through which they report to it."""

UNANSWERED_S = 5.0
"""A stop request to a program that never reads `stop_requested` becomes KeyboardInterrupt after this."""

HANG_LINGER_S = 2.0
"""How long the rank that tells a hang outlives its message, so that no other says something before it."""

_POLL_S = 0.25
_PROGRESS_BYTES = 40


class Session:
    """One rank's view of its supervision.

    Args:
        placement: which rank this is; None for a process of its own.
        scratch: folder of a supervising launcher; None without one.
    """

    def __init__(self, placement: Placement | None = None, scratch: Path | None = None) -> None:
        self.rank = 0 if placement is None else placement.rank
        self.world_size = 1 if placement is None else placement.world_size
        self.supervised = scratch is not None
        self.at_failure: list[Callable[[str], None]] = []
        """Called with the failure's headline before it ends the process."""
        self._scratch = scratch
        self._pid = os.getpid()
        self._step: int | None = None
        self._phase = "running"
        self._stop_at: float | None = None
        self._is_read = False
        self._gave_up = False
        self._over = threading.Event()
        self._previous: dict[int, object] = {}
        self._progress = None if scratch is None else _open_progress(scratch, self.rank)
        self._announce()

    @property
    def stop_requested(self) -> bool:
        """Whether this rank was asked to save and stop. Ranks learn it at different steps: agree first."""
        self._is_read = True
        return self._stop_at is not None

    @property
    def step(self) -> int | None:
        """The update being worked on. Set it in every step: failures and the launcher's patience use it."""
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        self._step = value
        self._announce()

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Around a save: while it lasts the launcher waits however long nothing else happens."""
        before, self._phase = self._phase, "saving"
        self._announce()
        try:
            yield
        finally:
            self._phase = before
            self._announce()

    def interrupted(self) -> None:
        """Say that the run stops early and everything is saved: the launch will end with code 130."""
        self._phase = "interrupted"
        self._announce()

    @property
    def scratch(self) -> Path | None:
        """The folder of a supervising launcher, which goes with it; None without one."""
        return self._scratch

    def end_hang(self, found: Failure | None) -> NoReturn:
        """End this process because the ranks wait for each other for ever; may be called on any thread.

        Args:
            found: what to tell, on the one rank that tells it.
        """
        if found is not None:
            self._tell(found)
        if found is not None or self.supervised:  # the launcher hears it first, and ends the others
            time.sleep(HANG_LINGER_S)
        if found is None and self.supervised:  # that launcher must be one of another machine
            self._tell(told_elsewhere(rank=self.rank, step=self._step))
        self._leave(EXIT_WORKER)

    def _announce(self) -> None:
        if self._progress is not None:
            text = f"{self._phase} {'-' if self._step is None else self._step}"
            with contextlib.suppress(OSError):  # a full scratch disk is no reason to stop training
                os.pwrite(self._progress, text.ljust(_PROGRESS_BYTES).encode(), 0)

    # Signals, and the thread that looks after them.

    def _listen(self) -> None:
        with contextlib.suppress(AttributeError, ValueError, OSError):
            faulthandler.enable()  # a crash in native code then leaves its stack in the log
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, ValueError):
                stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        threading.Thread(target=self._poll, name="sixfold-session", daemon=True).start()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # A forked child (a loader worker) inherits this handler but not the session.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self._gave_up:
            raise KeyboardInterrupt
        elif self._stop_at is None:
            self._stop_at = time.monotonic()
        elif number == signal.SIGINT:
            self._leave(EXIT_INTERRUPTED)

    def _poll(self) -> None:
        parent = os.getppid()
        # The library's own launcher has a guardian; a foreign elastic agent leaves orphans behind.
        may_be_orphaned = not self.supervised and "TORCHELASTIC_RUN_ID" in os.environ
        while not self._over.wait(_POLL_S):
            if may_be_orphaned and os.getppid() != parent:
                _end_own_group()
            asked = self._stop_at
            if asked is not None and not self._is_read and time.monotonic() - asked > UNANSWERED_S:
                self._gave_up = True
                os.kill(self._pid, signal.SIGINT)
                return

    def _close(self) -> None:
        self._over.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._progress is not None:
            os.close(self._progress)
            self._progress = None

    # The end of a rank.

    def _end_with(self, error: BaseException) -> NoReturn:
        """Record what ended this rank and leave; a stop that was asked for is no failure."""
        if isinstance(error, KeyboardInterrupt) and self._stop_at is not None:
            self._leave(EXIT_INTERRUPTED)
        failure = from_exception(error, rank=self.rank, step=self._step)
        self._tell(failure)
        for leave_word in self.at_failure:
            with contextlib.suppress(Exception):
                leave_word(
                    f"ended with {failure.headline}" + (f", at {failure.where}" if failure.where else "")
                )
        self._leave(failure.exit_code)

    def _tell(self, failure: Failure) -> None:
        try:
            if self._scratch is None:
                _print_alone(failure, self.world_size)
            else:
                failure.write(failure_path(self._scratch, self.rank))  # the launcher tells it, once
        except OSError:
            sys.stderr.write(failure.details)  # better in the log than nowhere

    def _leave(self, code: int) -> NoReturn:
        # Not sys.exit: tearing down a process group whose peers are gone can hang for minutes.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        if "multiprocessing" in sys.modules:
            for child in sys.modules["multiprocessing"].active_children():
                child.kill()
        os._exit(code)


_current = Session()


def current_session() -> Session:
    """The session of this rank; outside of one an idle session, in which nobody ever asks to stop."""
    return _current


@contextlib.contextmanager
def worker_session() -> Iterator[Session]:
    """Run the body as a rank.

    SIGINT and SIGTERM only set `stop_requested`; a second SIGINT ends the process at once. An exception
    (a non-zero SystemExit too) is recorded for the launcher, or printed where there is none, and ends
    the process with the exit code of its class. Inside another session it yields that one.
    """
    global _current
    if _current.supervised or _current._previous:
        yield _current
        return
    idle = _current
    session = Session()
    try:
        scratch = os.environ.get(SCRATCH)
        session = _current = Session(discover(os.environ), Path(scratch) if scratch else None)
        session._listen()
        yield session
    except BaseException as error:
        if os.getpid() != session._pid:
            raise  # a forked child is not this rank
        if not (isinstance(error, SystemExit) and error.code in (None, 0)):
            session._end_with(error)
        if session.supervised or session._phase != "interrupted":
            raise
    finally:
        session._close()
        _current = idle
    if session._phase == "interrupted" and not session.supervised:
        raise SystemExit(EXIT_INTERRUPTED)


def failure_path(scratch: Path, rank: int) -> Path:
    """Where a rank records its failure."""
    return scratch / f"rank-{rank}.failure.json"


def read_progress(scratch: Path, rank: int) -> tuple[str, int | None]:
    """Phase and step of a rank; ("starting", None) before its session opens."""
    try:
        phase, step = (scratch / f"rank-{rank}.progress").read_text().split()
    except (OSError, ValueError):
        return "starting", None
    return phase, None if step == "-" else int(step)


def _open_progress(scratch: Path, rank: int) -> int:
    return os.open(scratch / f"rank-{rank}.progress", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _end_own_group() -> NoReturn:
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(EXIT_WORKER)


def _print_alone(failure: Failure, world_size: int) -> None:
    """Without a launcher of ours every failed rank tells its own failure, a victim in one line."""
    if failure.victim:
        text = f"sixfold: rank {failure.rank} lost its connection to another rank: {failure.headline}\n"
    else:
        text = render(failure, world_size=world_size)
    sys.stderr.write(text)
