"""The elastic agent: torch elastic brings the ranks together and numbers them, a Job runs them.

`supervisor.launch` calls `run_agent`. It extends SimpleElasticAgent in the documented way, by its four
abstract methods, because the stock local agent waits 30 s for the others once a rank has failed, and
writes tables to the terminal. It decides nothing about failures and signals: the Job does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    Worker,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from sixfold.launch.environment import NodePlacement
from sixfold.launch.job import Job

_POLL_S = 0.05
_LOOPBACK = "127.0.0.1"


def run_agent(job: Job, *, ranks: int, node: NodePlacement | None, log: Path) -> None:
    """Rendezvous, start the ranks of `job` and poll it until it is over.

    Args:
        job: what to start and who decides.
        ranks: processes on this machine.
        node: this machine's place among several; None for this machine alone.
        log: file for what torch elastic has to say.
    """
    with _quiet(log):
        rendezvous = _rendezvous(node)
        spec = WorkerSpec(
            role="default",
            local_world_size=ranks,
            rdzv_handler=rendezvous,
            entrypoint=job.command[0],
            max_restarts=0,
            monitor_interval=_POLL_S,
            local_addr=_LOOPBACK if node is None else None,
        )
        try:
            _Agent(spec, job).run()
        finally:
            rendezvous.shutdown()


class _Agent(SimpleElasticAgent):
    """Starts, polls and ends its workers through a Job."""

    def __init__(self, spec: WorkerSpec, job: Job) -> None:
        super().__init__(spec)
        self._job = job

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        return {
            worker.local_rank: self._job.start(
                worker.global_rank, worker.world_size, _variables(worker, worker_group)
            )
            for worker in worker_group.workers
        }

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        state = self._job.poll()
        if state == "running":
            return RunResult(state=WorkerState.HEALTHY)
        if state == "failed":
            return RunResult(state=WorkerState.FAILED)
        values = dict.fromkeys(worker.global_rank for worker in worker_group.workers)
        return RunResult(state=WorkerState.SUCCEEDED, return_values=values)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._job.kill()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        self._job.kill()


def _rendezvous(node: NodePlacement | None) -> RendezvousHandler:
    """Where agents and ranks meet: on one machine a store on a port that the system chooses."""
    if node is None:
        # The ranks use this same store, so no port is picked first and bound later.
        return get_rendezvous_handler(
            RendezvousParameters(
                backend="c10d",
                endpoint=f"{_LOOPBACK}:0",
                run_id=f"sixfold-{os.getpid()}",
                min_nodes=1,
                max_nodes=1,
                local_addr=_LOOPBACK,
                is_host=True,
            )
        )
    return get_rendezvous_handler(
        RendezvousParameters(
            backend="static",
            endpoint=f"{node.master_addr}:{node.master_port}",
            run_id="sixfold",
            min_nodes=node.num_nodes,
            max_nodes=node.num_nodes,
            rank=node.node_rank,
        )
    )


def _variables(worker: Worker, group: WorkerGroup) -> dict[str, str]:
    """What torch elastic promises a worker in its environment."""
    spec = group.spec
    return {
        "RANK": str(worker.global_rank),
        "LOCAL_RANK": str(worker.local_rank),
        "WORLD_SIZE": str(worker.world_size),
        "LOCAL_WORLD_SIZE": str(spec.local_world_size),
        "GROUP_RANK": str(group.group_rank),
        "GROUP_WORLD_SIZE": str(group.group_world_size),
        "ROLE_NAME": spec.role,
        "ROLE_RANK": str(worker.role_rank),
        "ROLE_WORLD_SIZE": str(worker.role_world_size),
        "MASTER_ADDR": str(group.master_addr),
        "MASTER_PORT": str(group.master_port),
        "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": str(spec.max_restarts),
        "TORCHELASTIC_USE_AGENT_STORE": str(spec.rdzv_handler.use_agent_store),
    }


@contextlib.contextmanager
def _quiet(log: Path) -> Iterator[None]:
    """Send what torch elastic logs to a file: the terminal belongs to rank 0 and to one message."""
    logger = logging.getLogger("torch.distributed")
    handler = logging.FileHandler(log, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers, propagate = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        handler.close()
