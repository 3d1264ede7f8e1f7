"""A Python that has loaded torch already: `python -m tests.fresh.warm FOLDER` makes FOLDER/python.

Called with `-m module`, `-c code` or a script, it has a process forked which runs that, with the caller's
arguments, environment, folder and open files; it passes polite signals on and ends as that process does. What
this starts by `sys.executable` is forked too. For tests of what commands do, which otherwise pay seconds for
imports in every process; how processes find, stop and outlive one another is tested with new interpreters.

Note "What others see of a fork". As a process's environment /proc shows the part of its memory where its
first program found it. The server is started with a variable as large as an environment, `ROOM`, and each
fork writes that of its caller there: so guardians, and tests that look for what is left, find forks too.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any

PRELOAD = (
    "sixfold.testing.warm",
    "sixfold.engine",
    "sixfold.checkpoint",
    "sixfold.cli.app",
    "sixfold.data.corpus",
    "sixfold.launch.agent",
    "sixfold.monitor.report.page",
    "sixfold.testing",
    "sixfold.train.job",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor.parallel",
)
ANSWER_BYTES, MOST_FILES = 16, 250
ROOM, ROOM_BYTES = "SIXFOLD_TEST_ROOM", 100_000
ENVIRONMENT_FIELD = 47
"""Of what /proc/PID/stat tells after the name: where the environment starts; field 50 of proc(5), from 1."""
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# The command: standard library only, as it is started with nothing else.


def call(address: str, arguments: list[str]) -> int:
    """Have `arguments` run by a fork of the process at `address`; how that ended, as subprocess tells it."""
    if arguments[:1] == ["-u"]:
        del arguments[0]
    if arguments[0].startswith("-") and arguments[0] not in ("-m", "-c"):
        os.execv(sys.executable, [sys.executable, *arguments])
    listed = [int(name) for name in os.listdir("/proc/self/fd")]
    files = [number for number in listed if os.path.exists(f"/proc/self/fd/{number}")]  # without the listing
    request = json.dumps([files, arguments, dict(os.environ), os.getcwd()]).encode()
    with socket.socket(socket.AF_UNIX) as channel:
        channel.connect(address)
        socket.send_fds(channel, [len(request).to_bytes(8)], files)
        channel.sendall(request)
        for number in PASSED_ON:
            signal.signal(number, lambda number, _: channel.sendall(bytes([number])))
        return int(channel.recv(ANSWER_BYTES) or 1)


# The process that forks.


def serve(folder: Path) -> None:
    """Answer calls until standard input ends."""
    for name in PRELOAD:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    program, address = folder / "python", folder / "socket"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{__file__}" "{address}" "$@"\n')
    program.chmod(0o700)
    sys.executable = str(program)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen(64)
        print("ready", flush=True)
        while sys.stdin not in (ready := select.select([listener, sys.stdin], [], [])[0]):
            assert ready, "waits without a limit"
            channel, _ = listener.accept()
            if not os.fork():
                listener.close()
                _mind(channel)
                return
            channel.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def _mind(channel: socket.socket) -> None:
    """Fork once more, watch the process and its caller, and tell the one of the other's end."""
    size, handles, _, _ = socket.recv_fds(channel, 8, MOST_FILES)
    with channel.makefile("rb") as stream:
        request = json.loads(stream.read(int.from_bytes(size)))
    pid = os.fork()
    if not pid:
        channel.close()
        _become(handles, *request)
        return
    for handle in (*handles, 0, 1, 2):
        os.close(handle)
    ended = os.pidfd_open(pid)
    while ended not in select.select([channel, ended], [], [])[0]:
        if asked := channel.recv(1):
            os.kill(pid, asked[0])
        else:  # its caller was killed
            for kill in (os.killpg, os.kill):  # the group exists only once the process has made it
                with contextlib.suppress(ProcessLookupError):
                    kill(pid, signal.SIGKILL)
            break
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        channel.sendall(str(code).encode())
    os._exit(0)


def _become(
    handles: list[int], files: list[int], arguments: list[str], environment: dict[str, str], folder: str
) -> None:
    """Be the interpreter that was called; the caller's `files` are `handles` here."""
    os.setsid()
    above = [fcntl.fcntl(handle, fcntl.F_DUPFD, max(files) + 1) for handle in handles]
    for handle in handles:
        os.close(handle)
    for number, handle in zip(files, above, strict=True):
        os.dup2(handle, number)
        os.close(handle)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    _show(environment)
    if threads := environment.get("OMP_NUM_THREADS"):  # which OpenMP reads only when it is loaded
        importlib.import_module("torch").set_num_threads(int(threads))
    random.seed()
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    kind, *rest = arguments
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    first = os.path.dirname(os.path.realpath(kind)) if not kind.startswith("-") else folder
    sys.path[:0] = [first, *paths]
    sys.argv = [kind, *rest]
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        namespace: dict[str, Any] = {"__name__": "__main__"}
        exec(rest[0], namespace)
    else:
        runpy.run_path(kind, run_name="__main__")


def _show(environment: dict[str, str]) -> None:
    """Have /proc show `environment` as this process's."""
    shown = Path("/proc/self/environ").read_bytes()
    start = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[ENVIRONMENT_FIELD])
    text = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in environment.items())
    assert len(text) <= ROOM_BYTES, "the caller has more environment than there is room for"
    address = start + shown.index(f"{ROOM}=".encode())
    ctypes.memmove(address, text.ljust(ROOM_BYTES, b"\0"), ROOM_BYTES)


if __name__ == "__main__":
    if Path(sys.argv[1]).is_dir():
        serve(Path(sys.argv[1]))
    else:
        code = call(sys.argv[1], sys.argv[2:])
        if code < 0:
            if -code in PASSED_ON:
                signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        sys.exit(code)
