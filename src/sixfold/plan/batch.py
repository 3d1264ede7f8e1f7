"""The batch: from one global number to each rank's share and micro-batches.

Derived once, printed with its derivation, read by loaders and by `train`. Nothing here is asked of
the user twice: ranks, accumulation and shares follow from the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from sixfold.base.errors import PlanError
from sixfold.config import BatchConfig


def share(size: int, data_rank: int, data_ranks: int) -> range:
    """Places in a global batch of `size` that `data_rank` of `data_ranks` feeds.

    Contiguous and in order; parts differ by at most one sample, and with more ranks than samples
    some are empty.
    """
    return range(data_rank * size // data_ranks, (data_rank + 1) * size // data_ranks)


@dataclass(frozen=True)
class BatchPlan:
    """How one global batch is divided.

    Args:
        size: samples per update over all ranks.
        micro: most samples in one forward pass on one rank.
        data_ranks: ranks that the samples are divided over.
    """

    size: int
    micro: int
    data_ranks: int

    def share(self, data_rank: int) -> range:
        """Places in the global batch that `data_rank` works on, see `share`."""
        return share(self.size, data_rank, self.data_ranks)

    def num_micro(self, data_rank: int) -> int:
        """Micro-batches of `data_rank` in one update."""
        return -(-len(self.share(data_rank)) // self.micro)

    def __str__(self) -> str:
        shares = sorted({len(self.share(rank)) for rank in range(self.data_ranks)}, reverse=True)
        micros = sorted({self.num_micro(rank) for rank in range(self.data_ranks)}, reverse=True)
        share, num_micro = (" or ".join(map(str, values)) for values in (shares, micros))
        return (
            f"{self.size} samples / {self.data_ranks} data ranks = {share} a rank"
            f" = {num_micro} micro-batch(es) of at most {self.micro}"
        )


def decide_batch(batch: BatchConfig, *, data_ranks: int, sequence_length: int) -> BatchPlan:
    """Divide the global batch that the user asked for.

    Args:
        sequence_length: tokens per sample, by which `batch.tokens` is counted.

    Raises:
        PlanError: neither `batch.global` nor `batch.tokens` is given.
    """
    if batch.global_ is not None:
        size = batch.global_
    elif batch.tokens is not None:
        size = batch.tokens // sequence_length
    else:
        raise PlanError(
            f"batch: neither global nor tokens is set for {data_ranks} data rank(s)",
            rule="the size of one update is asked for once, in samples or in tokens",
            fix="set batch.global = 32",
        )
    largest = -(-size // data_ranks)
    return BatchPlan(size=size, micro=min(batch.micro or largest, largest), data_ranks=data_ranks)
