"""Saving and loading: Sixfold's checkpoints against a raw write of the same bytes and against peers.

    python benchmarks/checkpoint.py [--ranks 2] [--mb 384] [--rounds 7]

Every rank holds its slice of a model with AdamW (master and two moments, fp32, cut by `layout.zero = 2`).
Contestants take turns in every round, in changing order, after the disk has become quiet: each writes the
same state and makes it durable (fsync), then everyone reads it back from the page cache.

    raw                each rank writes and syncs its share of the bytes into a file of its own
    torch.save         rank 0 has everything whole and writes it; nothing is gathered, which flatters it
    distributed        torch.distributed.checkpoint of FSDP2's DTensors, all ranks, then synced
    deepspeed          its engine with ZeRO stage 2, `save_checkpoint`, then synced; where it is installed

It also times how long `engine.save(wait=False)` holds up training, beside a step, and the steps meanwhile.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from contest import run_ranks

WIDTH = 1024
CHUNK_BYTES = 4 * 2**20
KEYS = 3  # master, exp_avg, exp_avg_sq


def make_model(num_layers: int) -> Any:
    """A stack of square matrices."""
    import torch

    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(
                torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num_layers)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x.square().mean()

    return Stack()


def make_engine(num_layers: int) -> Any:
    """Trained for one step, so that there is optimizer state."""
    import torch

    import sixfold

    with torch.device("meta"):
        model = make_model(num_layers)
    engine = sixfold.initialize(model, config={"layout": {"zero": 2}})
    engine.train_step(batch())
    return engine


def batch() -> Any:
    """Small, so that a step is as short as the model allows."""
    import torch

    return torch.ones(16, WIDTH)


def synced(folder: Path) -> None:
    """Make what lies in a folder durable."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)


Contestant = tuple[Callable[[Path], None], Callable[[Path], None]]
"""Save into a folder, load from it; called on every rank."""


def raw(share_bytes: int, rank: int) -> Contestant:
    """Each rank's share of the bytes in a file of its own."""
    import torch

    share = torch.ones(share_bytes // 4)
    target = torch.ones_like(share)

    def save(folder: Path) -> None:
        data = share.numpy().data.cast("B")
        with open(folder / f"raw-{rank}", "wb", buffering=0) as file:
            for start in range(0, len(data), CHUNK_BYTES):
                file.write(data[start : start + CHUNK_BYTES])
            os.fsync(file.fileno())

    def load(folder: Path) -> None:
        data = target.numpy().data.cast("B")
        with open(folder / f"raw-{rank}", "rb", buffering=0) as file:
            for start in range(0, len(data), CHUNK_BYTES):
                file.readinto(data[start : start + CHUNK_BYTES])

    return save, load


def whole_by_torch(names: Sequence[str], rank: int) -> Contestant:
    """Rank 0 alone, with everything whole in its memory."""
    import torch

    whole = {name: torch.ones(WIDTH, WIDTH) for name in names} if rank == 0 else {}

    def save(folder: Path) -> None:
        if rank == 0:
            torch.save(whole, folder / "all.pt")
            synced(folder)

    def load(folder: Path) -> None:
        if rank == 0:
            loaded = torch.load(folder / "all.pt", weights_only=True)
            for name, tensor in whole.items():
                tensor.copy_(loaded[name])

    return save, load


def distributed(names: Sequence[str], rank: int, ranks: int) -> Contestant:
    """torch.distributed.checkpoint of DTensors cut by rows, as FSDP2 has them."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (ranks,))
    cut = {name: distribute_tensor(torch.ones(WIDTH, WIDTH), mesh, [Shard(0)]) for name in names}

    def save(folder: Path) -> None:
        dcp.save(cut, checkpoint_id=folder / "dcp")
        if rank == 0:
            synced(folder)

    return save, lambda folder: dcp.load(cut, checkpoint_id=folder / "dcp")


def partitions(num_layers: int, rank: int) -> Contestant:
    """DeepSpeed's engine with cut gradients and optimizer, trained for one step too."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    model = make_model(num_layers)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": 16,
            "zero_optimization": {"stage": 2},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        },
    )
    engine.backward(engine(batch()))
    engine.step()

    def save(folder: Path) -> None:
        engine.save_checkpoint(str(folder))
        if rank == 0:
            synced(folder)

    return save, lambda folder: engine.load_checkpoint(str(folder))


