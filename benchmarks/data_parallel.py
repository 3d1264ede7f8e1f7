"""Sixfold against torch's DistributedDataParallel: the same model, ranks and batches, in one command.

    python benchmarks/data_parallel.py [--ranks 2] [--rounds 30] [--model s|m] [--compute fp32|bf16]
                                       [--clip 1.0] [--zero 0|1|2] [--transport host|network] [--json]

Steps: one set of ranks (gloo, one compute thread each) holds both contestants and gives them turns of
a few updates, first one then the other, the next round the other way round; a barrier stands around
each turn, garbage collection is off. A round is one pair; the figures are medians over the pairs'
ratios with the 95 % interval that order statistics give, for wall time and for the CPU time of all
ranks together (gloo's threads included). Both see the same batches from the same weights, and the run
fails unless their losses agree.

Starts: each contestant in fresh processes of its own, alternating: seconds from the start of the
processes to the end of the first update, then the peak of the proportional set size (PSS: a page shared
by n processes counts 1/n) of all ranks together over a few further updates, torch itself included.

The peer: DDP with `gradient_as_bucket_view` and fused AdamW, its loop as torch's tutorials write it. It
returns its own rank's loss; Sixfold's update also returns the loss over all ranks and refuses gradients
that are not finite. Under `--compute bf16` the peer runs in autocast on fp32 parameters and sends fp32
gradients; Sixfold computes in bf16 parameters with fp32 master, fp32 gradients sent.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from contest import (
    AGREEING_STEPS,
    AGREEMENT,
    LR,
    SAMPLING_S,
    SIZES,
    RankError,
    Ranks,
    Step,
    batches,
    largest_difference,
    make_model,
    median_interval,
    quit_rank,
)

if TYPE_CHECKING:
    from torch import Tensor

SIXFOLD, DDP = "sixfold", "ddp"
PATIENCE_S = 600.0


@dataclass(frozen=True)
class Setup:
    """What is measured.

    Args:
        steps: updates in one turn.
        starts: pairs of fresh starts.
        clip: bound on the gradient norm for both, None for neither.
        zero: Sixfold's residency preset.
        transport: Sixfold's transport, None for its own choice.
    """

    ranks: int
    rounds: int
    steps: int
    starts: int
    model: str
    compute: str
    clip: float | None
    zero: int = 0
    transport: str | None = None


# In the ranks: torch is imported there only, so that its import counts in the time to the first step.


def sixfold_step(setup: Setup) -> Step:
    """Sixfold as a user's script has it."""
    import sixfold

    config = {
        "layout": {"zero": setup.zero, **({"transport": setup.transport} if setup.transport else {})},
        "precision": {"compute": setup.compute},
        "optimizer": {"name": "adamw", "lr": LR, **({"clip_norm": setup.clip} if setup.clip else {})},
    }
    return sixfold.initialize(make_model(setup.model), config=config).train_step


