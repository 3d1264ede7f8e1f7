"""Sixfold's residencies against torch's, DeepSpeed's and FairScale's: who trains how fast in how much memory.

    python benchmarks/zero.py [--models s m] [--dtype fp32 bf16] [--only 'sixfold*' deepspeed-3] [--rounds 15]
                              [--steps 2] [--json FILE]

One competitor at a time stands beside a job of torch's DistributedDataParallel: two jobs of two ranks
(gloo, one thread each), every one in processes of its own. They get turns of a few updates; who has no turn
sleeps on a pipe and takes no time from the other. The order changes every round, garbage collection is off,
and barriers inside the job stand around the clock. A speed is DDP's time of a round divided by the
competitor's, the figure the median over the rounds with the 95 % interval of order statistics; beside it
the same for the CPU time of all ranks, gloo's threads included. Then DDP ends, and memory is the largest
proportional set size (PSS) of the competitor's ranks during some more updates, per rank: the interpreter
and torch's code are in it. Sent bytes are what the kernel counts on the ranks' TCP connections, so what
goes through shared memory is not in it.

The losses of the first updates must be those of DDP (see `contest.AGREEMENT`), or the row says that they
are not. Who cannot run is listed with the reason. `competitors.py` says how each is set up.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import os
import socket
import statistics
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from competitors import COMPETITORS, DDP, Task
from contest import (
    AGREEING_STEPS,
    AGREEMENT,
    SAMPLING_S,
    RankError,
    Ranks,
    batches,
    largest_difference,
    median_interval,
    quit_rank,
)
from targets import judge

FIRST_TURN_S, TURN_S = 1200.0, 300.0
"""Patience: DeepSpeed compiles for minutes when it runs for the first time."""
_TCP_BYTES_ACKED = 120
"""Offset of tcpi_bytes_acked in Linux's struct tcp_info."""


@dataclass(frozen=True)
class Setup:
    """What one pair of jobs does.

    Args:
        steps: updates in one turn.
        memory_steps: updates during which memory is sampled.
    """

    task: Task
    ranks: int
    backend: str
    rounds: int
    steps: int
    memory_steps: int


# In the ranks.


def work(setup: Setup, name: str) -> None:
    """One rank: trains as many updates as each line of its input says, and answers with what they took."""
    # Libraries print to stdout too, which is kept for the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    import torch.distributed as dist

    competitor, rank, task = COMPETITORS[name], int(os.environ["RANK"]), setup.task
    torch.set_num_threads(1)
    on_gpu = task.device == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if competitor.is_alone:
        for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[key]
    else:
        dist.init_process_group(setup.backend)

    def together() -> None:
        if on_gpu:
            torch.cuda.synchronize()
        if not competitor.is_alone:
            dist.barrier()

    step, feed = competitor.build(task), batches(task.size, rank, task.device)
    for line in sys.stdin:
        tokens = [next(feed) for _ in range(int(line))]
        together()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        sent, wall, cpu = sent_bytes(), time.perf_counter(), time.process_time()
        losses = [step(each) for each in tokens]
        together()
        answer = {
            "wall": time.perf_counter() - wall,
            "cpu": time.process_time() - cpu,
            "sent": sent_bytes() - sent,
            "losses": losses,
            "device_mb": torch.cuda.max_memory_allocated() / 1e6 if on_gpu else None,
        }
        # Before the answer, which lets the other job begin: its turn would pay for this.
        gc.collect()
        gc.disable()
        print(json.dumps(answer), file=answers, flush=True)
    quit_rank()


def sent_bytes() -> int:
    """What this process has sent over TCP connections that are still open."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not os.readlink(entry).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            total += struct.unpack_from("Q", info, _TCP_BYTES_ACKED)[0]
        except OSError:
            continue  # not TCP, or closed meanwhile
    return total


# In the parent.


@dataclass(frozen=True)
class Turn:
    """What some updates took: seconds, CPU seconds and sent bytes of all ranks, and the mean losses."""

    wall: float
    cpu: float
    sent: int
    losses: list[float]
    device_mb: float | None


class Job:
    """One competitor's ranks."""

    def __init__(self, setup: Setup, name: str) -> None:
        on_cpu = setup.task.device == "cpu"
        self._patience_s = FIRST_TURN_S
        self.losses: list[float] = []
        self.ranks = Ranks(
            [__file__, "--work", json.dumps(asdict(setup)), "--competitor", name],
            setup.ranks,
            environment=COMPETITORS[name].cpu_environment if on_cpu else None,
            shows_errors=False,
        )

    def turn(self, steps: int) -> Turn:
        """Let it train."""
        self.ranks.tell(str(steps))
        return self._answer()

    def _answer(self) -> Turn:
        rows = self.ranks.answers(self._patience_s)
        self._patience_s = TURN_S
        losses = [statistics.fmean(each) for each in zip(*(row["losses"] for row in rows), strict=True)]
        self.losses += losses
        return Turn(
            wall=max(row["wall"] for row in rows),
            cpu=sum(row["cpu"] for row in rows),
            sent=sum(row["sent"] for row in rows),
            losses=losses,
            device_mb=max(row["device_mb"] for row in rows) if rows[0]["device_mb"] else None,
        )

    def peak_mb(self, steps: int) -> float:
        """Train, and return the largest memory per rank that was seen."""
        self.ranks.tell(str(steps))
        peak = 0.0
        while not self.ranks.has_answer():
            peak = max(peak, self.ranks.pss_mb())
            time.sleep(SAMPLING_S)
        turn = self._answer()
        return turn.device_mb or peak / len(self.ranks.processes)


