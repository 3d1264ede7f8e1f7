"""Sixfold's pipelines against torch.distributed.pipelining and DeepSpeed, and against their own simulation.

    python benchmarks/pipeline.py [--rounds 15] [--steps 2] [--only 'torch-*' ...] [--makespan] [--json FILE]

Two ranks (gloo, one thread each) train the same residual blocks with the same schedule. A peer stands beside
Sixfold: two jobs, every rank a process of its own. They get turns of a few updates; who has no turn sleeps on
a pipe. The order changes every round, garbage collection is off, and barriers stand around the clock. A
figure is the peer's time divided by Sixfold's, the median over rounds with the 95 % interval of order
statistics; above 1 Sixfold is faster. Losses of the first updates have to agree.

`--makespan` measures instead how far predictions are off: steps are recorded, and the makespan of every
second one is compared with what the simulator says from the medians of passes of its two neighbours and a
measured latency, so that a machine which changes its speed does so on both sides; the figure is the median
over these steps with its interval. Once with stages that sleep, once with blocks that compute.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contest import (
    AGREEING_STEPS,
    AGREEMENT,
    RankError,
    Ranks,
    largest_difference,
    median_interval,
    quit_rank,
)

if TYPE_CHECKING:
    from torch import Tensor

FIRST_TURN_S, TURN_S = 900.0, 300.0
LR = 1e-3
SLEEPS = {"forward": 0.010, "backward": 0.020}
"""Seconds of one sleeping block."""


@dataclass(frozen=True)
class Sizes:
    """What is trained.

    Args:
        micro: samples in a micro-batch.
        sleeps: whether blocks sleep in place of computing.
    """

    width: int = 256
    length: int = 64
    num_blocks: int = 8
    num_micro: int = 8
    micro: int = 2
    sleeps: bool = False


TINY = Sizes(width=16, length=4, num_blocks=4, num_micro=3, micro=1)

# In the ranks.


def make_blocks(sizes: Sizes) -> list[Any]:
    """The blocks, the same weights on every rank and for every contestant."""
    import torch
    from torch import nn

    class Sleeping(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            time.sleep(SLEEPS["forward"])
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            time.sleep(SLEEPS["backward"])
            return gradients[0]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(sizes.width)
            self.up = nn.Linear(sizes.width, 4 * sizes.width)
            self.down = nn.Linear(4 * sizes.width, sizes.width)

        def forward(self, x: Tensor) -> Tensor:
            if sizes.sleeps:
                out: Tensor = Sleeping.apply(self.norm(x))  # type: ignore[no-untyped-call]
                return out
            return x + self.down(nn.functional.gelu(self.up(self.norm(x))))

    torch.manual_seed(0)
    return [Block() for _ in range(sizes.num_blocks)]


def batch(sizes: Sizes, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of an update, the same on every rank."""
    import torch

    draw = torch.Generator().manual_seed(step)
    shape = sizes.num_micro * sizes.micro, sizes.length, sizes.width
    return torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)


Step = Callable[["Tensor", "Tensor"], float]


def sixfold_engine(sizes: Sizes, schedule: str) -> Any:
    """Sixfold's engine, over its own optimizer settings."""
    from torch import nn

    import sixfold

    layout = {"pipe": 2, "schedule": schedule}
    if schedule in ("interleaved", "breadth-first"):
        layout["virtual_stages"] = 2
    return sixfold.initialize(
        nn.Sequential(*make_blocks(sizes)),
        config={"layout": layout, "batch": {"micro": sizes.micro}, "optimizer": {"lr": LR}},
        loss_fn=lambda output, given: nn.functional.mse_loss(output, given[1]),
    )


def build_sixfold(sizes: Sizes, schedule: str) -> Step:
    engine = sixfold_engine(sizes, schedule)
    return lambda x, y: float(engine.train_step((x, y)))


def build_torch(sizes: Sizes, schedule: str) -> Step:
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed import pipelining

    kinds = {
        "gpipe": pipelining.ScheduleGPipe,
        "1f1b": pipelining.Schedule1F1B,
        "interleaved": pipelining.ScheduleInterleaved1F1B,
        "zero-bubble-h1": pipelining.ScheduleInterleavedZeroBubble,
        "zero-bubble-v": pipelining.ScheduleZBVZeroBubble,
    }
    rank, blocks = dist.get_rank(), make_blocks(sizes)
    places = {"interleaved": (rank, rank + 2), "zero-bubble-v": (rank, 3 - rank)}.get(schedule, (rank,))
    num_stages = 2 * len(places)
    size = sizes.num_blocks // num_stages
    parts = [nn.Sequential(*blocks[place * size : (place + 1) * size]) for place in places]
    stages = [
        pipelining.PipelineStage(part, place, num_stages, torch.device("cpu"))
        for place, part in zip(places, parts, strict=True)
    ]
    is_multi = len(places) > 1 or schedule.startswith("zero-bubble")
    played: Any = kinds[schedule](
        stages if is_multi else stages[0],  # type: ignore[arg-type]
        n_microbatches=sizes.num_micro,
        loss_fn=nn.functional.mse_loss,
    )
    optimizer = torch.optim.AdamW([each for part in parts for each in part.parameters()], lr=LR, fused=True)
    has_first, has_last = 0 in places, num_stages - 1 in places

    def step(x: Tensor, y: Tensor) -> float:
        optimizer.zero_grad()
        losses: list[Tensor] = []
        given = (x,) if has_first else ()
        played.step(*given, **({"target": y, "losses": losses} if has_last else {}))
        optimizer.step()
        # The loss is told to every rank, as Sixfold and DeepSpeed do.
        mean = torch.stack(losses).mean() if has_last else torch.zeros(())
        dist.broadcast(mean, src=0 if schedule == "zero-bubble-v" else 1)
        return float(mean)

    return step


