"""What the record of exchanges and the hang watcher cost, in one command.

    python benchmarks/dispatcher.py [--ranks 2] [--model tiny|s|m] [--json]

An exchange: the dispatcher's own time for one that carries nothing, from start to the end of wait, in CPU
time of this thread, with the rings of three neighbours mapped as on a host of four ranks. A look: the
watcher's CPU time for one of its rounds in quiet times, which it makes once a second. A step: exchanges
and seconds of real updates on a pool of ranks. The share is exchanges x time of one over the step, plus
that of the watcher's rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed import FileStore

import sixfold
from sixfold.base.ring import opened
from sixfold.mesh import Dispatcher
from sixfold.mesh.dispatch import Carrier
from sixfold.models.decoder import Decoder, DecoderConfig
from sixfold.monitor.watcher import Watcher
from sixfold.testing import Pool

NEIGHBOURS = 3
WIDTHS = {"tiny": (32, 1), "s": (256, 6), "m": (640, 12)}
VOCABULARY, LENGTH, MICRO = 4096, 128, 8


class Nothing:
    """An exchange that has ended at once."""

    def wait(self) -> None:
        """Return."""

    def is_completed(self) -> bool:
        """It is."""
        return True


def cpu_us(action: Callable[[], object], times: int) -> float:
    """CPU microseconds of this thread for one call, the median of nine runs."""
    runs = []
    for _ in range(9):
        began = time.thread_time()
        for _ in range(times):
            action()
        runs.append((time.thread_time() - began) / times * 1e6)
    return statistics.median(runs)


def exchange_us() -> float:
    """One exchange among four ranks of one host."""
    dispatcher, tensor, work = Dispatcher(), torch.ones(8), Nothing()
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(1 + NEIGHBOURS):
            (dispatcher if rank == 0 else Dispatcher()).ring.share(f"{folder}/{rank}")
        for rank in range(1, 1 + NEIGHBOURS):
            block = opened(f"{folder}/{rank}")
            assert block is not None, "it has just been made"
            dispatcher.neighbours[rank] = block
        exchange = dispatcher.prepare("all-reduce", "0-3", tensor, Carrier([lambda: work]))
        return cpu_us(lambda: exchange.start().wait(), 2000)


def look_us() -> float:
    """One quiet round of a watcher, without what the store's server does."""
    with tempfile.TemporaryDirectory() as folder:
        watcher = Watcher(
            Dispatcher(),
            FileStore(f"{folder}/store", 1),
            rank=0,
            world_size=1,
            timeouts={"step": 1e9},
            tell=lambda verdict: None,
            folder=Path(folder),
        )
        try:
            return cpu_us(watcher.look, 50)
        finally:
            watcher.close()


def steps(model: str, zero: int) -> tuple[int, float]:
    """On a rank: exchanges and seconds of one update."""
    width, layers = WIDTHS[model]
    config = DecoderConfig(
        VOCABULARY, LENGTH, width, layers, num_heads=4, num_kv_heads=4, ffn_width=3 * width
    )
    engine = sixfold.initialize(Decoder(config), config={"layout": {"zero": zero}, "batch": {"micro": MICRO}})
    batch = {"tokens": torch.randint(VOCABULARY, (MICRO, LENGTH + 1))}
    engine.train_step(batch)
    times, numbers = [], []
    for _ in range(5):
        before, began = engine.mesh.dispatcher.num_exchanges, time.perf_counter()
        engine.train_step(batch)
        times.append(time.perf_counter() - began)
        numbers.append(engine.mesh.dispatcher.num_exchanges - before)
    engine.close()
    return max(numbers), statistics.median(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", choices=tuple(WIDTHS), default="s")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args()
    figures: dict[str, float] = {"exchange_us": exchange_us(), "look_us": look_us()}
    with Pool(args.ranks) as pool:
        for zero in (0, 2):
            number, seconds = pool.run(steps, args.model, zero, ranks=args.ranks, timeout_s=300)[0]
            recorded_s = number * figures["exchange_us"] / 1e6
            figures |= {
                f"zero {zero}: exchanges a step": number,
                f"zero {zero}: step_ms": seconds * 1e3,
                f"zero {zero}: share_percent": 100 * (recorded_s / seconds + figures["look_us"] / 1e6),
            }
    print(json.dumps(figures) if args.json else "\n".join(f"{k}: {v:.4g}" for k, v in figures.items()))


if __name__ == "__main__":
    main()