def ddp_step(setup: Setup) -> Step:
    """DDP as a user's script has it."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(make_model(setup.model), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def step(tokens: Tensor) -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=setup.compute == "bf16"):
            total, weight = model(tokens)
        loss = total / weight
        loss.backward()
        if setup.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), setup.clip)
        optimizer.step()
        return float(loss.item())

    return step


CONTESTANTS: dict[str, Callable[[Setup], Step]] = {SIXFOLD: sixfold_step, DDP: ddp_step}


def run_steps(setup: Setup, rank: int) -> dict[str, Any]:
    """Alternate turns of both contestants; returns turns by contestant and the losses' difference.

    A turn is (wall seconds, CPU seconds of all ranks).
    """
    import torch.distributed as dist

    contestants = {name: make(setup) for name, make in CONTESTANTS.items()}
    feeds = {name: batches(setup.model, rank) for name in contestants}
    losses: dict[str, list[float]] = {name: [] for name in contestants}
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    gc.collect()
    gc.disable()
    for number in range(-1, setup.rounds):  # round -1 warms up
        for name in list(contestants)[:: 1 if number % 2 else -1]:
            tokens = [next(feeds[name]) for _ in range(setup.steps)]
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            losses[name] += [contestants[name](each) for each in tokens]
            dist.barrier()
            turn = time.perf_counter() - wall, _sum(time.process_time() - cpu)[0]
            turns[name] += [turn] if number >= 0 else []
    ours = losses[SIXFOLD][:AGREEING_STEPS]
    theirs = [loss / setup.ranks for loss in _sum(*losses[DDP][:AGREEING_STEPS])]
    return {
        "turns": turns,
        "losses": (ours[0], ours[-1]),
        "difference": largest_difference(ours, theirs),
    }


def run_start(setup: Setup, rank: int, contestant: str) -> None:
    """Report the end of the first update on stdout, then update while the parent samples memory."""
    import torch.distributed as dist

    step, feed = CONTESTANTS[contestant](setup), batches(setup.model, rank)
    step(next(feed))
    dist.barrier()
    print(json.dumps({"first_step": time.monotonic()}), flush=True)
    for _ in range(max(4, setup.steps)):
        step(next(feed))


def work(setup: Setup, contestant: str) -> None:
    """One rank, from its environment variables; `contestant` is one to start, or "both"."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if contestant in CONTESTANTS:
        run_start(setup, rank, contestant)
    else:
        print(json.dumps(run_steps(setup, rank)), flush=True)
    quit_rank()


def _sum(*numbers: float) -> list[float]:
    import torch
    import torch.distributed as dist

    tensor = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(tensor)
    return [float(number) for number in tensor]


# In the parent: start ranks, sample memory, reduce figures.


def start_ranks(setup: Setup, contestant: str) -> Ranks:
    """Start this file once per rank."""
    return Ranks([__file__, "--work", json.dumps(asdict(setup)), "--contestant", contestant], setup.ranks)


def measure_steps(setup: Setup) -> dict[str, Any]:
    """The result of `run_steps`."""
    ranks = start_ranks(setup, "both")
    result: dict[str, Any] = ranks.answers(setup.rounds * PATIENCE_S)[0]
    ranks.finish()
    return result


def measure_start(setup: Setup, contestant: str) -> tuple[float, float]:
    """(seconds to the end of the first update, peak PSS in MB of all ranks together)."""
    began = time.monotonic()
    ranks = start_ranks(setup, contestant)
    seconds = max(answer["first_step"] for answer in ranks.answers(PATIENCE_S)) - began
    peak = 0.0
    while all(process.poll() is None for process in ranks.processes):
        peak = max(peak, ranks.pss_mb())
        time.sleep(SAMPLING_S)
    ranks.finish()
    return seconds, peak


