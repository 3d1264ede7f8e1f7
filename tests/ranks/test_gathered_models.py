"""Models of every build under cut parameters: the same numbers as plain torch on one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sixfold
from sixfold.plan import PRESETS
from sixfold.testing import Pool
from tests.covering import Case, covering, label
from tests.ranks import plain, towers
from tests.ranks.towers import WIDTH, Block, Tower

BOUND = 1e-10


class Twice(Tower):
    """A block used twice in one forward, with another in between."""

    def run(self, x: Tensor) -> Tensor:
        for place in (0, 1, 0, 2, 2):
            x = self.blocks[place](x)
        return x


class TwiceRecomputed(Tower):
    """The same with recompute, which hands out gradients of a block one use at a time."""

    is_reentrant = True

    def run(self, x: Tensor) -> Tensor:
        for place in (0, 1, 0, 2, 2, 3):
            x = checkpoint(self.blocks[place], x, use_reentrant=self.is_reentrant)
        return x


class TwiceRecomputedNewly(TwiceRecomputed):
    is_reentrant = False


class Holder(Block):
    """A block that runs another one between its halves."""

    def forward(self, x: Tensor, inner: nn.Module | None = None) -> Tensor:
        middle = torch.tanh(self.up(x))
        if inner is not None:
            middle = middle + inner(x).repeat(1, 2)
        return x + self.down(middle)


class Nested(Tower):
    def __init__(self) -> None:
        super().__init__(4, Holder)

    def run(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x, self.blocks[1])
        return self.blocks[3](self.blocks[2](x), self.blocks[1])


@dataclass
class Fields:
    """An output with fields."""

    hidden: Tensor
    count: int


class Outputs(Tower):
    """Blocks whose outputs are a tuple, a mapping, a dataclass and what Hugging Face models return."""

    class Wrapping(Block):
        shape = ""

        def forward(self, x: Tensor) -> Any:
            from transformers.utils import ModelOutput

            x = super().forward(x)
            kinds: dict[str, Callable[[], Any]] = {
                "tuple": lambda: (x, None),
                "dict": lambda: {"nested": [x]},
                "dataclass": lambda: Fields(x, 3),
                "output": lambda: ModelOutput(hidden=x),
            }
            return kinds[self.shape]()

    def __init__(self) -> None:
        super().__init__(4, Outputs.Wrapping)
        for block, shape in zip(self.blocks, ("tuple", "dict", "dataclass", "output"), strict=True):
            block.shape = shape  # type: ignore[assignment]

    def run(self, x: Tensor) -> Tensor:
        first, second, third, fourth = self.blocks
        x, _ = first(x)
        x = second(x)["nested"][0]
        out: Tensor = fourth(third(x).hidden)["hidden"]
        return out


class Bare(Tower):
    """Blocks straight on the data: their inputs need no gradient."""

    def forward(self, x: Tensor) -> Any:
        x = F.pad(x, (0, WIDTH - 4))
        return self.head(self.run(sum(block(x) for block in self.blocks[:2]) + self.stem(x[:, :4])))


class FrozenInFront(Tower):
    def __init__(self) -> None:
        super().__init__(5)
        self.stem.requires_grad_(False)
        self.blocks[:2].requires_grad_(False)
        self.blocks[3].up.requires_grad_(False)


class Adapted(nn.Module):
    """A linear layer in frozen bf16 with a trained correction of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        base = self.base
        # In fp64: a product in bf16 would turn the rounding of another order of sums into whole digits.
        out = F.linear(x, base.weight.double(), base.bias.double()) + self.up(self.down(x))
        return torch.tanh(out)


class Adapters(Tower):
    def __init__(self) -> None:
        super().__init__(5, Adapted)
        self.requires_grad_(False)
        for block in self.blocks:
            block.down.requires_grad_(True), block.up.requires_grad_(True)

    def double(self) -> Adapters:
        super().double()
        for block in self.blocks:
            block.base.bfloat16()
        return self


class Tied(Tower):
    """Ties outside of blocks, between two blocks, and between a block and what lies outside."""

    def __init__(self) -> None:
        super().__init__(4)
        self.again = nn.Linear(4, WIDTH)
        self.again.weight = self.stem.weight
        self.blocks[2].up.weight = self.blocks[0].up.weight
        self.side = nn.Linear(12, WIDTH)
        self.side.weight = self.blocks[1].down.weight

    def forward(self, x: Tensor) -> Any:
        return self.head(self.run(self.stem(x)) + self.again(x) + self.side(x.repeat(1, 3)))


