"""Cut parameters: how often and when they are gathered, whoever runs what, and what must not be done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sixfold
from sixfold.base.errors import StateError
from sixfold.engine import Engine
from sixfold.mesh.scratch import Scratch
from sixfold.state.windows import MOST_UNDER_WAY
from tests.ranks import plain, towers
from tests.ranks.towers import Tower

BOUND = 1e-10
HYBRIDS: tuple[dict[str, Any], ...] = (
    {"zero": 3, "shard": 2},
    {"zero": 3, "shard": 2, "gradients": "all", "optimizer": "all"},
    {"zero": 2, "shard": 2, "gradients": "all", "optimizer": "all"},
    {"zero": 3, "gradients": "whole"},
    {"zero": 3, "parameters": "all", "gradients": "all", "optimizer": "all", "shard": 2},
)


# How often.


class Recomputed(Tower):
    is_reentrant = False

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.is_reentrant)
        return x


class RecomputedReentrant(Recomputed):
    is_reentrant = True


DOWN = towers.blocks(range(4, -1, -1))
PASSES = [*["", *towers.blocks(range(6))], *DOWN]
"""The gathers of a forward and its backward: what backward begins with stays whole."""


@pytest.mark.ranks(1, 2)
def test_a_pass_gathers_each_unit_once_and_two_at_a_time() -> None:
    for model in (Tower, Recomputed, RecomputedReentrant):
        reference = towers.reference(model, 3, sixfold_ranks(), "even")
        engine = towers.start(model, {"zero": 3, "transport": "network"})
        num_micro = -(-towers.NUM_SAMPLES // sixfold_ranks() // towers.MICRO)
        with towers.watched(engine) as watch:
            towers.step(engine, "even")
            for _ in range(2):
                watch.clear()
                towers.step(engine, "even")
                assert watch.gathers == PASSES * num_micro, model
                assert watch.most == 2
                assert watch.ahead > 4 * num_micro
                assert towers.live_bytes(engine) == 0
        assert plain.farthest(engine.full_state_dict(), reference) < BOUND
        assert towers.live_bytes(engine) == 0


def sixfold_ranks() -> int:
    return torch.distributed.get_world_size()


@pytest.mark.ranks(1, 2, 3)
def test_few_units_have_whole_gradients_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first backward on, also on ranks that only serve; more are never kept for later use."""
    engine = towers.start(lambda: Tower(14), {"zero": 3, "transport": "network"})
    size = engine.state.units[-1].plan.numel
    out, most, take, give = 0, 0, Scratch.take, Scratch.give

    def counted_take(scratch: Scratch, numel: int, dtype: torch.dtype) -> Tensor:
        nonlocal out, most
        out += numel == size
        most = max(most, out)
        return take(scratch, numel, dtype)

    def counted_give(scratch: Scratch, tensor: Tensor) -> None:
        nonlocal out
        out -= tensor.numel() == size
        give(scratch, tensor)

    monkeypatch.setattr(Scratch, "take", counted_take)
    monkeypatch.setattr(Scratch, "give", counted_give)
    for loop in ("train_step", "written_out"):
        for _ in range(2):
            towers.step(engine, "empty", loop)
    assert out == 0
    # On their way, the one that follows, and the one that backward is in.
    assert 2 <= most <= MOST_UNDER_WAY + 2


@pytest.mark.ranks(1)
def test_a_gradient_behind_its_reduction_is_told() -> None:
    engine = towers.start(Tower, {"zero": 3})
    for _ in range(2):
        output = engine(towers.data(0)[:2])
        engine.state.begin()
        engine.state.open_reduce()
        engine.state.complete(0)
        output.sum().backward()
        with pytest.raises(StateError, match=r"blocks\.5\.\S+ received a gradient after its unit was handed"):
            engine.state.finish_reduce()
        engine.state.end()
    towers.step(engine)


