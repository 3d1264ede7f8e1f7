"""The ranks of one launch on this machine: how they are started, polled, stopped and judged.

The supervisor makes a `Job` and hands it to the elastic agent, which asks it to start ranks and to say
how they are doing. What a rank's environment and streams are, what a signal means, how long to wait,
which failure is the cause, and the exit code are decided here. It knows nothing of models or training.

Note "Time limits". A launch ends by itself in bounded time, except while a rank saves:
 - after a failure the other ranks have FAILURE_GRACE_S to record theirs, then all are killed;
 - after a first Ctrl-C, SIGTERM or SIGHUP every rank is asked once to save and stop, and has all the
   time it needs as long as some rank saves or announces steps; STALL_S without either ends the wait;
 - once all ranks say that they are saved, or one of them was stopped by the signal, LINGER_S remain;
 - a second Ctrl-C kills everything at once.

Note "Environment". A rank sees the launcher's environment unchanged, plus: the variables of torch
elastic (RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, GROUP_RANK, GROUP_WORLD_SIZE, ROLE_NAME,
ROLE_RANK, ROLE_WORLD_SIZE, MASTER_ADDR, MASTER_PORT, TORCHELASTIC_RUN_ID, TORCHELASTIC_RESTART_COUNT,
TORCHELASTIC_MAX_RESTARTS, TORCHELASTIC_USE_AGENT_STORE), OMP_NUM_THREADS where `threads` is given,
SIXFOLD_SCRATCH, what the caller passes as `environ`, and a setting of glibc (`base/malloc.py`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sixfold.base.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_WORKER
from sixfold.base.malloc import malloc_variables
from sixfold.launch import guardian
from sixfold.launch.failure import Failure, causal, from_early_end, from_exit, render
from sixfold.launch.streams import Relay
from sixfold.launch.worker import SCRATCH, failure_path, read_progress

FAILURE_GRACE_S = 1.0
LINGER_S = 5.0
STALL_S = 60.0
_LOG_TAIL_LINES = 20
_STOPPED_CODES = (EXIT_INTERRUPTED, -signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGTERM)

State = Literal["running", "done", "failed"]


@dataclass
class StopRequests:
    """How often the launcher was asked to stop; counted by signal handlers, read by the job."""

    count: int = 0


@dataclass
class _Rank:
    """One started process."""

    rank: int
    process: subprocess.Popen[bytes]
    was_asked: bool = False
    was_killed: bool = False
    ended_at: float | None = None


@dataclass
class Job:
    """The ranks of one launch on this machine and all that is decided about them."""

    command: list[str]
    run_folder: Path
    scratch: Path
    environ: dict[str, str]
    threads: int | None
    asked: StopRequests
    world_size: int = 0
    _ranks: list[_Rank] = field(default_factory=list)
    _relay: Relay | None = None
    _guardian: subprocess.Popen[bytes] | None = None
    _cut_short: str = ""
    _failed_at: float | None = None
    _linger_from: float | None = None
    _progress: object = None
    _progress_at: float = 0.0

    def __post_init__(self) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        for stale in self.logs.glob("rank-*.failure.json"):
            stale.unlink()

    @property
    def logs(self) -> Path:
        """Folder of the ranks' logs."""
        return self.run_folder / "logs"

    @property
    def marker(self) -> str:
        """What only processes of this launch have in their environment."""
        return f"{SCRATCH}={self.scratch}"

    def start(self, rank: int, world_size: int, elastic: Mapping[str, str]) -> int:
        """Start one rank in a session of its own, so that a terminal's Ctrl-C reaches only the launcher.

        Args:
            rank: its number among all.
            world_size: number of all ranks.
            elastic: the variables by which it finds the others.

        Returns:
            Its process id.
        """
        self.world_size = world_size
        guard = self._guard()
        threads = {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}
        variables = {**os.environ, **threads, **self.environ, **elastic, SCRATCH: str(self.scratch)}
        variables |= malloc_variables(variables)
        with self._streams(rank) as (stdin, out, err):
            process = subprocess.Popen(
                self.command, env=variables, stdin=stdin, stdout=out, stderr=err, start_new_session=True
            )
        self._ranks.append(_Rank(rank, process))
        assert guard.stdin is not None, "the guardian is started with a pipe"
        with contextlib.suppress(BrokenPipeError):
            guard.stdin.write(f"{process.pid}\n".encode())
            guard.stdin.flush()
        return process.pid

    def poll(self) -> State:
        """Look at every rank, answer signals and time limits; "failed" means: end what is left."""
        now = time.monotonic()
        for one in self._ranks:
            if one.ended_at is None and one.process.poll() is not None:
                one.ended_at = time.time()
        if self._failed_at is None and self._has_failure():
            self._failed_at = now
        if all(one.ended_at is not None for one in self._ranks):
            return "done" if self._failed_at is None else "failed"
        if self.asked.count and self._failed_at is None:
            self._ask_to_stop(now)
        return "failed" if self._is_time_to_end(now) else "running"

    def kill(self) -> None:
        """End every process of this launch now."""
        for one in self._ranks:
            one.was_killed = one.was_killed or one.process.poll() is None
        guardian.sweep(self.marker, {one.process.pid for one in self._ranks})
        for one in self._ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.process.wait(timeout=1.0)

    def end(self) -> None:
        """Nothing of this launch is left after it, nor unread; harmless when repeated."""
        self.kill()
        if self._relay is not None:
            self._relay.close()
        if self._guardian is not None:
            with contextlib.suppress(BrokenPipeError):
                self._guardian.communicate(b"done\n")
            self._guardian = None

    def verdict(self) -> int:
        """Say how it ended, on stderr, if there is something to say; returns the exit code."""
        failures = self._failures()
        if failures:
            cause = causal(failures)
            others = [failure for failure in failures if failure is not cause]
            log = self._log(cause.rank)
            self._say(render(cause, world_size=self.world_size, others=others, log=log))
            return cause.exit_code
        if self._is_saved():
            return EXIT_INTERRUPTED
        if self._cut_short:
            self._say(f"sixfold: ended before the ranks had saved, because {self._cut_short}\n")
            return EXIT_WORKER
        return EXIT_INTERRUPTED if any(one.process.returncode for one in self._ranks) else EXIT_DONE

    # Starting.

    def _guard(self) -> subprocess.Popen[bytes]:
        """The guardian, started before the first rank."""
        if self._guardian is None:
            # An outer launch finds its processes by this variable: its guardian must not be among them
            # when this whole launch runs inside a rank and that rank is swept away.
            variables = {name: value for name, value in os.environ.items() if name != SCRATCH}
            self._guardian = subprocess.Popen(
                [sys.executable, "-I", "-S", guardian.__file__, self.marker, str(self.scratch)],
                env=variables,
                cwd="/",
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self._guardian

    @contextlib.contextmanager
    def _streams(self, rank: int) -> Iterator[tuple[int | None, int, int]]:
        """Standard input, output and error of a rank: rank 0 keeps the terminal, others have a log."""
        if rank == 0:
            self._relay = Relay(self._log(0))
            try:
                yield None, self._relay.child_out, self._relay.child_err
            finally:
                self._relay.start()
        else:
            with open(self._log(rank), "ab", buffering=0) as log:
                yield subprocess.DEVNULL, log.fileno(), log.fileno()

    def _log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    # Polling.

    def _has_failure(self) -> bool:
        return any(
            (one.ended_at is not None and self._is_failed_exit(one))
            or failure_path(self.scratch, one.rank).exists()
            for one in self._ranks
        )

    def _is_failed_exit(self, one: _Rank) -> bool:
        code = one.process.returncode
        return code != 0 and not one.was_killed and not (self.asked.count and code in _STOPPED_CODES)

    def _ask_to_stop(self, now: float) -> None:
        """Pass the stop request on to every rank once: to the rank itself, not to its loader workers."""
        if not any(one.was_asked for one in self._ranks):
            self._progress_at = now
            self._say("sixfold: asked the ranks to save and stop; Ctrl-C again ends at once\n")
        for one in self._ranks:
            if not one.was_asked and one.ended_at is None:
                one.was_asked = True
                one.process.send_signal(signal.SIGTERM)

    def _is_time_to_end(self, now: float) -> bool:
        """Whether to kill what is left; sets `_cut_short` when that costs work."""
        if self._failed_at is not None:
            return self.asked.count > 1 or now - self._failed_at > FAILURE_GRACE_S
        if not self.asked.count:
            return False
        progress = [read_progress(self.scratch, one.rank) for one in self._ranks]
        if progress != self._progress or any(phase == "saving" for phase, _ in progress):
            self._progress, self._progress_at = progress, now
        if self.asked.count > 1:
            self._cut_short = "a second signal came"
        elif now - self._progress_at > STALL_S:
            self._cut_short = f"no rank saved or made a step for {STALL_S:.0f} s"
        if self._linger_from is None and self._has_nothing_left():
            self._linger_from = now
        return bool(self._cut_short) or (self._linger_from is not None and now - self._linger_from > LINGER_S)

    def _is_saved(self) -> bool:
        """Whether every rank has said so, or ended well without a need to."""
        phases = [read_progress(self.scratch, one.rank)[0] for one in self._ranks]
        ended_well = [one.process.returncode == 0 for one in self._ranks]
        return "interrupted" in phases and all(
            phase == "interrupted" or ended for phase, ended in zip(phases, ended_well, strict=True)
        )

    def _has_nothing_left(self) -> bool:
        """Whether the ranks that still live have nothing to do any more, or nobody to do it with."""
        is_stopped = any(one.ended_at is not None and one.process.returncode for one in self._ranks)
        return is_stopped or self._is_saved()

    # Telling.

    def _failures(self) -> list[Failure]:
        """What every failed rank has recorded, or what its silent end tells."""
        failures = []
        for one in self._ranks:
            record = failure_path(self.scratch, one.rank)
            if record.exists():
                failures.append(Failure.read(record))
                self._keep(failures[-1])
            elif one.ended_at is not None and self._is_failed_exit(one):
                _, step = read_progress(self.scratch, one.rank)
                code, tail = one.process.returncode, self._log_tail(one.rank)
                failures.append(from_exit(code, rank=one.rank, step=step, when=one.ended_at, log_tail=tail))
                self._keep(failures[-1])
        if failures and all(failure.victim for failure in failures):
            failures += self._early_ends()
        return failures

    def _early_ends(self) -> list[Failure]:
        """Ranks that left in peace, where all that is known otherwise is that connections broke."""
        return [
            from_early_end(
                rank=one.rank,
                step=read_progress(self.scratch, one.rank)[1],
                when=one.ended_at,
                log_tail=self._log_tail(one.rank),
            )
            for one in self._ranks
            if one.ended_at is not None and one.process.returncode == 0
        ]

    def _keep(self, failure: Failure) -> None:
        with contextlib.suppress(OSError):  # the failure may be that this disk is full
            failure.write(self.logs / f"rank-{failure.rank}.failure.json")
            if failure.kind:
                with open(self._log(failure.rank), "a", encoding="utf-8") as log:
                    log.write(failure.details)

    def _log_tail(self, rank: int) -> str:
        with contextlib.suppress(OSError), open(self._log(rank), "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 16_384))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-_LOG_TAIL_LINES:])
        return ""

    def _say(self, text: str) -> None:
        """Write on stderr, below a live line that rank 0 may have left."""
        is_inside_line = self._relay is not None and self._relay.is_inside_line
        sys.stderr.write("\n" + text if is_inside_line else text)
        sys.stderr.flush()
