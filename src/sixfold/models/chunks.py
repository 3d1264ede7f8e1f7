"""Head and loss a few rows at a time, so that scores of a whole sequence never exist at once.

Scores are as wide as the vocabulary: at long sequences they take more memory than all else. Here a chunk of
hidden states becomes scores and a summed loss, the scores are forgotten, and backward makes them again, chunk
by chunk. Plain functions of tensors, for any head and any loss; nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""Label that counts for nothing, as in torch's cross-entropy."""
SCORES_BYTES = 2**28
"""Scores up to this size in fp32 exist at once, unless it is asked otherwise: nothing is computed twice."""
CHUNK_BYTES = 2**26
"""Size in fp32 of those of a chunk beyond that: products are large enough to run at full speed."""
BLOCK_ROWS = 128
"""Rows of scores whose exponentials are taken together: they fit the cache, those of a batch do not."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Scores [rows, vocab_size] and targets [rows] to their summed loss."""


def rows_at_once(num_rows: int, vocab_size: int, asked: int | None) -> int:
    """Rows of a chunk; `num_rows` where all exist at once.

    Args:
        asked: rows, 0 for all, None for what the sizes above say.
    """
    row_bytes = 4 * vocab_size
    if asked is None:
        asked = max(1, CHUNK_BYTES // row_bytes) if num_rows * row_bytes > SCORES_BYTES else 0
    return min(asked, num_rows) or num_rows


def in_chunks(
    head: Callable[[Tensor], Tensor], loss: Loss, hidden: Tensor, targets: Tensor, rows: int
) -> Tensor:
    """`loss(head(hidden), targets)`, with scores of `rows` rows at once.

    Args:
        head: hidden states [rows, width] to scores [rows, vocab_size].
        loss: summed over rows; `summed_cross_entropy` keeps within twice the scores in fp32.
        hidden: [n, width].
        targets: [n].
    """

    def part(states: Tensor, aims: Tensor) -> Tensor:
        return loss(head(states), aims)

    sums = [
        checkpoint(part, *each, use_reentrant=False, preserve_rng_state=False)
        for each in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
    ]
    return torch.stack(sums).sum()


def summed_cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    """In nats, computed and returned in fp32 (fp64 for fp64); targets that are `IGNORED` count for nothing.

    Raises:
        IndexError: see `check_entries`.
    """
    loss: Tensor = _CrossEntropy.apply(scores, targets)  # type: ignore[no-untyped-call]
    return loss


def check_entries(numbers: Tensor, size: int, what: str) -> None:
    """Look at numbers that stand for entries of a vocabulary, where that is cheap: on a CPU. Elsewhere the
    host would have to wait, and a kernel that indexes by them stops the run.

    Raises:
        IndexError: some are none.
    """
    if numbers.device.type != "cpu" or not numbers.numel():
        return
    lowest, highest = map(int, torch.aminmax(numbers))
    if lowest < 0 or highest >= size:
        raise IndexError(
            f"{what} from {lowest} to {highest} with a vocabulary of {size}: they lie in 0 to {size - 1}, "
            f"and labels that count for nothing are {IGNORED}"
        )


class _CrossEntropy(torch.autograd.Function):
    """log(sum(exp(scores))) - scores[target]. The gradient, softmax(scores) less one at the target, comes of
    the same exponentials, so it is taken forward and kept in the type of the scores: one pass of them less
    than the other way round, and nothing wide lives until backward."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, targets: Tensor) -> Tensor:
        is_ignored = targets == IGNORED
        places = targets.masked_fill(is_ignored, 0)
        check_entries(places, scores.shape[1], "targets")
        wide = torch.promote_types(scores.dtype, torch.float32)
        sums, slope = [], torch.empty_like(scores)
        for start in range(0, len(targets), BLOCK_ROWS):
            rows, part = (each[start : start + BLOCK_ROWS] for each in (scores, slope))
            place, counts = (each[start : start + BLOCK_ROWS, None] for each in (places, ~is_ignored))
            # Where the scores are wide themselves, nothing lives beside them and the gradient.
            made = part if part.dtype == wide else None
            rows = rows.to(wide)
            shares = torch.softmax(rows, 1, out=made)
            # The largest share is at least 1 / vocab_size, so its logarithm is exact enough for all of them.
            normaliser = rows.amax(1, keepdim=True) - shares.amax(1, keepdim=True).log()
            sums.append(((normaliser - rows.gather(1, place)) * counts).sum())
            shares.scatter_add_(1, place, torch.full_like(normaliser, -1.0))
            if not counts.all():
                shares.mul_(counts)
            if made is None:
                part.copy_(shares)
        ctx.save_for_backward(slope)
        return torch.stack(sums).sum() if sums else scores.new_zeros((), dtype=wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return slope * gradient.to(slope.dtype), None
