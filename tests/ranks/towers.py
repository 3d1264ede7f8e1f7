"""Models of blocks, each block a unit of its own, for what cut parameters must stand; and their training in
plain torch, micro-batch by micro-batch as the ranks cut it.

Used by the tests of gathering. Everything is fp64 and small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import sixfold
from sixfold.engine import Engine
from sixfold.state import Unit
from tests.ranks import plain

NUM_SAMPLES, WIDTH, MICRO = 10, 6, 2
RATE = {"lr": 0.2, "momentum": 0.9}


class Block(nn.Module):
    """A residual block of more than 1024 bytes, so that it is a unit under `plain.small_units`."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.tanh(self.up(x)))
        return out


class Tower(nn.Module):
    """`run` says how the blocks are used."""

    def __init__(self, num_blocks: int = 6, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.stem = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(num_blocks))
        self.head = nn.Linear(WIDTH, 2)

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Any:
        return self.head(self.run(self.stem(x)))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """The model in fp64, always the same one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return build().double()


def mean_square(output: Any, batch: Any) -> Tensor:
    """The loss: any output that is a tensor or a pair of one and more."""
    return (output[0] if isinstance(output, tuple) else output).square().mean()


def data(step: int) -> Tensor:
    """Samples of a step [NUM_SAMPLES, 4]."""
    places = torch.arange(NUM_SAMPLES * 4, dtype=torch.float64).view(NUM_SAMPLES, 4)
    return (places * 0.7 + step).sin()


def parts(step: int, ranks: int, shares: str) -> list[list[Tensor]]:
    """Each rank's micro-batches."""
    x = data(step)
    cut = [x[places.start : places.stop] for places in plain.cuts(NUM_SAMPLES, ranks, shares, step)]
    return [list(share.split(MICRO)) if len(share) else [] for share in cut]


def reference(
    build: Callable[[], nn.Module], steps: int, ranks: int, shares: str = "uneven", loss: Any = mean_square
) -> nn.Module:
    """Plain torch over the micro-batches of all ranks."""
    model = seeded(build)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, **RATE)
    for step in range(steps):
        optimizer.zero_grad()
        for share in parts(step, ranks, shares):
            for part in share:
                (loss(model(part), part) * len(part) / NUM_SAMPLES).backward()
        for parameter in trained:  # what no rank used counts as a gradient of zero
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    return model


def start(
    build: Callable[[], nn.Module], layout: dict[str, Any], loss: Any = mean_square, **more: Any
) -> Engine:
    """An engine whose units are single blocks. Two ranks exchange over the network, where cut parameters are
    copied, unless `layout` says otherwise; more share memory, where they are not."""
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    config = {
        "layout": {"transport": "network"} | layout if ranks == 2 else layout,
        "batch": {"micro": MICRO},
        "optimizer": {"name": "sgd", **RATE},
    }
    with plain.small_units():
        return sixfold.initialize(seeded(build), config=config | more, loss_fn=loss)


def step(engine: Engine, shares: str = "uneven", loop: str = "train_step", loss: Any = mean_square) -> None:
    """This rank's part of the next update."""
    mine = parts(engine.num_steps, engine.data_ranks, shares)[engine.data_rank]
    if loop == "train_step":
        engine.train_step((torch.cat(mine),) if mine else None)
        return
    for part in mine:
        engine.backward(loss(engine(part), part))
    engine.step()


class Watch:
    """What becomes of an engine's units since `clear`.

    Attributes:
        events: (verb, names of the unit's blocks; "" for what lies outside of them), in order.
        most: the largest number of units of blocks that had memory at a time.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.clear()

    def clear(self) -> None:
        """Forget what was seen."""
        self.events: list[tuple[str, str]] = []
        self.most = 0

    def note(self, verb: str, unit: Unit) -> None:
        """Called after `unit` has done `verb`."""
        self.events.append((verb, ",".join(unit.plan.blocks)))
        self.most = max(self.most, len(self.whole()))

    def whole(self) -> list[str]:
        """Blocks of the units that have memory now."""
        return [
            ",".join(unit.plan.blocks)
            for unit in self._engine.state.units
            if unit.plan.blocks and working_bytes(unit)
        ]

    @property
    def gathers(self) -> list[str]:
        """What was gathered, in order."""
        return [name for verb, name in self.events if verb == "gather"]

    @property
    def ahead(self) -> int:
        """Gathers that something else happened behind before they were used."""
        follows = zip(self.events, [*self.events[1:], ("", "")], strict=True)
        return sum(verb == "gather" and after != ("show", name) for (verb, name), after in follows)


@contextmanager
def watched(engine: Engine) -> Iterator[Watch]:
    """Notes what happens to the units of `engine` inside the block."""
    watch = Watch(engine)

    def noting(verb: str, unit: Unit, method: Callable[[], Any]) -> Callable[[], Any]:
        def noted() -> Any:
            result = method()
            watch.note(verb, unit)
            return result

        return noted

    real = [
        (unit, verb, getattr(unit.presence, verb))
        for unit in engine.state.units
        for verb in ("gather", "show", "drop")
    ]
    for unit, verb, method in real:
        setattr(unit.presence, verb, noting(verb, unit, method))
    try:
        yield watch
    finally:
        for unit, verb, method in real:
            setattr(unit.presence, verb, method)


def blocks(places: Iterable[int]) -> list[str]:
    """Names of blocks of a `Tower`."""
    return [f"blocks.{place}" for place in places]


def live_bytes(engine: Engine) -> int:
    """Of all working copies now."""
    return sum(map(working_bytes, engine.state.units))


def working_bytes(unit: Unit) -> int:
    """What a working copy takes now of this rank's own memory; where ranks have it in common, what can be
    used."""
    is_own = unit.cut.is_copy
    return unit.working.untyped_storage().nbytes() if is_own or not unit.presence.is_dropped else 0
