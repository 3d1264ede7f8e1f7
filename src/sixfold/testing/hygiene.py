"""Look at what a test could leave behind in a process, say what it left, and put back what can be.

Used on every rank of the pool after a test that passed, and by the pytest plugin around tests that run
in pytest's own process. It imports no torch by itself: where torch is not loaded, nothing of it leaked.
"""

from __future__ import annotations

import gc
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_JOIN_S = 0.5
_QUIET_VARIABLES = ("PYTEST_", "KMP_", "TORCHINDUCTOR_", "TRITON_", "PYTORCH_NVML_BASED_CUDA_CHECK")
"""Set by pytest itself, or once and for good by libraries on first use; accelerate puts the last one back,
unless two threads ask it for GPUs at the same time."""
_QUIET_THREADS = ("TMonitor",)
"""The progress-bar monitor that tqdm starts once per process."""

# What torch keeps per process: how to read it and how to put it back.
_TORCH_MODES: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    "default dtype": (lambda t: t.get_default_dtype(), lambda t, was: t.set_default_dtype(was)),
    "grad mode": (lambda t: t.is_grad_enabled(), lambda t, was: t.set_grad_enabled(was)),
    "compute threads": (lambda t: t.get_num_threads(), lambda t, was: t.set_num_threads(was)),
    "deterministic mode": (
        lambda t: t.are_deterministic_algorithms_enabled(),
        lambda t, was: t.use_deterministic_algorithms(was),
    ),
    "matmul precision": (
        lambda t: t.get_float32_matmul_precision(),
        lambda t, was: t.set_float32_matmul_precision(was),
    ),
    "default device": (lambda t: t.get_default_device(), lambda t, was: t.set_default_device(None)),
}


@dataclass(frozen=True)
class Snapshot:
    """The process before a test; `files` maps open descriptors (regular files and sockets) to names."""

    environment: dict[str, str]
    folder: str
    threads: tuple[threading.Thread, ...]
    modes: dict[str, Any]
    num_groups: int
    files: dict[int, str]
    has_children: bool


def take(*, files: bool = True) -> Snapshot:
    """Look now. Without `files`, descriptors and children are left out (cheaper; pytest owns some)."""
    return Snapshot(
        environment=_environment(),
        folder=os.getcwd(),
        threads=tuple(threading.enumerate()),
        modes=_modes(),
        num_groups=_num_groups(),
        files=_open_files() if files else {},
        has_children=not files or _has_children(),
    )


def leaks_since(before: Snapshot) -> list[str]:
    """One phrase per thing that a test left; empty when clean."""
    found = [
        *_variable_leaks(before.environment, _environment()),
        *_thread_leaks(before.threads),
        *(f"{name} {was} -> {now}" for name, was, now in _changed(before.modes, _modes())),
    ]
    if os.getcwd() != before.folder:
        found.append(f"current folder -> {os.getcwd()}")
    if (num_groups := _num_groups()) != before.num_groups:
        found.append(f"process groups {before.num_groups} -> {num_groups}")
    if not before.has_children and _has_children():
        found.append("a child process")
    if before.files:
        found.extend(_file_leaks(before.files))
    return found


def restore(before: Snapshot) -> None:
    """Put back the environment, the current folder and torch's modes; threads and groups stay as they are."""
    for name in set(_environment()) - set(before.environment):
        del os.environ[name]
    os.environ.update(before.environment)
    os.chdir(before.folder)
    torch = sys.modules.get("torch")
    for name, was, _ in _changed(before.modes, _modes()):
        _TORCH_MODES[name][1](torch, was)


def resident_bytes() -> int:
    """Memory of this process; where the system does not say, its peak so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(_QUIET_VARIABLES)}


def _variable_leaks(before: dict[str, str], now: dict[str, str]) -> list[str]:
    # Names only: values may be secrets.
    words = {
        "set": sorted(now.keys() - before.keys()),
        "removed": sorted(before.keys() - now.keys()),
        "changed": sorted(name for name in now.keys() & before.keys() if now[name] != before[name]),
    }
    return [f"environment variable {name} {word}" for word, names in words.items() for name in names]


def _thread_leaks(before: tuple[threading.Thread, ...]) -> list[str]:
    deadline = time.monotonic() + _JOIN_S  # a thread that is just ending is no leak
    fresh = [thread for thread in threading.enumerate() if thread not in before]
    for thread in fresh:
        thread.join(
            max(0.0, deadline - time.monotonic()) if type(thread).__name__ not in _QUIET_THREADS else 0
        )
    return [
        f"thread {thread.name}"
        for thread in fresh
        if thread.is_alive() and type(thread).__name__ not in _QUIET_THREADS
    ]


def _modes() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    ready = torch is not None and hasattr(torch, "get_default_device")  # not half-way through its import
    return {name: read(torch) for name, (read, _) in _TORCH_MODES.items()} if ready else {}


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(name, was, now[name]) for name, was in before.items() if now.get(name) != was]


def _num_groups() -> int:
    dist = sys.modules.get("torch.distributed")
    return dist.get_pg_count() if dist and dist.is_initialized() else 0


def _open_files() -> dict[int, str]:
    """Regular files and sockets; pipes and the like belong to helpers that libraries keep for good."""
    found = {}
    folder = Path("/proc/self/fd")
    for entry in folder.iterdir() if folder.is_dir() else ():
        try:
            name = os.readlink(entry)
        except OSError:
            continue  # the descriptor of this very listing
        if name.startswith(("/", "socket:")) and not name.startswith(("/proc/", "/dev/null", "/dev/urandom")):
            found[int(entry.name)] = name
    return found


def _file_leaks(before: dict[int, str]) -> list[str]:
    def fresh() -> list[str]:
        return sorted(name for handle, name in _open_files().items() if before.get(handle) != name)

    if fresh():
        # Files and groups in reference cycles close here; too slow to do after every test. What hangs on an
        # autograd graph in such a cycle becomes garbage only when the first collection has freed the graph.
        gc.collect()
        gc.collect()
    names = ["a socket" if name.startswith("socket:") else f"open file {name}" for name in fresh()]
    return [
        name if names.count(name) == 1 else f"{name} ({names.count(name)})" for name in dict.fromkeys(names)
    ]


def _has_children() -> bool:
    """Whether this process has children, other than the tracker that multiprocessing keeps for good."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    listing = Path(f"/proc/self/task/{os.getpid()}/children")
    if not listing.exists():
        return True
    commands = [Path(f"/proc/{pid}/cmdline") for pid in listing.read_text().split()]
    return any(b"resource_tracker" not in path.read_bytes() for path in commands if path.exists())
