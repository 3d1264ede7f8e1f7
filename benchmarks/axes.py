"""Axes of the model against layers of other libraries that divide the same thing, in one command.

    python benchmarks/axes.py [--only context] [--ranks 2] [--rounds 15] [--json]

One set of ranks (gloo, one compute thread each) holds all contestants of a part and gives them turns, in
another order every round, with a barrier around each. A turn is a forward and a backward of one layer, with
the same numbers for everyone. Ratios are ours / theirs, round by round: median and an interval that covers it
with 95 %; CPU time tells more where the machine has other work. What a library refuses on CPUs is told, not
left out. A part is a module `axis_NAME.py` beside this.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from contest import median_interval, quit_rank, run_ranks

PARTS = ("tensor", "context", "expert")
"""`axis_NAME.contestants(rank, num_ranks)` gives name -> turn, or the reason why there is none; `facts` what
else is told."""

Turn = Callable[[], None]


def work(options: dict[str, Any]) -> None:
    """One rank: every contestant in turn."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    part = importlib.import_module(f"axis_{options['only']}")
    found: dict[str, Turn | str] = part.contestants(rank, num_ranks)
    turns = {name: turn for name, turn in found.items() if not isinstance(turn, str)}
    for turn in turns.values():
        turn()
    times: dict[str, list[float]] = {name: [] for name in turns}
    computed: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for number in range(options["rounds"]):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            dist.barrier()
            began, used = time.perf_counter(), time.process_time()
            turns[name]()
            computed[name].append((time.process_time() - used) * 1e3)
            dist.barrier()
            times[name].append((time.perf_counter() - began) * 1e3)
    facts = part.facts()
    if rank == 0:
        refused = {name: turn for name, turn in found.items() if isinstance(turn, str)}
        told = {"times": times, "cpu_ms": computed, "refused": refused, "facts": facts}
        print(json.dumps(told), flush=True)
    quit_rank()


def show(part: str, told: dict[str, Any]) -> None:
    for kind, what in (("times", "ms of a turn"), ("cpu_ms", "ms of CPU time of the first rank in it")):
        times: dict[str, list[float]] = told[kind]
        ours = next(iter(times))
        print(f"{part}: {what}, and {ours} / other")
        for name, each in times.items():
            pairs = zip(times[ours], each, strict=True)
            ratio, low, high = median_interval([mine / theirs for mine, theirs in pairs])
            print(f"  {name:<24} {statistics.median(each):9.2f}   {ratio:.3f} ({low:.3f} to {high:.3f})")
    for name, reason in told["refused"].items():
        print(f"  {name:<24} {reason}")
    for name, value in told["facts"].items():
        print(f"  {name}: {value}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one part; unset: all")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.work is not None:
        work(json.loads(asked.work))
        return
    results = {}
    for part in PARTS if asked.only is None else (asked.only,):
        options = json.dumps({"only": part, "rounds": asked.rounds})
        results[part] = run_ranks([os.path.abspath(__file__), "--work", options], asked.ranks)
    if asked.json:
        print(json.dumps(results))
        return
    for part, told in results.items():
        show(part, told)


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    main()
