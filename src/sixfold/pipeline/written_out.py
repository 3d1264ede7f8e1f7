"""The written-out loop: `engine()`, `backward`, `step` as single instructions of the same program.

The engine forwards to it. It keeps count of micro-batches and their weights between calls and plays
nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from sixfold.pipeline.batch import Batch
from sixfold.pipeline.loss import Counts, Share, number_of, weight_of
from sixfold.pipeline.player import Player
from sixfold.pipeline.step import StepResult


@dataclass
class _Tally:
    """Counts since the last update.

    Args:
        micro: number of the micro-batch under way.
        num_forwards: forwards of it so far.
        open: counts of forwards that no backward has followed yet.
        closed: counts of micro-batches whose backward has been played.
        weight: weight of the micro-batch under way once its backward has been played.
        unweighted: whether any weight was taken from the number of samples.
        num_backwards: backwards so far.
    """

    micro: int = 0
    num_forwards: int = 0
    open: Counts = field(default_factory=Counts)
    closed: Counts = field(default_factory=Counts)
    weight: float | None = None
    unweighted: bool = False
    num_backwards: int = 0


class WrittenOut:
    """Plays forwards, backwards and updates one at a time."""

    def __init__(self, player: Player) -> None:
        self._player = player
        self._tally = _Tally()

    @property
    def num_backwards(self) -> int:
        """Backwards since the last update."""
        return self._tally.num_backwards

    @contextmanager
    def forward(self, batch: Batch) -> Iterator[tuple[int, int]]:
        """Inside, a forward on `batch`; gives the number of its micro-batch, and its own number in that.

        A forward after a backward begins the next micro-batch; several forwards before one backward
        (two models' inputs, real and generated ones) belong to the same. One that raises counts for nothing.
        """
        tally = self._tally
        if tally.weight is not None:
            tally.micro, tally.num_forwards, tally.weight = tally.micro + 1, 0, None
        counts = Counts.of(batch)
        yield tally.micro, tally.num_forwards
        tally.num_forwards += 1
        tally.open += counts

    def backward(self, loss: torch.Tensor, weight: float | None, *, retain_graph: bool) -> None:
        """Backward of a mean loss; a further loss of the same micro-batch is added, not averaged.

        Args:
            weight: what `loss` is a mean over; None for the micro-batch's number of samples.
        """
        number = number_of(loss, "the loss")
        tally = self._tally
        tally.num_backwards += 1
        is_further = tally.weight is not None
        if tally.weight is None:
            tally.unweighted |= weight is None
            tally.weight = weight_of(weight) if weight is not None else tally.open.samples or 1.0
            tally.closed, tally.open = tally.closed + tally.open, Counts()
        share = Share(number * tally.weight, None if is_further else tally.weight)
        self._player.backward(tally.micro, share, retain_graph=retain_graph)

    def step(self) -> StepResult:
        """Play the update."""
        tally, self._tally = self._tally, _Tally()
        return self._player.update(tally.closed, has_means=tally.unweighted)