def build_deepspeed(sizes: Sizes, schedule: str) -> Step:
    import deepspeed
    from deepspeed.pipe import PipelineModule
    from torch import nn

    deepspeed.init_distributed(dist_backend="gloo")
    module = PipelineModule(
        layers=make_blocks(sizes), num_stages=2, loss_fn=nn.functional.mse_loss, partition_method="uniform"
    )
    config = {
        "train_micro_batch_size_per_gpu": sizes.micro,
        "gradient_accumulation_steps": sizes.num_micro,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "torch_adam": True, "fused": True}},
        "gradient_clipping": 0.0,
        "steps_per_print": 1 << 30,
    }
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)

    def step(x: Tensor, y: Tensor) -> float:
        micros = zip(x.split(sizes.micro), y.split(sizes.micro), strict=True)
        return float(engine.train_batch(data_iter=iter(micros)))

    return step


@dataclass(frozen=True)
class Contestant:
    """One way to train.

    Args:
        schedule: what Sixfold calls it.
    """

    build: Callable[[Sizes, str], Step]
    schedule: str


OURS = "sixfold"
PEERS: dict[str, Contestant] = {
    **{
        f"torch-{schedule}": Contestant(build_torch, schedule)
        for schedule in ("gpipe", "1f1b", "interleaved", "zero-bubble-h1", "zero-bubble-v")
    },
    "deepspeed-1f1b": Contestant(build_deepspeed, "1f1b"),
}


def work(sizes: Sizes, name: str, schedule: str) -> None:
    """One rank: trains as many updates as each line of its input says, and answers with what they took."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if name == "makespan":
        print(json.dumps(compare_makespan(sizes, schedule)), file=answers, flush=True)
        quit_rank()
    step = build_sixfold(sizes, schedule) if name == OURS else PEERS[name].build(sizes, schedule)
    number = 0
    for line in sys.stdin:
        given = [batch(sizes, number + each) for each in range(int(line))]
        number += len(given)
        dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        losses = [step(x, y) for x, y in given]
        dist.barrier()
        answer = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "losses": losses}
        # Before the answer, which lets the other job begin: its turn would pay for this.
        gc.collect()
        gc.disable()
        print(json.dumps(answer), file=answers, flush=True)
    quit_rank()


def compare_makespan(sizes: Sizes, schedule: str, num_steps: int = 11) -> dict[str, Any]:
    """Record steps, and compare every second one with what the simulator makes of those beside it."""
    import torch
    import torch.distributed as dist

    from sixfold.plan import programs_for
    from sixfold.simulate import measured_costs, simulate

    engine = sixfold_engine(sizes, schedule)
    for step in range(3):
        engine.train_step(batch(sizes, step))
    payload, link = torch.zeros(sizes.micro, sizes.length, sizes.width), engine.mesh.link(1 - dist.get_rank())
    trips = []
    for _ in range(30):
        began = time.perf_counter()
        for sends in (engine.mesh.rank == 0, engine.mesh.rank == 1):
            (link.send if sends else link.receive)(payload).wait()
        trips.append((time.perf_counter() - began) / 2)
    gc.collect()
    gc.disable()
    recorded = [engine.timed_step(batch(sizes, step)).aligned() for step in range(2 * num_steps + 1)]
    programs = programs_for(engine.resolved.config.layout, "training", sizes.num_micro)
    latency = statistics.median(trips)
    measured = [each.makespan for each in recorded[1::2]]
    predicted = [
        simulate(programs, measured_costs(recorded[place : place + 3 : 2], latency=latency)).makespan
        for place in range(0, 2 * num_steps, 2)
    ]
    pairs = zip(measured, predicted, strict=True)
    return {
        "predicted_ms": 1e3 * statistics.median(predicted),
        "measured_ms": 1e3 * statistics.median(measured),
        "off": [one - 1 for one in median_interval([ours / theirs for ours, theirs in pairs])],
        "latency_ms": 1e3 * latency,
    }


# In the parent.


class Job:
    """One contestant's ranks."""

    def __init__(self, sizes: Sizes, name: str, schedule: str) -> None:
        self._patience_s = FIRST_TURN_S
        self.losses: list[float] = []
        command = [__file__, "--work", json.dumps(asdict(sizes)), "--name", name, "--schedule", schedule]
        self.ranks = Ranks(command, 2, shows_errors=False)

    def turn(self, steps: int) -> tuple[float, float]:
        """Let it train; returns seconds, and CPU seconds of both ranks."""
        self.ranks.tell(str(steps))
        rows = self.ranks.answers(self._patience_s)
        self._patience_s = TURN_S
        self.losses += rows[0]["losses"]
        return max(row["wall"] for row in rows), sum(row["cpu"] for row in rows)


