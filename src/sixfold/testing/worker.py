"""What a rank of the pool does: join its world once, then run one function after the other.

Entered by server.py right after the fork; talks to pool.py over one connection and ends with it.
It decides nothing: outcomes and leaks are sent back, and the pool judges them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import importlib.util
import inspect
import os
import pickle
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from types import ModuleType, TracebackType
from typing import Any, NoReturn

from sixfold.testing import hygiene, wire

_SHOWN_LOCALS = 12
_SHOWN_CHARACTERS = 160


def live(connection: Connection, spec: wire.RankSpec) -> NoReturn:
    """Join the world, report readiness, then serve until the pool closes the connection."""
    try:
        _settle(spec)
        _join_world(spec)
        wire.send(connection, wire.Outcome(spec.rank, "passed", time.monotonic()))
    except BaseException as error:
        wire.send(connection, _failure(spec.rank, error, __file__))
    while True:
        try:
            task = wire.receive(connection)
        except (EOFError, OSError):
            os._exit(0)
        before, outcome = _run(task, spec.rank)
        wire.send(connection, outcome)
        try:
            wire.receive(connection)  # the word to close; a pool that is not content kills instead
        except (EOFError, OSError):
            os._exit(0)
        wire.send(connection, _close(before, spec))


def _settle(spec: wire.RankSpec) -> None:
    os.setpgid(0, 0)  # killed as a group, with whatever a test starts
    log = os.open(spec.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_TRUNC, 0o600)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    for text in (sys.stdout, sys.stderr):
        getattr(text, "reconfigure", lambda **_: None)(line_buffering=True)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, file=open(spec.stacks, "w"), all_threads=True)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the starting shell ignored
    os.environ.update(
        RANK=str(spec.rank),
        LOCAL_RANK=str(spec.rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(spec.world_size),
        LOCAL_WORLD_SIZE=str(spec.world_size),
        GROUP_WORLD_SIZE="1",
    )
    # All ranks are here: loopback works without a network and whatever the host name resolves to.
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])


def _join_world(spec: wire.RankSpec) -> None:
    # The forkserver has loaded it; whoever asks for another preload pays here, and only here.
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(spec.store, spec.world_size)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=spec.rank, world_size=spec.world_size)
    dist.barrier()


def _run(task: wire.Task, rank: int) -> tuple[hygiene.Snapshot | None, wire.Outcome]:
    before = None
    try:
        sys.path[:] = task.sys_path
        os.chdir(task.folder)
        os.ftruncate(1, 0)
        function = _find(task)
        args, kwargs = pickle.loads(task.arguments)
        _reseed()
        before = hygiene.take()
        with _own_patches(kwargs) as kwargs:
            value = pickle.dumps(function(*args, **kwargs))
        return before, wire.Outcome(rank, "passed", time.monotonic(), value)
    except BaseException as error:
        return before, _failure(rank, error, task.file)


def _find(task: wire.Task) -> Callable[..., Any]:
    """The function itself; a method is bound to a fresh object of its class, as pytest does."""
    owner: Any = None
    found: Any = _module(task.module, task.file)
    for name in task.qualname.split("."):
        owner, found = found, getattr(found, name)
    if inspect.isclass(owner) and inspect.isfunction(found) and "self" in inspect.signature(found).parameters:
        return getattr(owner(), found.__name__)  # type: ignore[no-any-return]
    return found  # type: ignore[no-any-return]


def _module(name: str, file: str) -> ModuleType:
    """By name where that leads to the same file, else from the file: every import mode of pytest works."""
    if "pytest" in sys.modules:
        sys.modules["pytest"].register_assert_rewrite(name)
    if name != "__main__":
        with contextlib.suppress(ModuleNotFoundError):
            module = importlib.import_module(name)
            if os.path.realpath(module.__file__ or "") == os.path.realpath(file):
                return module
    name = f"_ranks_{abs(hash(file))}" if name == "__main__" else name
    known = sys.modules.get(name)
    if known is not None and known.__file__ == file:
        return known
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {file}")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _own_patches(kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Give the body a monkeypatch that acts on this rank, in place of the one that came along."""
    pytest: Any = sys.modules.get("pytest")
    with contextlib.ExitStack() as undo:
        yield {
            name: undo.enter_context(pytest.MonkeyPatch.context())
            if pytest and isinstance(value, pytest.MonkeyPatch)
            else value
            for name, value in kwargs.items()
        }


def _reseed() -> None:
    random.seed(0)
    for name, seed in (("numpy", "random.seed"), ("torch", "manual_seed")):
        found: Any = sys.modules.get(name)
        for part in seed.split(".") if found else ():
            found = getattr(found, part)
        if found:
            found(0)


def _close(before: hygiene.Snapshot | None, spec: wire.RankSpec) -> wire.Outcome:
    """Look for leaks; without any, meet the others once more."""
    try:
        leaks = tuple(hygiene.leaks_since(before)) if before else ()
        if not leaks and spec.world_size > 1:
            # Loaded long since by _join_world; this file itself stays importable without torch.
            import torch.distributed as dist

            dist.barrier()  # meets only if every rank issued the same collectives before
        closing = wire.Closing(leaks, hygiene.resident_bytes())
        kind: wire.Kind = "failed" if leaks else "passed"
        return wire.Outcome(spec.rank, kind, time.monotonic(), closing=closing)
    except BaseException as error:
        return _failure(spec.rank, error, __file__)


def _failure(rank: int, error: BaseException, file: str) -> wire.Outcome:
    now = time.monotonic()
    pytest = sys.modules.get("pytest")
    for kind in ("skip", "xfail"):
        if pytest and isinstance(error, getattr(pytest, kind).Exception):
            return wire.Outcome(rank, "skipped" if kind == "skip" else "xfailed", now, summary=str(error))
    lines = traceback.format_exception_only(error)
    trace = "".join(traceback.format_exception(type(error), error, _trimmed(error.__traceback__)))
    summary = " ".join(lines[-1].split("\n")[0].split()) if lines else repr(error)
    return wire.Outcome(rank, "failed", now, summary=summary, trace=trace + _locals(error, file))


def _trimmed(trace: TracebackType | None) -> TracebackType | None:
    """Without the frames of this file, which say nothing about the test."""
    rest = trace
    while rest is not None and rest.tb_frame.f_code.co_filename == __file__:
        rest = rest.tb_next
    return rest or trace


def _locals(error: BaseException, file: str) -> str:
    """The variables of the innermost frame that lies in the test's own file."""
    frames = [
        frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == file
    ]
    if not frames:
        return ""
    lines = []
    for name, value in list(frames[-1].f_locals.items())[:_SHOWN_LOCALS]:
        try:
            text = " ".join(repr(value).split())
        except Exception as broken:
            text = f"<repr raised {type(broken).__name__}>"
        if not name.startswith("@"):  # names that assertion rewriting made
            lines.append(f"    {name} = {text[:_SHOWN_CHARACTERS]}\n")
    return f"  where, in {frames[-1].f_code.co_name}:\n{''.join(lines)}" if lines else ""
