"""Whether ranks that work on the same samples were given the same batch, compared before any of it is run.

Called at the beginning of a step and of a written-out forward. It compares checksums, in one message, and
sends no batch.
"""

from __future__ import annotations

import torch

from sixfold.base.errors import ModelError
from sixfold.mesh import Mesh
from sixfold.pipeline.batch import Batch, checksum


def compare(batch: Batch, mesh: Mesh) -> None:
    """Compare the batches of ranks that are to have the same, before anything is sent whose shape follows
    from them. A collective.

    Raises:
        ModelError: they differ; on every rank.
    """
    if mesh.num_fed == 1:
        return
    is_first = mesh.pipe_rank == mesh.place("tensor") == mesh.place("context") == 0
    told = (mesh.data_rank + 1) * checksum(batch)
    (difference,) = mesh.total(_taken_out(told, mesh.num_fed, is_first=is_first))
    _refuse_different(difference, mesh.num_fed)


def compare_written_out(batch: Batch, mesh: Mesh) -> None:
    """The same before a forward of a written-out loop, among those who run it together; others may run
    fewer. A collective of them."""
    group = mesh.along("tensor")
    if group.num_ranks > 1:
        told = _taken_out(checksum(batch), group.num_ranks, is_first=group.place == 0)
        difference = torch.tensor([told], dtype=torch.float64, device=mesh.device)
        group.all_reduce(difference).wait()
        _refuse_different(float(difference), group.num_ranks)


def _taken_out(told: int, num_ranks: int, *, is_first: bool) -> float:
    """What sums to 0 over ranks that are told the same, and else does not: all is exact in fp64."""
    return float((num_ranks - 1 if is_first else -1) * told)


def _refuse_different(difference: float, num_ranks: int) -> None:
    if difference:
        raise ModelError(
            f"{num_ranks} ranks that work on the same samples were given different batches",
            rule="ranks that differ in pipe, tensor or context see the same batch; which part of the global "
            "one it is says engine.data_rank of engine.data_ranks, not the rank",
            fix="draw it by engine.data_rank, for example DistributedSampler(data, "
            "num_replicas=engine.data_ranks, rank=engine.data_rank)",
        )
