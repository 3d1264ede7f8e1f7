"""The axes that cut a model, against peers that have the axis, on ranks of one machine.

    python benchmarks/axes.py [--only context] [--ranks 2] [--rounds 15] [--json]

One set of ranks (gloo, one compute thread each) holds every contestant of a case and gives them turns, first
one then the other, the next round the other way round, with a barrier around each turn; what they compute is
compared first. Ratios are medians over rounds of a peer's time by Sixfold's in the same round. A section is a
function that yields cases; a peer that cannot run is listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from contest import run_ranks

if TYPE_CHECKING:
    from torch import Tensor

OWN = "sixfold"
AGREEMENT = 1e-4
"""Largest relative difference between contestants, in fp32."""

Call = Callable[[], "Sequence[Tensor]"]
"""One piece of work, forward and backward; returns what contestants have to agree in."""


@dataclass
class Case:
    """Contestants that do the same.

    Args:
        label: what they do.
        calls: by contestant, those of Sixfold beginning with OWN.
        missing: peers that cannot run, with the reason.
        sent: bytes that one rank of Sixfold sends in a call, by formula; 0: not known.
    """

    label: str
    calls: dict[str, Call]
    missing: dict[str, str] = field(default_factory=dict)
    sent: int = 0


# The context axis: attention over a sequence that is cut, against all-to-all over heads.

ATTENTION = (
    ("2048 tokens, 8 heads", 2048, 8, 8),
    ("2048 tokens, 8 heads on 2", 2048, 8, 2),
    ("2048 tokens, 8 heads on 1", 2048, 8, 1),
)


def context(mesh: Any) -> Iterator[Case]:
    """One layer of causal attention, from and to [1, rows, heads, 64] on each rank."""
    import torch
    import torch.nn.functional as F

    from sixfold.parallel.context.attention import ContextAttention
    from sixfold.parallel.context.spans import Sequences, cut_rows
    from sixfold.plan import attention_traffic

    group, ranks = mesh.along("context"), mesh.geometry.degree("context")
    for label, length, heads, kv_heads in ATTENTION:
        torch.manual_seed(0)
        wholes = [torch.randn(1, length, num, 64) for num in (heads, kv_heads, kv_heads, heads)]
        attention = ContextAttention(group)
        attention.sequences = Sequences(length)

        def own(attention: Any = attention, wholes: list[Any] = wholes) -> Sequence[Tensor]:
            query, key, value, gradient = (cut_rows(whole, attention.spans, 1) for whole in wholes)
            leaves = [each.requires_grad_() for each in (query, key, value)]
            by_head = [each.transpose(1, 2) for each in leaves]
            output = attention(*by_head, is_causal=True, enable_gqa=True).transpose(1, 2)
            return [(output * gradient).sum(), *torch.autograd.grad(output, leaves, gradient)]

        def alone(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            by_head = [each.transpose(1, 2) for each in (query, key, value)]
            mixed = F.scaled_dot_product_attention(*by_head, is_causal=True, enable_gqa=True)
            return mixed.transpose(1, 2).contiguous()

        case = Case(label, {OWN: own})
        priced = attention_traffic(
            ranks,
            samples=1,
            length=length,
            heads=heads,
            kv_heads=kv_heads,
            head_width=64,
            item_bytes=4,
        )
        case.sent = priced.forward + priced.backward
        try:
            case.calls["deepspeed"] = _deepspeed_attention(alone, wholes, group.place, ranks)
        except (ImportError, RuntimeError, AssertionError) as error:
            case.missing["deepspeed"] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        yield case


def _deepspeed_attention(alone: Any, wholes: list[Any], place: int, ranks: int) -> Call:
    import deepspeed
    import torch
    import torch.distributed as dist
    from deepspeed.sequence.layer import DistributedAttention

    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    layer = DistributedAttention(alone, dist.group.WORLD, scatter_idx=2, gather_idx=1)
    rows = wholes[0].shape[1] // ranks

    def call() -> Sequence[Tensor]:
        query, key, value, gradient = (whole[:, place * rows : (place + 1) * rows] for whole in wholes)
        leaves = [each.contiguous().requires_grad_() for each in (query, key, value)]
        output = layer(*leaves, 0)
        return [(output * gradient).sum(), *torch.autograd.grad(output, leaves, gradient)]

    call()  # what it cannot do is told here
    return call


SECTIONS: Mapping[str, Callable[[Any], Iterator[Case]]] = {"context": context}
"""By axis; each is given a mesh whose ranks all stand along it."""


# In the ranks.


def work(options: dict[str, Any]) -> None:
    """One rank."""
    import torch
    import torch.distributed as dist

    from sixfold.mesh import Mesh
    from sixfold.plan import Geometry

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks, rank = dist.get_world_size(), dist.get_rank()
    rows = []
    for axis in options["only"]:
        geometry = Geometry((("data", 1), (axis, ranks)), ranks)
        meshes = {
            "": Mesh(geometry, rank, torch.device("cpu")).sharing("host", exchange_bytes=0, timeout_s=60.0),
            " over gloo": Mesh(geometry, rank, torch.device("cpu")),
        }
        cases = [list(SECTIONS[axis](mesh)) for mesh in meshes.values()]
        for together in zip(*cases, strict=True):
            first = together[0]
            for suffix, case in zip(list(meshes)[1:], together[1:], strict=True):
                first.calls[OWN + suffix] = case.calls[OWN]
            row = measure(first, options["rounds"])
            rows.append(
                {"axis": axis, "case": first.label, "missing": first.missing, "sent": first.sent, **row}
            )
    if rank == 0:
        print(json.dumps(rows), flush=True)
    sys.stdout.flush()
    os._exit(0)


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Median ms of every contestant, and of the peers' times by Sixfold's."""
    import torch
    import torch.distributed as dist

    def results(name: str) -> Tensor:
        # Contestants cut sequences at different places, so what is compared are sums over all ranks.
        found = torch.stack([each.detach().double().sum() for each in case.calls[name]()])
        dist.all_reduce(found)
        return found

    expected = results(OWN)
    for name in case.calls:
        far = float((results(name) - expected).abs().max() / expected.abs().max())
        if far > AGREEMENT:
            raise SystemExit(f"{case.label}: {name} differs from {OWN} by {far:.1e}")
    spent: dict[str, list[float]] = {name: [] for name in case.calls}
    names = list(case.calls)
    for number in range(-1, rounds):
        for name in names[:: 1 if number % 2 else -1]:
            dist.barrier()
            began = time.perf_counter()
            case.calls[name]()
            dist.barrier()
            if number >= 0:
                spent[name].append((time.perf_counter() - began) * 1e3)
    ratios = {
        name: statistics.median(theirs / own for theirs, own in zip(times, spent[OWN], strict=True))
        for name, times in spent.items()
    }
    return {"ms": {name: statistics.median(times) for name, times in spent.items()}, "ratio": ratios}


# In the parent.


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The figures as a Markdown table."""
    lines = ["| axis | case | contestant | ms | its time by Sixfold's |", "|---|---|---|---|---|"]
    for row in rows:
        for name, spent in row["ms"].items():
            lines.append(
                f"| {row['axis']} | {row['case']} | {name} | {spent:.2f} | {row['ratio'][name]:.2f} |"
            )
        for name, reason in row["missing"].items():
            lines.append(f"| {row['axis']} | {row['case']} | {name} | - | {reason} |")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Start the ranks and print, or be one of them."""
    args = parse()
    if args.work:
        work(json.loads(args.work))
        return
    rows = run_ranks([__file__, "--work", json.dumps({"only": args.only, "rounds": args.rounds})], args.ranks)
    print(json.dumps(rows) if args.json else table(rows))


if __name__ == "__main__":
    main()