class Odd(Tower):
    """7 elements, numbers, what nobody uses, what few samples use, and buffers; inside blocks and outside."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seven = nn.Parameter(torch.linspace(-1, 1, 7))
            self.scale = nn.Parameter(torch.tensor(0.7))
            self.unused = nn.Parameter(torch.ones(3))
            self.rare = nn.Parameter(torch.ones(()))
            self.register_buffer("shift", torch.arange(6.0))
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
            self.wide = nn.Linear(WIDTH, 20)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            x = torch.tanh(x * self.seven[:6] * self.scale + self.shift * self.seven[6])
            x = x + torch.tanh(self.wide(x))[:, :6]
            return x * self.rare if x[0, 0] > 0 else x

    def __init__(self) -> None:
        super().__init__(4, Odd.Part)
        self.nobody = nn.Parameter(torch.ones(5))
        self.level = nn.Parameter(torch.tensor(1.5))

    def run(self, x: Tensor) -> Tensor:
        return super().run(x * self.level)


class Skipping(Tower):
    """Few samples need block 2, and rank 0 alone block 4 (in plain torch: the first samples)."""

    def run(self, x: Tensor) -> Tensor:
        for place, block in enumerate(self.blocks):
            if place not in (2, 4) or (place == 2 and x[0, 0] > 0.3) or (place == 4 and x[0, 1] > 0):
                x = block(x)
        return x


class InPlace(Tower):
    """Outputs of blocks are written over; a block may hand its input through."""

    class Thinning(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x[0, 0] > 0.1 else x

    def __init__(self) -> None:
        super().__init__(6, InPlace.Thinning)

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).mul_(0.9)
            x += 0.1
            x.relu_()
        return x + self.blocks[5](x.cos())


class Auxiliary(Tower):
    """Every block adds to the loss by itself, as routers do."""

    class Routed(Block):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), self.up(x).square().mean()

    def __init__(self) -> None:
        super().__init__(5, Auxiliary.Routed)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        added = []
        for block in self.blocks:
            x, one = block(x)
            added.append(one)
        return self.head(x) + torch.stack(added[::-1]).sum()


class Listed(nn.Sequential):
    """Blocks and nothing else, so that nothing lies outside of units that come and go."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, WIDTH), Block(), Block(), Block(), nn.Linear(WIDTH, 2))


PLAIN = (Twice, TwiceRecomputed, TwiceRecomputedNewly, Nested, Outputs, Bare, FrozenInFront, Listed)
ODD = (Adapters, Tied, Odd, Skipping, InPlace, Auxiliary)
MODELS: dict[str, Callable[[], nn.Module]] = {kind.__name__: kind for kind in (*PLAIN, *ODD)}


CASES = covering(
    {
        "name": tuple(MODELS),
        "ranks": (1, 2, 3, 4),  # nothing is cut, copies are gathered (`towers.start`), or memory is in common
        "loop": ("train_step", "written_out"),
        "shares": ("even", "uneven", "empty"),
    },
    lambda case: case["ranks"] > 1 or case["shares"] == "even",
)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_follows_plain_torch(case: Case, rank_pool: Pool) -> None:
    name, ranks, loop, shares = case.values()
    reference = towers.reference(MODELS[name], 3, ranks, shares)
    rank_pool.run(follow, name, loop, shares, reference, ranks=ranks)


def follow(name: str, loop: str, shares: str, reference: nn.Module) -> None:
    engine = towers.start(MODELS[name], {"zero": 3})
    for _ in range(3):
        towers.step(engine, shares, loop)
    found = engine.full_state_dict()
    assert plain.farthest(found, reference) < BOUND, name
    assert found.keys() == reference.state_dict().keys()
    assert towers.live_bytes(engine) == 0
    engine.close()


# Several models, several losses.


def twins(layouts: tuple[int | None, ...], build: Callable[[], nn.Module]) -> list[Any]:
    """The same model in plain torch (None) and under each preset, with a way to update it."""
    made: list[Any] = []
    for zero in layouts:
        model = towers.seeded(build)
        if zero is None:
            made.append((model, torch.optim.SGD(model.parameters(), **towers.RATE)))
            continue
        settings = {
            "layout": {"zero": zero},
            "optimizer": {"name": "sgd", **towers.RATE, "weight_decay": 0.0},
        }
        with plain.small_units():
            made.append(sixfold.initialize(model, config=settings))
    return made


