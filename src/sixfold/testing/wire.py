"""What travels between the pool and its ranks: four small values, pickled once, as bytes.

Used by pool.py on one side and server.py, worker.py on the other. Plain pickle on purpose: the pickler
of torch.multiprocessing would share tensors through file descriptors, which a leak check would then find.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

Kind = Literal["passed", "failed", "skipped", "xfailed", "died", "stuck"]


@dataclass(frozen=True)
class RankSpec:
    """Who a new rank is: its place in the world and its files in the pool's folder."""

    rank: int
    world_size: int
    store: str
    log: str
    stacks: str


@dataclass(frozen=True)
class Task:
    """A function by name, with pickled (args, kwargs) that are opened once its module is imported."""

    module: str
    file: str
    qualname: str
    arguments: bytes
    sys_path: tuple[str, ...]
    folder: str


@dataclass(frozen=True)
class Closing:
    """What one rank found when it checked itself after a body that passed."""

    leaks: tuple[str, ...]
    resident_bytes: int


@dataclass(frozen=True)
class Outcome:
    """How the body, or the check after it, ended on one rank; `ended_s` is on the machine's monotonic clock.

    `trace` is the traceback of a failure or, for a stuck rank, the dump of its stacks.
    """

    rank: int
    kind: Kind
    ended_s: float
    value: bytes = b""
    summary: str = ""
    trace: str = ""
    closing: Closing | None = None


def send(connection: Connection, message: Any) -> None:
    connection.send_bytes(pickle.dumps(message))


def receive(connection: Connection) -> Any:
    """The next message; EOFError when the other side is gone."""
    return pickle.loads(connection.recv_bytes())
