"""The warm process that ranks are forked from: one thread, torch and Sixfold already imported.

Started by pool.py with one end of a connection; it forks ranks, says how they ended, kills them.
It is an own small server, not multiprocessing's, because it must outlive no one: when the connection
closes (pytest ended, or was killed) it kills every rank with its process group and exits.
It never runs a test and never talks to a rank.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import shutil
import signal
import socket
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

from sixfold.testing import wire, worker

_EXIT_WAIT_S = 2.0


def main(control_fd: int, folder: str, preload: tuple[str, ...], rewrite: bool) -> None:
    """Import `preload`, then serve until the connection closes; the pool's `folder` goes last.

    With `rewrite`, serving happens inside pytest's command hook, the public way to have its import hook
    in place: asserts of test modules then explain themselves on ranks too.
    """
    control = Connection(control_fd)
    for name in preload:
        # A module that does not import is reported by the test that needs it, with its traceback.
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is here now stays shared with every rank, and collections in ranks stay short
    if rewrite:
        _serve_under_pytest(control)
    else:
        _serve(control)
    shutil.rmtree(folder, ignore_errors=True)


def _serve_under_pytest(control: Connection) -> None:
    # A pool outside of tests works without pytest.
    import pytest

    class Serving:
        @pytest.hookimpl(tryfirst=True)
        def pytest_cmdline_main(self) -> int:
            _serve(control)
            return 0

    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    options = [
        "--capture=no",
        "--noconftest",
        "-c",
        os.devnull,
        "-p",
        "no:cacheprovider",
        "-p",
        "no:faulthandler",
    ]
    pytest.main(options, plugins=[Serving()])


def _serve(control: Connection) -> None:
    os.environ.pop("PYTEST_DISABLE_PLUGIN_AUTOLOAD", None)
    wire.send(control, num_threads())
    ranks: set[int] = set()
    while True:
        try:
            verb, argument = wire.receive(control)
        except (EOFError, OSError):
            _kill(ranks)
            return
        if verb == "start":
            _, handles, _, _ = socket.recv_fds(socket.socket(fileno=os.dup(control.fileno())), 1, 1)
            pid = os.fork()
            if pid == 0:
                control.close()
                _become_rank(handles[0], argument)
            os.close(handles[0])
            ranks.add(pid)
            wire.send(control, pid)
        elif verb == "ended":
            wire.send(control, _how_it_ended(argument, ranks))
        else:
            _kill(set(argument) & ranks)
            ranks -= set(argument)
            wire.send(control, None)


def _become_rank(handle: int, spec: wire.RankSpec) -> NoReturn:
    try:
        worker.live(Connection(handle), spec)
    finally:
        os._exit(1)


def _how_it_ended(pid: int, ranks: set[int]) -> str:
    """`SIGKILL`, `exit code 3`, or empty while it lives."""
    deadline = time.monotonic() + _EXIT_WAIT_S
    while pid in ranks and time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # children it left; the group outlives its leader
            ranks.discard(pid)
            code = os.waitstatus_to_exitcode(status)
            return signal.Signals(-code).name if code < 0 else f"exit code {code}"
        time.sleep(0.005)
    return ""


def _kill(pids: set[int]) -> None:
    """Kill ranks with everything they started, and wait until they are gone."""
    for pid in pids:
        # The group does not exist until the rank has made it, right after the fork.
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(pid, signal.SIGKILL)
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def num_threads() -> int:
    """Threads of this process, native ones included where the system tells."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else threading.active_count()


def command(
    control_fd: int, folder: str, preload: tuple[str, ...], rewrite: bool, sys_path: list[str]
) -> list[str]:
    """Arguments for the interpreter that becomes the server, importing from where its starter does."""
    arguments = (control_fd, folder, preload, rewrite)
    imports = f"import sys; sys.path[:] = {sys_path!r}; from sixfold.testing.server import main"
    return ["-c", f"{imports}; main(*{arguments!r})"]