def compare(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Medians of both contestants and of the ratio peer / Sixfold: above 1 Sixfold needs less."""
    ours, theirs = zip(*pairs, strict=True)
    ratio, low, high = median_interval([b / a for a, b in pairs])
    return {
        SIXFOLD: statistics.median(ours),
        DDP: statistics.median(theirs),
        "ratio": ratio,
        "interval": (low, high),
    }


def measure(setup: Setup) -> dict[str, Any]:
    """All figures of one setup."""
    steps = measure_steps(setup)
    pairs = list(zip(steps["turns"][SIXFOLD], steps["turns"][DDP], strict=True))
    starts: dict[str, list[tuple[float, float]]] = {SIXFOLD: [], DDP: []}
    for number in range(setup.starts):
        for name in list(starts)[:: 1 if number % 2 else -1]:
            starts[name].append(measure_start(setup, name))
    fresh = list(zip(starts[SIXFOLD], starts[DDP], strict=True))
    sizes = SIZES[setup.model]
    tokens = setup.ranks * setup.steps * sizes["batch"] * sizes["length"]
    wall = compare([(ours[0], theirs[0]) for ours, theirs in pairs])
    figures: dict[str, Any] = {
        "setup": asdict(setup),
        "step_ms": _scaled(wall, 1e3 / setup.steps),
        "cpu_ms": _scaled(compare([(ours[1], theirs[1]) for ours, theirs in pairs]), 1e3 / setup.steps),
        "tokens_per_s": {**wall, SIXFOLD: tokens / wall[SIXFOLD], DDP: tokens / wall[DDP]},
        "losses": steps["losses"],
        "difference": steps["difference"],
    }
    if fresh:
        figures["first_step_s"] = compare([(ours[0], theirs[0]) for ours, theirs in fresh])
        figures["peak_pss_mb"] = compare([(ours[1], theirs[1]) for ours, theirs in fresh])
    return figures


def _scaled(row: dict[str, Any], factor: float) -> dict[str, Any]:
    return {**row, SIXFOLD: row[SIXFOLD] * factor, DDP: row[DDP] * factor}


ROWS = {
    "step_ms": "step, wall time, ms",
    "cpu_ms": "step, CPU time of all ranks, ms",
    "tokens_per_s": "tokens/s",
    "first_step_s": "start to first step, s",
    "peak_pss_mb": "peak memory (PSS of all ranks), MB",
}


def table(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    setup = Setup(**figures["setup"])
    first, last = figures["losses"]
    lines = [
        f"model {setup.model}, {setup.compute}, {setup.ranks} ranks, clip {setup.clip}, zero {setup.zero}, "
        f"transport {setup.transport or 'chosen'}: "
        f"{setup.rounds} rounds of {setup.steps} + {setup.steps} steps, {setup.starts} pairs of starts",
        f"losses {first:.5f} -> {last:.5f}, largest relative difference {figures['difference']:.1e}",
        "",
        "| | Sixfold | DDP | ratio, above 1: better than DDP | 95 % interval |",
        "|---|---|---|---|---|",
    ]
    for key, title in ROWS.items():
        if row := figures.get(key):
            low, high = row["interval"]
            cells = (
                f"{row[SIXFOLD]:.4g}",
                f"{row[DDP]:.4g}",
                f"{row['ratio']:.3f}",
                f"{low:.3f} to {high:.3f}",
            )
            lines.append(f"| {' | '.join((title, *cells))} |")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--rounds", type=int, default=30, help="pairs of turns; at least 15 for a figure to quote"
    )
    parser.add_argument("--steps", type=int, default=2, help="updates in one turn")
    parser.add_argument("--starts", type=int, default=5, help="pairs of fresh starts")
    parser.add_argument("--model", choices=("s", "m"), default="s")
    parser.add_argument("--compute", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--clip", type=float, help="clip the gradient norm to this in both; default: neither")
    parser.add_argument("--zero", type=int, default=0, help="Sixfold's layout.zero")
    parser.add_argument("--transport", choices=("host", "network"), help="Sixfold's layout.transport")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and one start: does it run?")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print, or be one of the ranks."""
    args = parse()
    if args.work:
        work(Setup(**json.loads(args.work)), args.contestant)
        return
    setup = Setup(
        ranks=args.ranks,
        rounds=args.rounds,
        steps=args.steps,
        starts=1 if args.smoke else args.starts,
        model="tiny" if args.smoke else args.model,
        compute=args.compute,
        clip=args.clip,
        zero=args.zero,
        transport=args.transport,
    )
    try:
        figures = measure(setup)
    except RankError as error:
        raise SystemExit(str(error)) from error
    print(json.dumps(figures) if args.json else table(figures))
    if figures["difference"] > AGREEMENT[setup.compute]:
        raise SystemExit(
            f"the losses differ by {figures['difference']:.1e}, more than {AGREEMENT[setup.compute]:.0e}: "
            "the contestants did not do the same work, so the figures do not compare"
        )


if __name__ == "__main__":
    main()
