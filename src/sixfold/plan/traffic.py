"""Bytes that one rank sends: gradients to their sums, weights on their way back, tokens to experts.

Asked by whoever chooses a layout, and held by tests against what is really sent. Gathers of cut parameters
during forward and backward, and messages of a few numbers, are not counted here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from sixfold.base.units import bytes_text, item_bytes
from sixfold.plan.geometry import Geometry
from sixfold.plan.plan import Plan
from sixfold.plan.residency import ALL

COUNT_BYTES = 8
"""Of the number of tokens that come to one expert."""
SUM_BYTES = 4
"""Of a number of the narrowest type in which gradients of keys and values are summed, fp32."""


@dataclass(frozen=True)
class Traffic:
    """Bytes sent by one rank in one update.

    Args:
        reduce: gradients, in the reduce type. Where they stay whole, those of a ring all-reduce.
        publish: updated parameters, in the compute type.
    """

    reduce: int
    publish: int

    @property
    def total(self) -> int:
        """Both."""
        return self.reduce + self.publish

    def __str__(self) -> str:
        return f"reduce {bytes_text(self.reduce)}, publish {bytes_text(self.publish)}"


def update_traffic(plan: Plan, num_micro: int) -> Traffic:
    """What each rank sends in an update of `num_micro` micro-batches (those of the longest share).

    A reduce-scatter or all-gather among n ranks sends (n - 1) / n of its buffer, an all-reduce twice that.
    """
    row, geometry = plan.residency, plan.geometry
    reduce = publish = 0
    for unit in plan.units:
        types = plan.precision_of(unit)
        if not unit.trainable or types is None:
            continue
        sizes = {axis: geometry.num_parts((axis,), unit.cut) for axis in ALL}
        shard = sizes["shard"]
        if row.optimizer:
            share = unit.numel // shard
            across = _others(share, sizes["data"]) * (1 if "data" in row.optimizer else 2)
            sent = _others(unit.numel, shard) + across
        else:
            sent = 2 * _others(unit.numel, shard * sizes["data"])
        reduce += item_bytes(types.reduce) * sent * (max(1, num_micro) if row.reduces_each else 1)
        own = unit.numel // geometry.num_parts(row.optimizer, unit.cut)
        for axis in unit.partial:
            reduce += item_bytes(types.grad) * 2 * _others(own, geometry.degree(axis))
        part = unit.numel // geometry.num_parts(row.parameters, unit.cut)
        for axis in (axis for axis in row.optimizer if axis not in row.parameters):
            publish += item_bytes(types.compute) * _others(part, sizes[axis])
            part //= sizes[axis]
    return Traffic(reduce, publish)


@dataclass(frozen=True)
class AttentionTraffic:
    """Bytes sent by one rank of the context axis in one layer of attention."""

    forward: int
    backward: int


def attention_traffic(
    context: int,
    *,
    samples: int,
    length: int,
    heads: int,
    kv_heads: int,
    head_width: int,
    item_bytes: int,
) -> AttentionTraffic:
    """What each of `context` ranks sends for sequences that are cut over them evenly.

    h = gcd(context, kv_heads) neighbours send (h - 1) / h of queries, keys, values and outputs; each of the
    context / h - 1 steps of the ring sends keys and values, and in backward sums of their gradients, too, in
    fp32 at least.

    Args:
        samples, length: of a micro-batch.
        heads, kv_heads, head_width: of the layer on this rank.
        item_bytes: of the compute type.
    """
    swapped = gcd(context, kv_heads)
    row = samples * length // context * head_width
    exchanged = row * (2 * heads + 2 * kv_heads) * (swapped - 1) // swapped * item_bytes
    passed_on = row * 2 * kv_heads * (context // swapped - 1)
    return AttentionTraffic(
        forward=exchanged + passed_on * item_bytes,
        backward=exchanged + passed_on * (item_bytes + max(item_bytes, SUM_BYTES)),
    )


def layer_traffic(tensor: int, *, tokens: int, width: int, item_bytes: int) -> int:
    """What each of `tensor` ranks sends for a pair of layers cut over them, forward and backward together.

    An all-reduce of the activations in each direction; under sequence parallelism an all-gather and a
    reduce-scatter in each, which together send the same. An embedding and the head behind the last block are
    such a pair, too.

    Args:
        tokens: of a micro-batch.
        width: numbers of a token between the pairs.
        item_bytes: of the compute type.

    Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models".
    """
    return 2 * 2 * _others(tokens * width, tensor) * item_bytes


def scores_traffic(tensor: int, *, tokens: int, item_bytes: int) -> int:
    """What each of `tensor` ranks sends for the loss over a vocabulary cut over them: three numbers a token
    to each of the others.

    Args:
        item_bytes: of the type in which the loss is computed.
    """
    return _others(tensor * 3 * tokens, tensor) * item_bytes


def dispatch_traffic(
    geometry: Geometry,
    *,
    choices: int,
    num_experts: int,
    width: int,
    dtype: str,
    num_forwards: int = 1,
    num_backwards: int = 1,
) -> int:
    """What each rank sends to experts of others in one layer for one micro-batch, where load is even.

    Every choice that falls on another rank goes there and back, forward and backward; how many come is told
    before each forward.

    Args:
        choices: of experts, by all tokens of the micro-batch together, that find room.
        width: numbers of a token, of type `dtype`.
        num_forwards: 2 where the layer is recomputed.
    """
    ranks = geometry.degree("expert")
    rows = 2 * _others(choices, ranks) * width * item_bytes(dtype)
    return num_forwards * (rows + COUNT_BYTES * _others(num_experts, ranks)) + num_backwards * rows


def _others(numel: int, ranks: int) -> int:
    """Elements of a buffer that belong to the other ranks."""
    return numel * (ranks - 1) // ranks