def timed(action: Callable[[], None]) -> tuple[float, float]:
    """(seconds of the slowest rank, CPU seconds of all ranks)."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    took = torch.tensor(time.perf_counter() - wall, dtype=torch.float64)
    spent = torch.tensor(time.process_time() - cpu, dtype=torch.float64)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    dist.all_reduce(spent)
    return float(took), float(spent)


def run_rounds(folder: Path, num_layers: int, rounds: int, rank: int, ranks: int) -> dict[str, Any]:
    """Turns, as `timed` has them, by contestant and kind."""
    engine = make_engine(num_layers)
    names = [f"{layer}.{key}" for layer in range(num_layers) for key in range(KEYS)]
    found: dict[str, Contestant] = {
        "raw": raw(len(names) * WIDTH * WIDTH * 4 // ranks, rank),
        "sixfold": (engine.save, engine.load),
        "torch.save": whole_by_torch(names, rank),
        "distributed": distributed(names, rank, ranks),
    }
    if importlib.util.find_spec("deepspeed"):
        found["deepspeed"] = partitions(num_layers, rank)
    turns: dict[str, dict[str, list[tuple[float, float]]]] = {
        name: {"save": [], "load": []} for name in found
    }
    for number in range(-1, rounds):  # round -1 warms up
        for name in list(found)[:: 1 if number % 2 else -1]:
            place = folder / name
            if rank == 0:
                shutil.rmtree(place, ignore_errors=True)
                if name != "sixfold":
                    place.mkdir()
                os.sync()
            for kind, action in zip(("save", "load"), found[name], strict=True):
                turn = timed(partial(action, place))
                turns[name][kind] += [turn] if number >= 0 else []
    return {"turns": turns, "background": background(engine, folder, max(3, rounds))}


def background(engine: Any, folder: Path, rounds: int) -> dict[str, list[float]]:
    """How long a save in the background holds up training: the call, a step before, steps meanwhile."""
    found: dict[str, list[float]] = {"step": [], "blocked": [], "meanwhile": []}
    step = partial(engine.train_step, batch())
    for number in range(rounds):
        found["step"] += [timed(step)[0] for _ in range(3)]
        save = partial(engine.save, folder / f"background-{number % 2}", wait=False)
        found["blocked"].append(timed(save)[0])
        found["meanwhile"] += [timed(step)[0] for _ in range(3)]
        engine.wait_for_save()
    return found


def work(arguments: argparse.Namespace) -> None:
    """One rank."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    num_layers = layers_of(arguments.mb)
    result = run_rounds(Path(arguments.folder), num_layers, arguments.rounds, rank, arguments.ranks)
    if rank == 0:
        print(json.dumps(result), flush=True)
    sys.stdout.flush()
    os._exit(0)


def layers_of(mb: float) -> int:
    """Layers whose training state is about so many MB."""
    return max(1, round(mb * 1e6 / (WIDTH * WIDTH * 4 * KEYS)))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start the ranks and gather their figures."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        sizes = ["--ranks", arguments.ranks, "--mb", arguments.mb, "--rounds", arguments.rounds]
        command = [__file__, "--work", *map(str, sizes), "--folder", folder]
        result: dict[str, Any] = run_ranks(command, arguments.ranks)
    return {**result, "num_bytes": layers_of(arguments.mb) * WIDTH * WIDTH * 4 * KEYS}


def table(figures: dict[str, Any]) -> str:
    """The figures as text: medians, and medians over rounds of what the raw write needed, relative to it."""
    turns, num_bytes = figures["turns"], figures["num_bytes"]
    lines = [
        f"{num_bytes / 1e6:.0f} MB of training state; ratios to raw of the same round, above 1: better",
        "",
        "| | save GB/s | wall | CPU | load GB/s | wall | CPU |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, kinds in turns.items():
        cells = []
        for kind in ("save", "load"):
            cells.append(f"{num_bytes / 1e9 / statistics.median(wall for wall, _ in kinds[kind]):.2f}")
            for which in (0, 1):
                pairs = zip(turns["raw"][kind], kinds[kind], strict=True)
                cells.append(f"{statistics.median(raw[which] / own[which] for raw, own in pairs):.2f}")
        lines.append(f"| {' | '.join((name, *cells))} |")
    medians = {key: 1e3 * statistics.median(values) for key, values in figures["background"].items()}
    lines += [
        "",
        f"in the background: blocked {medians['blocked']:.0f} ms, a step {medians['step']:.0f} ms, "
        f"a step meanwhile {medians['meanwhile']:.0f} ms",
    ]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--mb", type=float, default=384, help="training state in MB over all ranks")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="where to write; default: the system's temporary folder")
    parser.add_argument("--smoke", action="store_true", help="one round of a tiny state: does it run?")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print, or be one of the ranks."""
    arguments = parse()
    if arguments.work:
        work(arguments)
        return
    if arguments.smoke:
        arguments.mb, arguments.rounds = 13, 1
    figures = measure(arguments)
    print(json.dumps(figures) if arguments.json else table(figures))


if __name__ == "__main__":
    main()