def measure(setup: Setup, name: str) -> dict[str, Any]:
    """A competitor's figures, or the reason why there are none."""
    facts = {"competitor": name, "load": os.getloadavg()[0], **asdict(setup)}
    jobs: dict[str, Job] = {}
    try:
        # The competitor first: one that cannot run costs no time of DDP's.
        for side in ("theirs", "ddp"):
            jobs[side] = Job(setup, name if side == "theirs" else DDP)
            jobs[side].turn(setup.steps)
        rounds: dict[str, list[Turn]] = {side: [] for side in jobs}
        for number in range(setup.rounds):
            for side in list(jobs)[:: 1 if number % 2 else -1]:
                rounds[side].append(jobs[side].turn(setup.steps))
        jobs["ddp"].ranks.finish()
        peak = jobs["theirs"].peak_mb(setup.memory_steps)
        jobs["theirs"].ranks.finish()
    except RankError as error:
        return facts | {"reason": str(error)}
    finally:
        for job in jobs.values():
            job.ranks.kill()
    compared = 1 if COMPETITORS[name].is_alone else AGREEING_STEPS
    pairs = list(zip(rounds["ddp"], rounds["theirs"], strict=True))
    return facts | {
        "speed": median_interval([ddp.wall / theirs.wall for ddp, theirs in pairs]),
        "cpu": median_interval([ddp.cpu / theirs.cpu for ddp, theirs in pairs]),
        "step_ms": 1e3 / setup.steps * statistics.median(turn.wall for turn in rounds["theirs"]),
        "ddp_ms": 1e3 / setup.steps * statistics.median(turn.wall for turn in rounds["ddp"]),
        "peak_mb": peak,
        "sent_mb": statistics.median(turn.sent for turn in rounds["theirs"])
        / 1e6
        / setup.steps
        / setup.ranks,
        "difference": largest_difference(jobs["theirs"].losses[:compared], jobs["ddp"].losses),
        "num_compared": min(compared, len(jobs["ddp"].losses)),
    }


def agrees(row: dict[str, Any]) -> bool:
    """Whether it did the same work as DDP."""
    return bool(row["difference"] <= AGREEMENT[row["task"]["dtype"]])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The figures of one model and type as Markdown."""
    first = rows[0]
    task = Task(**first["task"])
    lines = [
        f"## Model {task.size}, {task.dtype}, {first['ranks']} rank(s) on {task.device}, {first['backend']}",
        "",
        f"{first['rounds']} rounds of {first['steps']} + {first['steps']} updates; load of the machine when "
        f"pairs began {min(row['load'] for row in rows):.1f} to {max(row['load'] for row in rows):.1f}. "
        "Speed and CPU time relative to DDP: above 1 is better than DDP.",
        "",
        "| | speed | 95 % interval | CPU time | 95 % interval | update, ms | DDP's, ms | peak, MB a rank "
        "| sent, MB a rank and update | losses differ by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "reason" in row:
            continue
        cells = [row["competitor"]]
        for key in ("speed", "cpu"):
            median, low, high = row[key]
            cells += [f"{median:.3f}", f"{low:.3f} to {high:.3f}"]
        cells += [f"{row['step_ms']:.1f}", f"{row['ddp_ms']:.1f}", f"{row['peak_mb']:.0f}"]
        verdict = "" if agrees(row) else ": NOT THE SAME WORK"
        cells += [f"{row['sent_mb']:.2f}", f"{row['difference']:.0e} ({row['num_compared']}){verdict}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\nCould not run: {row['competitor']}: {row['reason']}" for row in rows if "reason" in row]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=("s", "m", "tiny"), default=["s", "m"])
    parser.add_argument("--dtype", nargs="+", choices=tuple(AGREEMENT), default=list(AGREEMENT))
    parser.add_argument("--only", nargs="+", default=["*"], help=f"patterns over {', '.join(COMPETITORS)}")
    parser.add_argument("--rounds", type=int, default=15, help="at least 15 for a figure to quote")
    parser.add_argument("--steps", type=int, default=2, help="updates in one turn")
    parser.add_argument("--memory-steps", type=int, default=6, help="updates during which memory is sampled")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="gloo")
    parser.add_argument("--json", type=Path, help="also write the figures here, after every pair")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--competitor", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, results: list[dict[str, Any]] | None = None) -> None:
    """Measure and print, or be one of the ranks; `results` are added to."""
    results = [] if results is None else results
    args = parse(arguments)
    if args.work:
        given = json.loads(args.work)
        work(Setup(**given | {"task": Task(**given["task"])}), args.competitor)
        return
    names = [name for name in COMPETITORS if any(fnmatch.fnmatch(name, only) for only in args.only)]
    for size in args.models:
        for dtype in args.dtype:
            task = Task(size, dtype, args.device)
            setup = Setup(task, args.ranks, args.backend, args.rounds, args.steps, args.memory_steps)
            rows = []
            for name in names:
                print(f"{size} {dtype} {name}", file=sys.stderr, flush=True)
                rows.append(measure(setup, name))
                results.append(rows[-1])
                if args.json:
                    args.json.write_text(json.dumps(results, indent=1))
            print(table(rows), judge(rows), sep="\n\n", end="\n\n", flush=True)
    ours = [row for row in results if row["competitor"].startswith("sixfold")]
    if any("difference" in row and not agrees(row) for row in ours):
        raise SystemExit("Sixfold's losses are not those of DDP")


if __name__ == "__main__":
    main()
