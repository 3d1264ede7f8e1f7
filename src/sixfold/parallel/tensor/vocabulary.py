"""Cross-entropy over a vocabulary of which each rank has a part: whole rows of scores never exist.

Called in place of a model's own loss where its head is cut along the vocabulary. Ranks exchange three numbers
a row: their largest score, the sum of their exponentials, and the target's score where it is theirs.
It knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sixfold.models.chunks import IGNORED, check_entries
from sixfold.parallel.tensor.crossing import Axis, bounds, exchange


@dataclass(frozen=True)
class Vocabulary:
    """The part of a vocabulary that this rank has.

    Args:
        size: entries of the whole.
    """

    axis: Axis
    size: int

    @property
    def span(self) -> tuple[int, int]:
        """(start, stop) of this rank's entries."""
        return bounds(self.size, self.axis.num_ranks, self.axis.place)


def losses_of(scores: Tensor, targets: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Cross-entropy of each row, in nats, the same on every rank.

    Args:
        scores: of this rank's entries, floating [rows, stop - start].
        targets: numbers in the whole vocabulary, [rows]; rows with `IGNORED` get 0.

    Returns:
        [rows], in the type of `scores`.

    Raises:
        IndexError: see `check_entries`.

    Source: Shoeybi et al. 2019, "Megatron-LM", section 3; the sum of exponentials is rescaled to a common
    maximum as in Milakov & Gimelshein 2018, "Online normalizer calculation for softmax".
    """
    losses: Tensor = _Losses.apply(scores, targets, vocabulary)  # type: ignore[no-untyped-call]
    return losses


def entries_here(numbers: Tensor, span: tuple[int, int], size: int) -> tuple[Tensor, Tensor]:
    """Which numbers are entries in `span`, and their places in it; those of other ranks get place 0.

    What is no entry of the whole, of `size`, keeps a number that indexing refuses, as it would on one rank.
    """
    start, stop = span
    is_here = (numbers >= start) & (numbers < stop)
    is_elsewhere = (numbers >= 0) & (numbers < size) & ~is_here
    return is_here, torch.where(is_here, numbers - start, numbers.masked_fill(is_elsewhere, 0))


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, targets: Tensor, vocabulary: Vocabulary) -> Tensor:
        axis, counts = vocabulary.axis, targets != IGNORED
        aims = targets.masked_fill(~counts, 0)
        check_entries(aims, vocabulary.size, "targets")
        is_mine, columns = entries_here(aims, vocabulary.span, vocabulary.size)
        is_mine &= counts
        largest = scores.amax(-1)
        parts = torch.exp(scores - largest[:, None])
        hit = torch.where(is_mine, scores.gather(1, columns[:, None])[:, 0], 0)
        told = torch.stack((largest, parts.sum(-1), hit))[None]
        maxima, sums, hits = exchange(told, "gather", axis, 0, axis.num_ranks).unbind(1)
        top = maxima.amax(0)
        norm = (sums * torch.exp(maxima - top)).sum(0)
        # From here on: this rank's probabilities, all that the gradient needs.
        parts *= (torch.exp(largest - top) / norm)[:, None]
        ctx.save_for_backward(parts, columns, is_mine, counts)
        return torch.where(counts, top + norm.log() - hits.sum(0), 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts, columns, is_mine, counts = ctx.saved_tensors
        weight = torch.where(counts, gradient, 0)
        scores = parts * weight[:, None]
        scores.scatter_add_(1, columns[:, None], torch.where(is_mine, -weight, 0)[:, None])
        return scores, None, None
