"""One layer of causal attention over a sequence that is cut over all ranks: ours against DeepSpeed's.

Run by `axes.py`. A turn begins and ends at [1, own rows, heads, width], as projections give and take it,
forward and backward in fp32. What all contestants computed is compared before they are timed.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sixfold.mesh import Mesh
from sixfold.parallel.context.attention import ContextAttention
from sixfold.parallel.context.spans import Sequences, cut_rows
from sixfold.plan import Geometry, attention_traffic
from sixfold.testing.exchanges import noted_exchanges

LENGTH, HEADS, WIDTH = 2048, 8, 64
KV_HEADS = {"8 on 2 heads": 2, "8 on 1 head": 1}
"""Of two ranks, the first exchange heads, and the second pass keys round."""
AGREEMENT = 1e-4

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
_facts: dict[str, Any] = {}


def facts() -> dict[str, Any]:
    """What was sent in one turn, counted by the dispatcher, and the formula."""
    return _facts


def contestants(rank: int, num_ranks: int) -> dict[str, Callable[[], None] | str]:
    made: dict[str, Callable[[], None] | str] = {}
    for label, kv_heads in KV_HEADS.items():
        torch.manual_seed(0)
        wholes = [torch.randn(1, LENGTH, num, WIDTH) for num in (HEADS, kv_heads, kv_heads, HEADS)]
        expected: Tensor | None = None
        for name in ("sixfold, host", "sixfold, network", "DeepSpeed"):
            try:
                layer, parts = make(name, rank, num_ranks, wholes)
                if name == "sixfold, host":
                    count(label, layer, parts, num_ranks, kv_heads)
                found = summed(turn(layer, parts))
                expected = found if expected is None else expected
                far = float((found - expected).abs().max() / expected.abs().max())
                made[f"{name}, {label}"] = (
                    turn_of(layer, parts) if far < AGREEMENT else f"is off by {far:.1e}"
                )
            except Exception as error:
                made[f"{name}, {label}"] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
    return made


def make(name: str, rank: int, num_ranks: int, wholes: list[Tensor]) -> tuple[Layer, list[Tensor]]:
    """A layer, and this rank's query, key, value and gradient."""
    if name == "DeepSpeed":
        rows = LENGTH // num_ranks
        return deepspeed(), [each[:, rank * rows : (rank + 1) * rows].contiguous() for each in wholes]
    geometry = Geometry((("pipe", 1), ("data", 1), ("context", num_ranks), ("tensor", 1)), num_ranks)
    mesh = Mesh(geometry, rank, torch.device("cpu"))
    mesh = mesh.sharing(name.split()[-1], exchange_bytes=2**28, timeout_s=60)
    attention = ContextAttention(mesh.along("context"))
    attention.sequences = Sequences(LENGTH)
    return by_heads(attention), [cut_rows(each, attention.spans, 1) for each in wholes]


def by_heads(attend: Callable[..., Tensor]) -> Layer:
    def layer(*given: Tensor) -> Tensor:
        turned = [each.transpose(1, 2) for each in given]
        return attend(*turned, is_causal=True, enable_gqa=True).transpose(1, 2).contiguous()

    return layer


def deepspeed() -> Layer:
    logging.disable(logging.INFO)
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed
        from deepspeed.sequence.layer import DistributedAttention

        deepspeed.init_distributed("gloo")
    whole = by_heads(F.scaled_dot_product_attention)
    layer = DistributedAttention(whole, dist.group.WORLD, scatter_idx=2, gather_idx=1)
    return lambda query, key, value: layer(query, key, value, 0)  # type: ignore[no-any-return]


def turn(layer: Layer, parts: list[Tensor]) -> list[Tensor]:
    *given, gradient = parts
    leaves = [each.detach().requires_grad_() for each in given]
    output = layer(*leaves)
    return [output.detach() * gradient, *torch.autograd.grad(output, leaves, gradient)]


def turn_of(layer: Layer, parts: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        turn(layer, parts)

    return run


def summed(found: list[Tensor]) -> Tensor:
    """Sums over heads, positions and ranks: contestants cut sequences at different places."""
    sums = torch.cat([each.double().sum((0, 1)).flatten() for each in found])
    dist.all_reduce(sums)
    return sums


def count(label: str, layer: Layer, parts: list[Tensor], num_ranks: int, kv_heads: int) -> None:
    """Tell what rank 0 sends in a turn, and what the plan says."""
    with noted_exchanges() as topics:
        turn(layer, parts)
    priced = attention_traffic(
        num_ranks,
        samples=1,
        length=LENGTH,
        heads=HEADS,
        kv_heads=kv_heads,
        head_width=WIDTH,
        item_bytes=4,
    )
    _facts[f"bytes sent in a turn, {label}"] = sum(topic.num_bytes for topic in topics)
    _facts[f"formula, {label}"] = priced.forward + priced.backward
