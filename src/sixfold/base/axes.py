"""Axis cards: for each axis of the mesh, what it divides and whose collectives it needs.

An axis exists when it has a card here; tests walk them, and ask of each for what it says.
This module holds facts only; it never computes a layout.
"""

from __future__ import annotations

from dataclasses import dataclass

AXIS_NAMES = ("data", "shard", "tensor", "pipe", "context", "expert")
"""The six words of the field. Each has its card below."""


@dataclass(frozen=True)
class AxisCard:
    """Facts about one axis.

    Args:
        name: the axis, one of AXIS_NAMES.
        divides: what is cut along this axis, in one phrase.
        collectives: the collectives a step issues along this axis.
        changes_module: whether modules are transformed for this axis.
        checkpoint: how a checkpoint sees what this axis divides.
        page: its page under docs/.
    """

    name: str
    divides: str
    collectives: tuple[str, ...]
    changes_module: bool
    checkpoint: str
    page: str


CARDS: dict[str, AxisCard] = {
    card.name: card
    for card in (
        AxisCard(
            name="data",
            divides="the samples of the global batch",
            collectives=("all-reduce",),
            changes_module=False,
            checkpoint="ranks that hold the same state write a part of it each",
            page="axes/data.md",
        ),
        AxisCard(
            name="shard",
            divides="parameters, gradients and optimizer state, over groups of neighbouring replicas",
            collectives=("reduce-scatter", "all-gather", "all-reduce"),
            changes_module=False,
            checkpoint="every rank writes and reads the ranges of its slices",
            page="axes/shard.md",
        ),
        AxisCard(
            name="pipe",
            divides="the layers of the model, in order, into stages",
            collectives=("send", "receive", "all-reduce", "broadcast"),
            changes_module=True,
            checkpoint="every rank writes and reads the parameters of its stages; tied ones once",
            page="axes/pipe.md",
        ),
        AxisCard(
            name="context",
            divides="the tokens of each sequence",
            collectives=("all-to-all",),
            changes_module=True,
            checkpoint="nothing of the state is cut by it: its ranks are replicas there",
            page="axes/context.md",
        ),
        AxisCard(
            name="tensor",
            divides="matrices of layers, attention heads and the vocabulary",
            collectives=("all-reduce", "all-gather", "reduce-scatter"),
            changes_module=True,
            checkpoint="every rank writes and reads its pieces; tensors in files are whole",
            page="axes/tensor.md",
        ),
        AxisCard(
            name="expert",
            divides="the experts of every layer, over groups of data and context ranks",
            collectives=("all-to-all",),
            changes_module=True,
            checkpoint="every rank writes and reads its range of the stacked weights",
            page="axes/expert.md",
        ),
    )
}
