"""A few ranks of this machine meet, exchange known numbers over every transport, and say how long it took.

`sixfold doctor` calls `run`, which starts this module once for each rank. It tests the way that training
goes, nothing else: no model, no files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from sixfold.base.errors import SixfoldError
from sixfold.mesh import Mesh
from sixfold.plan.geometry import Geometry

NUMEL = 2**20
REPEATS = 5


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Args:
        problem: why it failed; None where it did not.
        rates: MB/s of a sum over ranks, by transport.
    """

    problem: str | None
    rates: dict[str, float]


def run(num_ranks: int, timeout_s: float) -> Outcome:
    """Start ranks of this machine, let them exchange, and collect what they say."""
    # They meet at a store that is kept here, as at a launcher's: its port is never free for others meanwhile.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = [str(num_ranks), str(store.port), str(timeout_s)]
    command = [sys.executable, "-m", "sixfold.monitor.selftest", *given]
    ranks = [
        subprocess.Popen(
            [*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environ()
        )
        for rank in range(num_ranks)
    ]
    deadline = time.monotonic() + timeout_s
    problems, rates = [], {}
    for rank, process in enumerate(ranks):
        try:
            out, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            problems.append(f"rank {rank} did not come to an end within {timeout_s:g} s")
            continue
        if process.returncode:
            problems.append(f"rank {rank}: {(err.strip() or 'no message').splitlines()[-1]}")
        elif rank == 0:
            rates = json.loads(out.splitlines()[-1])
    return Outcome("; ".join(problems) or None, rates)


def _environ() -> dict[str, str]:
    """This environment for ranks that meet at a store of somebody else, whatever rank this process may be."""
    own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in own and not name.startswith("TORCHELASTIC_")
    }
    return {**kept, "TORCHELASTIC_USE_AGENT_STORE": "True"}


def exchange(num_ranks: int, port: int, timeout_s: float, rank: int) -> dict[str, float]:
    """One rank's part; MB/s by transport.

    Raises:
        AssertionError: a sum is not what it must be.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    torch.set_num_threads(1)
    mesh = Mesh.form(
        Geometry((("data", num_ranks),), num_ranks),
        device,
        rank=rank,
        address=f"127.0.0.1:{port}",
        meet_s=timeout_s,
        timeout_s=timeout_s,
    )
    rates = {"nccl" if on_gpu else "network": _rate(mesh)}
    if not on_gpu:
        shared = mesh.sharing(None, exchange_bytes=NUMEL * 4, timeout_s=timeout_s)
        if shared.host is not None:
            rates["host"] = _rate(shared)
            shared.barrier()
    mesh.barrier()
    mesh.close()
    return rates


def _rate(mesh: Mesh) -> float:
    numbers = mesh.exchangeable.take(NUMEL, torch.float32)
    expected = mesh.world_size * (mesh.world_size + 1) / 2
    seconds = []
    for _ in range(REPEATS):
        numbers.fill_(mesh.rank + 1)
        mesh.barrier()
        began = time.perf_counter()
        mesh.replicas.sum_up(numbers, ()).wait()
        seconds.append(time.perf_counter() - began)
        if not bool((numbers == expected).all()):
            raise AssertionError(f"a sum over {mesh.world_size} ranks gave {numbers[0]}, not {expected}")
    return NUMEL * 4 / min(seconds) / 1e6


def main() -> int:
    """One rank, as `run` starts it."""
    num_ranks, port, timeout_s, rank = sys.argv[1:]
    try:
        print(json.dumps(exchange(int(num_ranks), int(port), float(timeout_s), int(rank))))
    except (SixfoldError, RuntimeError, AssertionError) as error:
        print(str(error).replace("\n", " "), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
