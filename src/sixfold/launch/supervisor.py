"""Starts the ranks of one launch on this machine and waits for their end.

The command line calls `launch`. Torch elastic brings the ranks together and numbers them (agent.py);
a `Job` decides everything about them (job.py). This file checks what is asked, makes the scratch folder
and counts signals.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sixfold.base.errors import EXIT_INTERRUPTED, ConfigError
from sixfold.launch.environment import NodePlacement
from sixfold.launch.job import Job, StopRequests


def launch(
    command: Sequence[str],
    *,
    ranks: int,
    run_folder: Path,
    environ: Mapping[str, str] | None = None,
    threads: int | None = None,
    node: NodePlacement | None = None,
) -> int:
    """Run `command` as `ranks` processes and wait for their end.

    Args:
        command: program and arguments, the same for every rank.
        ranks: processes on this machine.
        run_folder: gets `logs/rank-N.log` (appended to) and, after a failure, `logs/rank-N.failure.json`.
        environ: variables to add for the ranks.
        threads: compute threads per rank, as OMP_NUM_THREADS; None leaves the variable alone.
        node: this machine's place when several run the same launch; None for this machine alone.

    Returns:
        The exit code: 0 done, 130 interrupted and stopped in order, the `exit_code` of a SixfoldError
        that was the cause, 4 for every other failure. The message is on stderr by then.

    Raises:
        ConfigError: the command cannot be started, `ranks` is not positive, or node 0 has no address.
    """
    _check(command, ranks, node)
    with _scratch_folder() as scratch, _signals_counted() as asked:
        job = Job(list(command), run_folder, scratch, dict(environ or {}), threads, asked)
        # Torch is loaded here and no earlier: command line help and config checks import this file.
        from sixfold.launch.agent import run_agent

        if asked.count:
            return EXIT_INTERRUPTED  # nothing had been started
        try:
            run_agent(job, ranks=ranks, node=node, log=job.logs / "agent.log")
        finally:
            job.end()
        return job.verdict()


def _check(command: Sequence[str], ranks: int, node: NodePlacement | None) -> None:
    if ranks < 1:
        raise ConfigError(f"{ranks} ranks", rule="a launch has at least one rank", fix="set launch.ranks = 1")
    if not command or shutil.which(command[0]) is None:
        raise ConfigError(
            f"the command {' '.join(command)!r} cannot be started",
            rule="a command begins with a program that exists and may be executed",
            fix=f"begin it with {sys.executable}",
        )
    if node is not None:
        try:
            socket.getaddrinfo(node.master_addr, node.master_port)
        except OSError as error:
            raise ConfigError(
                f"no address for node 0, {node.master_addr!r}: {error.strerror}",
                rule="every node must be able to look up and reach node 0",
                fix="set the master address to a name or number that resolves here",
            ) from None


@contextlib.contextmanager
def _scratch_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="sixfold-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _signals_counted() -> Iterator[StopRequests]:
    """Count stop signals instead of dying of them. Python delivers signals to the main thread only."""
    asked = StopRequests()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def count(_number: int, _frame: object) -> None:
        asked.count += 1

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under nohup it stays ignored
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, count) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