def measure(sizes: Sizes, name: str, rounds: int, steps: int) -> dict[str, Any]:
    """A peer's figures beside Sixfold's, or the reason why there are none."""
    schedule, facts = PEERS[name].schedule, {"peer": name, "load": os.getloadavg()[0]}
    jobs: dict[str, Job] = {}
    try:
        for side in (name, OURS):
            jobs[side] = Job(sizes, side, schedule)
            jobs[side].turn(steps)
        turns: dict[str, list[tuple[float, float]]] = {side: [] for side in jobs}
        for number in range(rounds):
            for side in list(jobs)[:: 1 if number % 2 else -1]:
                turns[side].append(jobs[side].turn(steps))
        for job in jobs.values():
            job.ranks.finish()
    except RankError as error:
        return facts | {"reason": str(error)}
    finally:
        for job in jobs.values():
            job.ranks.kill()
    pairs = list(zip(turns[name], turns[OURS], strict=True))
    return facts | {
        "speed": median_interval([theirs[0] / ours[0] for theirs, ours in pairs]),
        "cpu": median_interval([theirs[1] / ours[1] for theirs, ours in pairs]),
        "ours_ms": 1e3 / steps * statistics.median(turn[0] for turn in turns[OURS]),
        "theirs_ms": 1e3 / steps * statistics.median(turn[0] for turn in turns[name]),
        "difference": largest_difference(jobs[OURS].losses[:AGREEING_STEPS], jobs[name].losses),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = [
        "| peer | its time / Sixfold's | 95 % interval | CPU time | 95 % interval | Sixfold, ms | peer, ms "
        "| losses differ by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "reason" in row:
            continue
        cells = [row["peer"]]
        for key in ("speed", "cpu"):
            median, low, high = row[key]
            cells += [f"{median:.3f}", f"{low:.3f} to {high:.3f}"]
        verdict = "" if row["difference"] <= AGREEMENT["fp32"] else ": NOT THE SAME WORK"
        cells += [f"{row['ours_ms']:.1f}", f"{row['theirs_ms']:.1f}", f"{row['difference']:.0e}{verdict}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\nCould not run: {row['peer']}: {row['reason']}" for row in rows if "reason" in row]
    return "\n".join(lines)


def makespans(sizes: Sizes, schedules: Sequence[str]) -> list[dict[str, Any]]:
    """How far predictions are off."""
    rows = []
    for sleeps in (True, False):
        for schedule in schedules:
            job = Job(Sizes(**asdict(sizes) | {"sleeps": sleeps}), "makespan", schedule)
            try:
                found = job.ranks.answers(FIRST_TURN_S)[0]
                job.ranks.finish()
            finally:
                job.ranks.kill()
            rows.append({"stages": "sleep" if sleeps else "compute", "schedule": schedule, **found})
    return rows


def makespan_table(rows: Sequence[dict[str, Any]]) -> str:
    """The same as Markdown."""
    lines = [
        "| stages | schedule | predicted, ms | measured, ms | off by | 95 % interval |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        median, low, high = row["off"]
        lines.append(
            f"| {row['stages']} | {row['schedule']} | {row['predicted_ms']:.1f} | {row['measured_ms']:.1f} "
            f"| {median:+.1%} | {low:+.1%} to {high:+.1%} |"
        )
    return "\n".join(lines)


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def main() -> None:
    """Measure and print, or be one of the ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="at least 15 for a figure to quote")
    parser.add_argument("--steps", type=int, default=2, help="updates in one turn")
    parser.add_argument(
        "--only",
        nargs="+",
        default=["*"],
        help=f"patterns over {', '.join(PEERS)}; with --makespan over schedules",
    )
    parser.add_argument("--makespan", action="store_true", help="compare with the simulation instead")
    parser.add_argument("--tiny", action="store_true", help="small blocks, to see that it runs")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    for hidden in ("--work", "--name", "--schedule"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(Sizes(**json.loads(args.work)), args.name, args.schedule)
        return
    sizes = TINY if args.tiny else Sizes()
    if args.makespan:
        schedules = dict.fromkeys(peer.schedule for peer in PEERS.values())
        rows = makespans(sizes, [each for each in schedules if _fits(each, args.only)])
        print(makespan_table(rows))
    else:
        names = [name for name in PEERS if _fits(name, args.only)]
        rows = []
        for name in names:
            print(name, file=sys.stderr, flush=True)
            rows.append(measure(sizes, name, args.rounds, args.steps))
        print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
