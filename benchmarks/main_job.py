"""The main job's speed: `sixfold train`'s own updates against a plain DistributedDataParallel script.

    python benchmarks/main_job.py [--ranks 2] [--rounds 9] [--updates 4] [--compute bf16] [--smoke] [--json]

The script is what one writes in an hour: the same decoder of torch's own modules (linear layers, RMS norms,
fused attention, rotary positions), autocast to bf16, fp32 logits for the loss, AdamW and clipping. Both
compute in the type that `sixfold train` measures to be the faster one here; in fp32 the script goes without
autocast. Each has ranks of its own, because the engine changes malloc's settings for a whole process; they
get turns, the order changing every round, and who has none sleeps on a pipe. A turn is a few updates on the
same number of tokens of the main job's corpus, data included. Utilisation is of what the ranks' matrix
products reach when all of them multiply at once; the ratio has the 95 % interval of its median.
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

from contest import RankError, Ranks, median_interval, quit_rank

from sixfold.base.malloc import malloc_variables

OURS, PLAIN = "sixfold", "ddp"
PATIENCE_S = 600.0
"""Of a turn; the first builds the corpus where there is none."""

SMOKE = (
    "data.max_mb=0.5",
    "data.vocab_size=300",
    "data.held_out_documents=2",
    "model.width=64",
)


def naive_script(
    sizes: dict[str, int], tokens: Any, batch: int, length: int, lr: float, compute: str
) -> Callable[[], None]:
    """One update of the plain script."""
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    width, heads, kv_heads = sizes["width"], sizes["num_heads"], sizes["num_kv_heads"]
    head = width // heads
    angles = torch.outer(torch.arange(length), 10_000.0 ** (-torch.arange(0, head, 2) / head))
    cos, sin = angles.cos()[None, None], angles.sin()[None, None]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
            self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * head, bias=False)
            self.out = nn.Linear(width, width, bias=False)
            self.gate = nn.Linear(width, sizes["ffn_width"], bias=False)
            self.up = nn.Linear(width, sizes["ffn_width"], bias=False)
            self.down = nn.Linear(sizes["ffn_width"], width, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(self.attention_norm(x)).split(
                (heads * head, kv_heads * head, kv_heads * head), -1
            )
            q, k, v = (each.unflatten(-1, (-1, head)).transpose(1, 2) for each in (q, k, v))
            mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=True)
            x = x + self.out(mixed.transpose(1, 2).flatten(2))
            h = self.mlp_norm(x)
            return x + self.down(F.silu(self.gate(h)) * self.up(h))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(sizes["vocab_size"], width)
            self.layers = nn.ModuleList(Layer() for _ in range(sizes["num_layers"]))
            self.norm = nn.RMSNorm(width)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            x = self.embedding(inputs)
            for layer in self.layers:
                x = layer(x)
            return F.linear(self.norm(x), self.embedding.weight)

    model = DistributedDataParallel(Model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    draw = torch.Generator().manual_seed(torch.distributed.get_rank())

    def update() -> None:
        starts = torch.randint(len(tokens) - length - 1, (batch,), generator=draw).tolist()
        rows = torch.stack([torch.from_numpy(tokens[s : s + length + 1].astype("int64")) for s in starts])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=compute == "bf16"):
            logits = model(rows[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update


def work(options: dict[str, Any], name: str) -> None:
    """One rank of a contestant: does as many updates as a line of its input says, tells the time."""
    # Libraries print to stdout too, which is kept for the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    import torch.distributed as dist

    import sixfold
    from sixfold.config import load
    from sixfold.data.corpus import prepare
    from sixfold.models.decoder import num_flops
    from sixfold.monitor.hardware import peak_flops
    from sixfold.parallel import DTYPES
    from sixfold.plan import decide_batch
    from sixfold.train.job import RECIPE
    from sixfold.train.samples import samples_of
    from sixfold.train.subject import build_model, fields_of

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    compute = options["compute"]
    overrides = [*options["set"], f"precision.compute={compute}", "train.steps=100000"]
    config = load(recipe=RECIPE, overrides=overrides).config
    corpus, length = prepare(config.data), config.data.sequence_length
    module: Any = build_model(config, corpus.vocab_size)
    plan = decide_batch(config.batch, data_ranks=dist.get_world_size(), sequence_length=length)
    part = plan.share(dist.get_rank())
    peak = torch.tensor(peak_flops(DTYPES[compute]), dtype=torch.float64)
    dist.all_reduce(peak)
    facts = {
        "tokens": plan.size * length,
        "flops": num_flops(module.config, plan.size, length),
        "peak": float(peak),
    }
    if name == OURS:
        engine = sixfold.initialize(module, config=load(recipe=RECIPE, overrides=overrides))
        blend = samples_of(config, corpus)

        def update() -> None:
            engine.train_step(fields_of(config, corpus, blend.batch(engine.num_samples, part)))

    else:
        names = ("width", "num_layers", "num_heads", "num_kv_heads", "ffn_width")
        sizes = {each: getattr(module.config, each) for each in names} | {"vocab_size": corpus.vocab_size}
        tokens = corpus.parts[0].train
        update = naive_script(sizes, tokens, len(part), length, config.optimizer.lr, compute)
    for line in sys.stdin:
        dist.barrier()
        began = time.perf_counter()
        for _ in range(int(line)):
            update()
        dist.barrier()
        print(json.dumps({"seconds": time.perf_counter() - began, **facts}), file=answers, flush=True)
    quit_rank()


def measure(options: dict[str, Any], num_ranks: int) -> dict[str, Any]:
    """Seconds of an update in every round, by contestant, and what an update is."""
    jobs: dict[str, Ranks] = {}
    spent: dict[str, list[float]] = {OURS: [], PLAIN: []}
    facts: dict[str, Any] = {}

    def turn(name: str) -> float:
        jobs[name].tell(str(options["updates"]))
        told = jobs[name].answers(PATIENCE_S)
        facts.update(told[0])
        return max(each["seconds"] for each in told) / options["updates"]

    try:
        # One after the other: each measures what products reach while no other job runs, and warms up.
        for name in spent:
            environment = malloc_variables(os.environ) if name == OURS else {}  # as its launcher starts them
            command = [__file__, "--work", json.dumps(options), "--contestant", name]
            jobs[name] = Ranks(command, num_ranks, environment=environment)
            turn(name)
        for number in range(options["rounds"]):
            for name in list(spent)[:: 1 if number % 2 else -1]:
                spent[name].append(turn(name))
        for ranks in jobs.values():
            ranks.finish()
    except RankError as error:
        raise SystemExit(f"{error}; a rank's error stands above") from None
    finally:
        for ranks in jobs.values():
            ranks.kill()
    return {"spent": spent, **facts}


def faster_type(settings: Sequence[str]) -> str:
    """What `sixfold train` would compute in on this machine."""
    from sixfold.config import load
    from sixfold.data.tokenizer import DEFAULT_SIZE
    from sixfold.train.compute import measured_compute
    from sixfold.train.job import RECIPE
    from sixfold.train.subject import build_model

    resolved = load(recipe=RECIPE, overrides=[*settings, "launch.threads=1"])
    found = measured_compute(resolved, build_model(resolved.config, DEFAULT_SIZE)).config.precision.compute
    assert found is not None, "measured"
    return found


def figures(told: dict[str, Any]) -> dict[str, float]:
    """Medians over rounds."""
    seconds = {name: statistics.median(values) for name, values in told["spent"].items()}
    ratios = [b / a for a, b in zip(told["spent"][OURS], told["spent"][PLAIN], strict=True)]
    ratio, low, high = median_interval(ratios)
    found = {f"{name} tokens/s": told["tokens"] / value for name, value in seconds.items()}
    found |= {f"{name} utilisation": told["flops"] / value / told["peak"] for name, value in seconds.items()}
    return {**found, "ratio": ratio, "from": low, "to": high}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--updates", type=int, default=4, help="in one turn")
    parser.add_argument(
        "--compute", choices=("fp32", "bf16"), help="of both; unset: as `sixfold train` measures"
    )
    parser.add_argument("--set", action="append", default=[], help="a setting of the recipe, as for train")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Start the ranks and print, or be one of them."""
    args = parse()
    if args.work:
        work(json.loads(args.work), args.contestant)
        return
    settings = [*args.set, *(SMOKE if args.smoke else ())]
    compute = args.compute or faster_type(settings)
    options = {"rounds": args.rounds, "updates": args.updates, "set": settings, "compute": compute}
    found = figures(measure(options, args.ranks))
    if args.json:
        print(json.dumps({"compute": compute, **found}))
        return
    print(f"both compute in {compute}")
    for name, value in found.items():
        print(f"{name:<22} {value:.3f}" if value < 100 else f"{name:<22} {value:.0f}")


if __name__ == "__main__":
    main()
