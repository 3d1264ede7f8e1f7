"""How long ranks wait for each other, and what happens when it was too long.

`initialize` calls `meet` and, before the first exchange, `watch`. Nothing is decided here about hangs: the
monitor room judges, the session of the launch room ends the process.
"""

from __future__ import annotations

import atexit
import itertools
import logging
from collections.abc import Callable
from datetime import timedelta

import torch
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from sixfold.config import LaunchConfig
from sixfold.launch import current_session
from sixfold.launch.failure import from_hang
from sixfold.mesh import Mesh
from sixfold.monitor.verdict import Verdict
from sixfold.monitor.watcher import Watcher
from sixfold.plan.geometry import Geometry

_log = logging.getLogger(__name__)
_serials = itertools.count()
_BACKEND_LATER_S = 30.0
_CONNECT = timedelta(seconds=10)


def timeouts_of(asked: LaunchConfig) -> dict[str, float]:
    """How long an exchange is waited for, by phase."""
    return {
        "start": asked.start_timeout_s,
        "step": asked.timeout_s,
        "save": asked.save_timeout_s,
        "load": asked.save_timeout_s,
    }


def patience_of(asked: LaunchConfig) -> float:
    """Seconds that a transport waits for another rank: longer than the watcher, which can name it."""
    return max(timeouts_of(asked).values()) + _BACKEND_LATER_S


def meet(
    geometry: Geometry, device: torch.device, rank: int, address: str | None, asked: LaunchConfig
) -> Mesh:
    """Form the mesh; its backend, which ends a rank without a verdict, has more patience than we."""
    return Mesh.form(
        geometry,
        device,
        rank=rank,
        address=address,
        meet_s=asked.start_timeout_s,
        timeout_s=patience_of(asked),
    )


def watch(mesh: Mesh, address: str | None, asked: LaunchConfig) -> Callable[[], None]:
    """Start the watcher of this rank, unless it is alone or no store can be reached; returns its end.

    Args:
        address: "host:port" of the store through which the ranks met; None where it is not known.
    """
    store = _store(address) if mesh.world_size > 1 else None
    if store is None:
        return lambda: None
    session = current_session()
    watcher = Watcher(
        mesh.dispatcher,
        PrefixStore(f"sixfold/watcher/{next(_serials)}", store),
        rank=mesh.rank,
        world_size=mesh.world_size,
        timeouts=timeouts_of(asked),
        tell=_tell,
        tells_deaths=not session.supervised,
        folder=session.scratch,
    )

    def end() -> None:
        watcher.close()
        atexit.unregister(end)
        session.at_failure.remove(watcher.close)

    session.at_failure.append(watcher.close)
    # Registered after the mesh's own end, so called before it: while there still is a store.
    atexit.register(end)
    return end


def _store(address: str | None) -> Store | None:
    """A connection of the watcher's own: one that another thread waits on would block it."""
    if address is None:
        _log.info("hangs are not watched: no MASTER_ADDR and MASTER_PORT tell where the ranks met")
        return None
    host, _, port = address.rpartition(":")
    try:
        return TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=_CONNECT)
    except (RuntimeError, ValueError) as error:
        _log.warning("hangs are not watched: no store at %s (%s)", address, str(error).partition("\n")[0])
        return None


def _tell(verdict: Verdict | None) -> None:
    session = current_session()
    if verdict is None:
        session.end_hang(None)
    session.end_hang(
        from_hang(
            verdict.headline,
            fix=verdict.fix,
            positions=verdict.lines,
            rank=verdict.guilty[0] if verdict.guilty else session.rank,
            step=session.step,
        )
    )