class Judge(Tower):
    def __init__(self) -> None:
        super().__init__(3)
        self.stem = nn.Linear(2, WIDTH)


@pytest.mark.ranks(1, 2, timeout_s=60)
@pytest.mark.parametrize("zero", [0, 3])
def test_two_engines_against_each_other(zero: int, num_ranks: int) -> None:
    """One's loss goes through the other, whose own gradients of it are thrown away."""
    (maker, maker_optimizer), maker_engine = twins((None, zero), lambda: Tower(3))
    (judge, judge_optimizer), judge_engine = twins((None, zero), Judge)
    for number in range(3):
        x = towers.data(number)
        mine = x.chunk(num_ranks)[torch.distributed.get_rank() if num_ranks > 1 else 0]
        judge_optimizer.zero_grad()
        (judge(x[:, :2]).sigmoid().mean() - judge(maker(x).detach()).sigmoid().mean()).backward()
        judge_optimizer.step()
        maker_optimizer.zero_grad()
        judge(maker(x)).sigmoid().mean().backward()
        maker_optimizer.step()

        with torch.no_grad():
            made = maker_engine(mine)
        judge_engine.backward(
            judge_engine(mine[:, :2]).sigmoid().mean() - judge_engine(made).sigmoid().mean(), weight=len(mine)
        )
        judge_engine.step()
        maker_engine.backward(judge_engine.module(maker_engine(mine)).sigmoid().mean())
        maker_engine.step()
    assert plain.farthest(maker_engine.full_state_dict(), maker) < BOUND
    assert plain.farthest(judge_engine.full_state_dict(), judge) < BOUND


@pytest.mark.ranks(1, 2, timeout_s=60)
@pytest.mark.parametrize("teacher_is", ["plain", "engine"])
@pytest.mark.parametrize("zero", [0, 3])
def test_a_pupil_learns_from_a_frozen_teacher(zero: int, teacher_is: str, num_ranks: int) -> None:
    teacher = towers.seeded(lambda: Tower(4)).requires_grad_(False)
    (pupil, optimizer), engine = twins((None, zero), lambda: Tower(2))
    taught: Any = teacher
    if teacher_is == "engine":
        # An engine trains something: a number beside the teacher.
        holder = nn.ModuleDict({"teacher": towers.seeded(lambda: Tower(4)).requires_grad_(False)})
        holder.register_parameter("unused", nn.Parameter(torch.zeros((), dtype=torch.float64)))
        holder.forward = lambda x: holder["teacher"](x)  # type: ignore[method-assign]
        with plain.small_units():
            taught = sixfold.initialize(holder, config={"layout": {"zero": zero}})
    for number in range(3):
        x = towers.data(number)
        mine = x.chunk(num_ranks)[torch.distributed.get_rank() if num_ranks > 1 else 0]
        optimizer.zero_grad()
        (pupil(x) - teacher(x)).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            aim = taught(mine)
        engine.backward((engine(mine) - aim).square().mean())
        engine.step()
    assert plain.farthest(engine.full_state_dict(), pupil) < BOUND


@pytest.mark.ranks(1, 2)
def test_compute_in_bf16_keeps_a_master_in_fp32() -> None:
    """Over two ranks sums have no order, so the rows agree to the bit."""
    whole: list[dict[str, Tensor]] = []
    for zero in PRESETS:
        torch.manual_seed(3)
        with plain.small_units():
            engine = sixfold.initialize(
                Tower(),
                config={
                    "layout": {"zero": zero},
                    "precision": {"compute": "bf16"},
                    "optimizer": {"lr": 0.01},
                },
                loss_fn=towers.mean_square,
            )
        for number in range(3):
            share = towers.data(number).float().chunk(engine.data_ranks)[engine.data_rank]
            engine.train_step((share,))
        whole.append(engine.full_state_dict())
        assert {tensor.dtype for tensor in whole[-1].values()} == {torch.float32}
        assert {unit.working.dtype for unit in engine.state.units} == {torch.bfloat16}
    assert all(torch.equal(found[name], each) for found in whole for name, each in whole[0].items())
    assert any(not torch.equal(each, each.bfloat16().float()) for each in whole[0].values())