@pytest.mark.ranks(2)
def test_nothing_is_gathered_ahead_without_a_budget() -> None:
    for budget_mb, num_ahead in ((0.0, 0), (0.001, 0), (0.003, 1), (0.009, 4)):  # a unit has 2048 bytes
        engine = towers.start(Tower, {"zero": 3, "prefetch_mb": budget_mb, "transport": "network"})
        with towers.watched(engine) as watch:
            towers.step(engine)
            watch.clear()
            towers.step(engine)
        assert (watch.ahead > 0) == (num_ahead > 0), budget_mb
        assert watch.most == 1 + num_ahead, budget_mb


@pytest.mark.ranks(2)
def test_two_forwards_before_two_backwards() -> None:
    """Each backward gathers again what the one before has dropped."""
    engine = towers.start(Tower, {"zero": 3})
    x = towers.data(0)[:2]
    found: list[list[str]] = []
    with towers.watched(engine) as watch:

        def took() -> None:
            found.append(watch.gathers)
            watch.clear()

        for _ in range(2):
            found.clear()
            outputs = [engine(x), engine(2 * x)]
            took()
            for output in outputs:
                engine.backward(output.square().mean())
                took()
            engine.step()
    forwards, first, second = found
    assert forwards == ["", *towers.blocks(range(6)), *towers.blocks(range(5))]
    assert first == DOWN
    assert second == ["", "blocks.5", *DOWN]


@pytest.mark.ranks(2, timeout_s=60)
def test_recompute_of_hugging_face_gathers_no_more() -> None:
    task = plain.TASKS["llama"]
    for name, value in (("llama", True), ("llama", False), ("gpt2", None)):
        task = plain.TASKS[name]
        reference = task.build().double()
        model: Any = task.build().double()
        if value is not None:
            model.gradient_checkpointing_enable({"use_reentrant": value})
        made = torch.optim.SGD(model.parameters(), lr=0.1)
        with plain.small_units():
            engine = sixfold.initialize(model, config={"layout": {"zero": 3}}, optimizer=made)
        optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
        with towers.watched(engine) as watch:
            for step in range(2):
                batch = plain.cast(task.batch(step), torch.float64)
                task.loss(reference.train(), batch).backward()
                optimizer.step()
                optimizer.zero_grad()
                places = plain.cuts(plain.NUM_SAMPLES, 2, "uneven", step)[engine.data_rank]
                watch.clear()
                engine.module.train()
                engine.train_step(plain.rows(batch, places))
        names = sorted({name for name in watch.gathers if name})
        assert [name for name in watch.gathers if name] == [*names, *names[-2::-1]], (name, value)
        assert plain.farthest(engine.full_state_dict(), reference) < 1e-9


# The same numbers, whoever runs how much.


@pytest.mark.ranks(1, 2, 3)
def test_every_loop_follows_one_process_whatever_the_shares() -> None:
    steps = 4
    for shares in ("even", "uneven", "empty"):
        reference = towers.reference(Tower, steps, sixfold_ranks(), shares)
        for loop in ("train_step", "written_out"):
            engine = towers.start(Tower, {"zero": 3})
            for number in range(steps):
                towers.step(engine, shares, loop)
                others_look_on(engine, number)
            assert plain.farthest(engine.full_state_dict(), reference) < BOUND, (shares, loop)
            assert towers.live_bytes(engine) == 0


def others_look_on(engine: Engine, number: int) -> None:
    """Evaluation in between: on all ranks, on some more often, and rank 0 sampling by itself."""
    if number == 0:
        engine.eval_step((towers.data(0)[: engine.data_rank],))
    if number == 1:
        with torch.no_grad():
            for _ in range(engine.data_rank + 1):
                engine(towers.data(0)[:1])
    if number == 2 and engine.data_rank == 0:
        with torch.no_grad():
            engine.module(towers.data(0)[:1])
        engine.module(towers.data(0)[:1])


