"""Ranks as threads of one process, for what only needs a group that exchanges: any number of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

import torch
from torch import Tensor

from sixfold.mesh import Group, Pending, Scratch

Found = TypeVar("Found")
PATIENCE_S = 20


class _Coming(Pending):
    """Tensors that fill others when they are waited for."""

    def __init__(self, ways: Sequence[SimpleQueue[Tensor]], arriving: Sequence[Tensor]) -> None:
        super().__init__()
        self._left = list(zip(ways, arriving, strict=True))

    def wait(self) -> None:
        while self._left:
            way, into = self._left.pop(0)
            into.view(-1).copy_(way.get(timeout=PATIENCE_S).view(-1))


class Member(Group):
    """One of them. `num_bytes` counts what it has sent."""

    def __init__(self, place: int, num_ranks: int, ways: dict[tuple[int, int], SimpleQueue[Tensor]]) -> None:
        super().__init__(range(num_ranks), place, Scratch(torch.device("cpu")), None)
        self._ways = ways
        self.num_bytes = 0

    def all_to_all(self, sent: Sequence[Tensor], arriving: Sequence[Tensor]) -> Pending:
        for place, part in enumerate(sent):
            assert part.is_contiguous()
            self._ways[self.place, place].put(part.detach().clone())
            self.num_bytes += part.nbytes * (place != self.place)

        return _Coming([self._ways[place, self.place] for place in range(self.num_ranks)], arriving)


def together(num_ranks: int, work: Callable[[Member], Found]) -> list[Found]:
    """What `work` gives each of them, by place."""
    places = range(num_ranks)
    ways: dict[tuple[int, int], SimpleQueue[Tensor]] = {
        (one, other): SimpleQueue() for one in places for other in places
    }
    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(lambda place: work(Member(place, num_ranks, ways)), places))
