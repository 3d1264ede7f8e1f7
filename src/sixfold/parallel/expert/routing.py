"""Routers of experts: what they have tallied in an update is summed over ranks, and given back to them.

Made and called by the engine once after every update, so that balance follows the load of the whole global
batch, however it was cut. It chooses no experts and sends no tokens.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sixfold.mesh import Mesh
from sixfold.models.moe import RoutingStatistics
from sixfold.parallel.expert.balance import ModelBalance, num_tokens_of


@runtime_checkable
class Tallying(Protocol):
    """A module that tallies what its tokens choose, as `sixfold.models.moe.Router` does.

    Attributes:
        tally: integers of this rank since the last update.
        penalty_scale: gradient of what is minimised by the summed loss.
        last: what the last update came to.
    """

    tally: Tensor
    penalty_scale: Tensor | float
    last: RoutingStatistics | None

    def end_update(self, tally: Tensor) -> None:
        """Take in the sum of all ranks' tallies, and begin anew."""


class Routing:
    """All routers of a model.

    Args:
        model: whose modules they are; others than routers are left alone.
        balance: the loss of a model that balances all layers together.
        parted: whether each rank of the tensor axis routes its part of the sequence alone.
    """

    def __init__(
        self, model: nn.Module, mesh: Mesh, balance: ModelBalance | None = None, *, parted: bool = False
    ) -> None:
        self._routers: dict[str, Tallying] = {
            name: part for name, part in model.named_modules() if isinstance(part, Tallying)
        }
        self._balance, self._mesh = balance, mesh
        if balance is not None:
            self._routers["all layers"] = balance
        groups = [mesh.replicas.all, *([mesh.along("tensor")] if parted else [])]
        self._groups = groups if self._routers else []

    def scale_penalties(self, scale: float) -> None:
        """Tell stages of a pipeline without the loss what its gradient is."""
        for router in self._routers.values():
            router.penalty_scale = scale

    def refuse_written_out(self) -> None:
        """Raise ModelError where an update has to be known as a whole."""
        if self._balance is not None:
            self._balance.refuse_written_out()

    def begin(self, batch: Any, scale: float, *, answers: bool) -> None:
        """An update begins, of which this rank has a part.

        Args:
            scale: gradient of what is minimised by the model's loss.
            answers: whether no other rank counts the same part.
        """
        if self._balance is not None:
            (tokens,) = self._mesh.total(num_tokens_of(batch) if answers else 0.0)
            self._balance.begin(scale, tokens)

    def state(self) -> list[int] | None:
        """What goes on from update to update and is no buffer of the model."""
        return None if self._balance is None else self._balance.load.tolist()

    def load(self, state: list[int] | None) -> None:
        """Go on from what `state` gave."""
        if self._balance is not None and state is not None:
            self._balance.load.copy_(torch.tensor(state))

    def end_update(self) -> None:
        """Sum the tallies, all of them together."""
        if not self._routers:
            return
        tallies = [router.tally for router in self._routers.values()]
        summed = torch.cat(tallies)
        for group in self._groups:
            group.all_reduce(summed).wait()
        parts = torch.split(summed, [len(tally) for tally in tallies])
        for router, tally in zip(self._routers.values(), parts, strict=True):
            router.end_update(tally)

    def forget(self) -> None:
        """Drop what was tallied since the last update."""
        for router in self._routers.values():
            router.tally.zero_()

    def statistics(self) -> dict[str, RoutingStatistics]:
        """By name of the router, how the tokens of the last update were shared out."""
        return {name: router.last for name, router in self._routers.items() if router.last is not None}