@pytest.mark.ranks(4, timeout_s=60)
def test_groups_and_secondary_copies_follow_one_process() -> None:
    for layout in HYBRIDS:
        for loop, shares in (("train_step", "uneven"), ("written_out", "empty")):
            reference = towers.reference(Tower, 3, 4, shares)
            engine = towers.start(Tower, layout)
            for _ in range(3):
                towers.step(engine, shares, loop)
            assert plain.farthest(engine.full_state_dict(), reference) < BOUND, (layout, loop)


@pytest.mark.ranks(1, 3)
def test_two_losses_of_one_forward() -> None:
    def one(output: Tensor) -> Tensor:
        return output.square().mean()

    def other(output: Tensor) -> Tensor:
        return output.sin().mean()

    reference = towers.reference(
        Tower, 3, sixfold_ranks(), "empty", loss=lambda out, batch: one(out) + other(out)
    )
    engine = towers.start(Tower, {"zero": 3})
    for number in range(3):
        for part in towers.parts(number, engine.data_ranks, "empty")[engine.data_rank]:
            output = engine(part)
            engine.backward(one(output), retain_graph=True)
            engine.backward(other(output))
        engine.step()
    assert plain.farthest(engine.full_state_dict(), reference) < BOUND


class Interruptible(Tower):
    """Somebody presses Ctrl-C in its middle."""

    is_interrupted = False

    def run(self, x: Tensor) -> Tensor:
        if self.is_interrupted:
            self.blocks[0](x)
            raise KeyboardInterrupt
        return super().run(x)


@pytest.mark.ranks(1, 2)
def test_a_forward_that_was_interrupted_may_be_followed_by_any_call() -> None:
    engine = towers.start(Interruptible, {"zero": 3})
    module, x = engine.module, towers.data(0)[:2]
    assert isinstance(module, Interruptible)

    def evaluated() -> float:
        with torch.no_grad():
            return float(engine(x).square().mean())

    def differentiated() -> float:
        loss = towers.mean_square(engine(x), x)
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    loss = evaluated()
    for goes_on in (
        evaluated,
        lambda: engine.eval_step(x).loss,
        differentiated,
        lambda: engine.train_step(x),
    ):
        for is_learning in (False, True):
            module.is_interrupted = True
            with pytest.raises(KeyboardInterrupt), torch.set_grad_enabled(is_learning):
                engine(x)
            with pytest.raises(KeyboardInterrupt), engine.gathered():
                module(x)
            module.is_interrupted = False
        assert goes_on() == pytest.approx(loss, rel=1e-12)
        loss = evaluated()
    engine.close()


class Wandering(Tower):
    """Samples say which of the blocks they take."""

    def run(self, x: Tensor) -> Tensor:
        for place, block in enumerate(self.blocks):
            if x[0, 0] * 1000 % 2 < 1 or place == 3:
                x = block(x)
        return x


@pytest.mark.ranks(1, 2, 3)
def test_ranks_that_take_other_ways_through_the_model() -> None:
    """From the first step on: the order is settled by ranks that want different units."""
    reference = towers.reference(Wandering, 4, sixfold_ranks(), "empty")
    for loop in ("train_step", "written_out"):
        engine = towers.start(Wandering, {"zero": 3})
        for _ in range(4):
            towers.step(engine, "empty", loop)
        assert plain.farthest(engine.full_state_dict(), reference) < BOUND, loop


class ByRank(Tower):
    """Blocks in rising order on even ranks and in falling order on odd ones."""

    def run(self, x: Tensor) -> Tensor:
        is_odd = torch.distributed.get_rank() % 2
        for block in reversed(self.blocks) if is_odd else self.blocks:
            x = block(x)
        return x


@pytest.mark.ranks(2, 3)
def test_opposite_orders_hang_nobody() -> None:
    """The first pass gathers each unit where the first rank wants it; what is wanted again stays whole."""
    losses: dict[int, list[float]] = {}
    for zero in (0, 3):
        engine = towers.start(ByRank, {"zero": zero})
        losses[zero] = [engine.train_step((towers.data(step)[engine.data_rank :],)) for step in range(3)]
    assert losses[3] == pytest.approx(losses[0], rel=1e-12)
