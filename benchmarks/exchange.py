"""Exchange between ranks of one host: shared memory against the network, in one command.

    python benchmarks/exchange.py [--ranks 2] [--rounds 15] [--mb 1 16 64] [--json]

One set of ranks (gloo, one compute thread each) holds both transports and gives them turns, first one then
the other, the next round the other way round, with a barrier around each turn. Buffers are taken once and
used again, as the engine does it. Figures are medians in ms per exchange of that many MB on every rank;
"total" is a sum of eight numbers, as it ends every update.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from contest import run_ranks

HOST, NETWORK = "host", "network"
TYPES = ("float32", "bfloat16")


def exchanges(mesh: Any, numel: int, dtype: Any) -> dict[str, Callable[[], None]]:
    """What is timed: every exchange of one mesh, as the engine would issue it."""
    summed = mesh.exchangeable.take(numel, dtype).zero_()
    reduced = mesh.exchangeable.take(numel, dtype).zero_()
    import torch

    working = torch.zeros(numel, dtype=dtype)

    def reduce_scatter() -> None:
        mesh.exchangeable.reclaim(summed)
        mesh.replicas.shard.reduce_scatter(summed).wait()

    return {
        "reduce-scatter": reduce_scatter,
        "all-gather": lambda: mesh.replicas.shard.all_gather(working).wait(),
        "all-reduce": lambda: mesh.replicas.all.all_reduce(reduced).wait(),
    }


def timed(call: Callable[[], None], repeats: int) -> float:
    """Milliseconds per call; all ranks begin and end together."""
    import torch.distributed as dist

    dist.barrier()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    dist.barrier()
    return (time.perf_counter() - began) * 1e3 / repeats


def work(options: dict[str, Any]) -> None:
    """One rank."""
    import torch
    import torch.distributed as dist

    from sixfold.mesh import Mesh
    from sixfold.plan import Geometry

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks, rank = dist.get_world_size(), dist.get_rank()
    geometry = Geometry((("data", ranks),), ranks)
    meshes = {
        transport: Mesh(geometry, rank, torch.device("cpu")).sharing(
            transport, exchange_bytes=0, timeout_s=60.0
        )
        for transport in (HOST, NETWORK)
    }
    found: dict[str, list[float]] = {}
    for size in options["mb"]:
        for name in TYPES:
            dtype = getattr(torch, name)
            numel = size * 10**6 // dtype.itemsize // (64 * ranks) * 64 * ranks
            calls = {transport: exchanges(mesh, numel, dtype) for transport, mesh in meshes.items()}
            measure(found, calls, f"{size} MB {name}", options["rounds"], max(1, 16 // size))
    totals = {
        transport: {"total": lambda mesh=mesh: mesh.total(*range(8))} for transport, mesh in meshes.items()
    }
    measure(found, totals, "8 numbers", options["rounds"], 100)
    if rank == 0:
        print(json.dumps({label: statistics.median(values) for label, values in found.items()}), flush=True)
    sys.stdout.flush()
    os._exit(0)


def measure(
    found: dict[str, list[float]],
    calls: dict[str, dict[str, Callable[[], None]]],
    label: str,
    rounds: int,
    repeats: int,
) -> None:
    """Turns of both transports for every exchange; the first round warms up."""
    for number in range(-1, rounds):
        for name in calls[HOST]:
            for transport in (HOST, NETWORK)[:: 1 if number % 2 else -1]:
                spent = timed(calls[transport][name], repeats)
                if number >= 0:
                    found.setdefault(f"{name}|{label}|{transport}", []).append(spent)


def table(medians: dict[str, float]) -> str:
    """The figures as a Markdown table."""
    lines = ["| exchange | size | network, ms | host, ms | ratio |", "|---|---|---|---|---|"]
    for name, label in dict.fromkeys(tuple(key.split("|")[:2]) for key in medians):
        network, host = (medians[f"{name}|{label}|{transport}"] for transport in (NETWORK, HOST))
        lines.append(f"| {name} | {label} | {network:.3f} | {host:.3f} | {network / host:.1f} |")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--mb", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Start the ranks and print, or be one of them."""
    args = parse()
    if args.work:
        work(json.loads(args.work))
        return
    options = json.dumps({"rounds": args.rounds, "mb": args.mb})
    medians = run_ranks([__file__, "--work", options], args.ranks)
    print(json.dumps(medians) if args.json else table(medians))


if __name__ == "__main__":
    main()
