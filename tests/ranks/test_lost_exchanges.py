"""What parity is worth: of everything that ranks exchange in training, none can be lost without its showing.

The dispatcher of each rank leaves out one exchange, a different one in each run, and all that take part in
it go on with what they had. Meetings are not lost: they tell ranks apart or stop them, and carry no numbers
of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sixfold.base.ring import ranks_of
from sixfold.engine import Engine
from sixfold.mesh.dispatch import Call, Carrier, Dispatcher, Exchange
from sixfold.testing import Pool
from tests.ranks import plain, rows, towers

CLIP = 0.05  # below every norm, so that a wrong one shows in the parameters
LR = 0.2
SHARES = {2: (6, 4), 4: (3, 3, 2, 2)}
"""Samples of each rank: not equally many, so that nothing cancels; two micro-batches at most."""
Key = tuple[str, int]
"""A group, and the how many-th of its exchanges in a round: the same for all that take part."""


class Losses:
    """Stands between the dispatcher of this rank and what carries its exchanges."""

    def __init__(self) -> None:
        self._before: dict[str, int] | None = None  # exchanges of each group before the round
        self._lost: Key | None = None
        self._seen: list[Key] = []

    @contextmanager
    def round(self, dispatcher: Dispatcher, lost: Key | None) -> Iterator[list[Key]]:
        """Inside, exchange `lost` is left out. The sums and gathers that come are added to the list."""
        self._before, self._lost, self._seen = dict(dispatcher.counts), lost, []
        yield self._seen
        self._before = self._lost = None

    def carrier(
        self, dispatcher: Dispatcher, op: str, group: str, tensors: Sequence[Tensor], carrier: Carrier
    ) -> Carrier:
        """One that carries nothing where that is to be lost."""
        is_lost = False

        def begin() -> None:
            nonlocal is_lost
            is_lost = False
            if self._before is None or op not in ("reduce-scatter", "all-reduce", "all-gather"):
                return
            key = group, dispatcher.counts[group] - self._before.get(group, 0)
            self._seen.append(key)
            is_lost = key == self._lost
            if is_lost and op == "all-gather":
                for tensor in tensors:
                    _forget_others(tensor, group)

        def unless_lost(call: Callable[[], Any]) -> Any:
            return None if is_lost else call()

        calls: list[Call] = [begin, *(partial(unless_lost, call) for call in carrier.calls)]
        finish = None if carrier.finish is None else partial(unless_lost, carrier.finish)
        return Carrier(calls, finish, carrier.lingers)


def _forget_others(whole: Tensor, group: str) -> None:
    """Slices of others that do not come are zeros, not what was there by chance."""
    ranks = ranks_of(group)
    size, place = -(-whole.numel() // len(ranks)), ranks.index(dist.get_rank())
    whole[: place * size] = 0
    whole[(place + 1) * size :] = 0


@contextmanager
def lossy() -> Iterator[Losses]:
    """Inside, what this rank prepares is carried through the `Losses`."""
    losses, prepare = Losses(), Dispatcher.prepare

    def prepared(dispatcher: Dispatcher, op: str, group: str, tensor: Any, carrier: Carrier) -> Exchange:
        if not group.endswith(":meetings"):
            tensors = [tensor] if isinstance(tensor, Tensor) else tensor
            carrier = losses.carrier(dispatcher, op, group, tensors, carrier)
        return prepare(dispatcher, op, group, tensor, carrier)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dispatcher, "prepare", prepared)
        yield losses


def tower() -> nn.Module:
    return towers.seeded(lambda: towers.Tower(2))


def put_back(engine: Engine) -> None:
    """To its first weights, on every rank."""
    start = dict(tower().named_parameters())
    with engine.gathered() as model:
        for name, parameter in model.named_parameters():
            parameter.copy_(start[name])


def apart_after_update(engine: Engine, number: int) -> float:
    """How far an update and an evaluation after it come from one process in plain torch. New data in each
    round: what is left of the last one is wrong."""
    batches = [towers.data(2 * number), towers.data(2 * number + 1)]
    first, second = (batch.split(SHARES[engine.data_ranks])[engine.data_rank] for batch in batches)
    found = [engine.train_step((first,)), engine.last.grad_norm if engine.last else None]
    found.append(engine.eval_step((second,)).loss)

    model = tower()
    loss = towers.mean_square(model(batches[0]), None)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    torch.optim.SGD(model.parameters(), lr=LR).step()
    numbers = [loss, norm, towers.mean_square(model(batches[1]), None)]
    apart = [abs((one or 0.0) - other.item()) for one, other in zip(found, numbers, strict=True)]
    return max(*apart, plain.farthest(engine.full_state_dict(), model))


@pytest.mark.parametrize("case", rows.carried(2), ids=str)
def test_every_lost_exchange_shows(case: tuple[str, int, str], rank_pool: Pool) -> None:
    rank_pool.run(lose_each, rows.layout_of(*case), ranks=case[1], timeout_s=60)


def lose_each(layout: dict[str, Any]) -> None:
    """On every rank; of what the first one takes part in."""
    with lossy() as losses:
        engine = towers.start(
            tower,
            layout,
            batch={"micro": -(-max(SHARES[dist.get_world_size()]) // 2)},
            optimizer={"name": "sgd", "lr": LR, "clip_norm": CLIP},
        )
        dispatcher = engine.mesh.dispatcher
        engine.train_step((towers.data(0)[:2],))  # what ranks ask each other once, they have asked
        put_back(engine)
        with losses.round(dispatcher, None) as seen:
            assert apart_after_update(engine, 0) < 1e-10
        told = [seen]
        dist.broadcast_object_list(told)
        assert len(told[0]) > 4
        unseen = []
        for number, lost in enumerate(told[0], 1):
            put_back(engine)
            with losses.round(dispatcher, lost) as seen:
                if apart_after_update(engine, number) < 1e-6:
                    unseen.append(lost)
            assert dist.get_rank() > 0 or lost in seen
        assert dist.get_rank() > 0 or not unseen
        engine.close()
