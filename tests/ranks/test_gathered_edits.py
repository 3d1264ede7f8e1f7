"""What users do between and within passes under cut parameters: edits, errors that they catch, calls that
only some ranks make."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sixfold.base.errors import MeshError, StateError
from sixfold.engine import Engine
from sixfold.testing import Pool
from tests.ranks import plain, rows, towers
from tests.ranks.towers import Block, Tower

BOUND = 1e-10
BF16 = {"compute": "bf16"}


# Edits.


def reinitialised(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "blocks.1" in name:
            nn.init.constant_(parameter, 0.125)


def reset(model: Any, rank: int | None = None) -> None:
    """By the modules' own rules, which draw: unlike numbers on each rank, of which rank 0's count."""
    if rank is None:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rank)
        for block in model.blocks:
            block.up.reset_parameters()


EDITS: dict[str, Callable[[Any], object]] = {
    "clamp_": lambda model: [parameter.clamp_(-0.1, 0.1) for parameter in model.parameters()],
    "mul_": lambda model: model.blocks[0].up.weight.mul_(0.5),
    "a new start": reinitialised,
    ".data": lambda model: model.head.weight.data.mul_(-1.0),
    "load_state_dict": lambda model: model.load_state_dict(
        {name: 0.9 * tensor for name, tensor in model.state_dict().items()}
    ),
    "reset_parameters": reset,
    "one number": lambda model: model.blocks[1].down.bias.__setitem__(2, 1.0),
}


@pytest.mark.parametrize("case", rows.carried(1, 2, 3), ids=str)
def test_edits_of_gathered_parameters_hold(case: tuple[str, int, str], rank_pool: Pool) -> None:
    for found in rank_pool.run(edit_gathered, rows.layout_of(*case), {}, ranks=case[1], timeout_s=60):
        assert plain.farthest(found, edited()) < BOUND


@pytest.mark.parametrize("case", rows.carried(2), ids=str)
def test_edits_beside_wider_masters_hold(case: tuple[str, int, str], rank_pool: Pool) -> None:
    """As on one rank, but for the order of sums, which shows in bf16."""
    expected = edited_in_bf16(rank_pool)
    for found in rank_pool.run(edit_gathered, rows.layout_of(*case), BF16, ranks=case[1], timeout_s=60):
        assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 2e-2


@cache
def edited_in_bf16(pool: Pool) -> dict[str, Tensor]:
    whole: dict[str, Tensor] = pool.run(edit_gathered, {"zero": 0}, BF16, ranks=1)[0]
    return whole


def edit_gathered(layout: dict[str, Any], precision: dict[str, str]) -> dict[str, Tensor]:
    engine = towers.start(lambda: Tower(2), layout, precision=precision)
    for edit in EDITS.values():
        towers.step(engine, "even")
        with engine.gathered() as model:
            edit(model)
    towers.step(engine, "even")
    whole = engine.full_state_dict()
    engine.close()
    return whole


@cache
def edited() -> nn.Module:
    """The same in plain torch."""
    model = towers.seeded(lambda: Tower(2))
    optimizer = torch.optim.SGD(model.parameters(), **towers.RATE)
    for step, edit in enumerate([*EDITS.values(), None]):
        optimizer.zero_grad()
        towers.mean_square(model(towers.data(step)), None).backward()
        optimizer.step()
        if edit is not None:
            with torch.no_grad():
                edit(model)
    return model


@pytest.mark.parametrize("case", [case for case in rows.carried(1, 2, 3) if case[0] in "012"], ids=str)
def test_whole_parameters_are_edited_at_any_time(case: tuple[str, int, str], rank_pool: Pool) -> None:
    """By the same lines on every rank, which act once."""
    for found in rank_pool.run(edit_whole, rows.layout_of(*case), ranks=case[1], timeout_s=60):
        assert plain.farthest(found, edited()) < BOUND


def edit_whole(layout: dict[str, Any]) -> dict[str, Tensor]:
    engine = towers.start(lambda: Tower(2), layout)
    model: Any = engine.module
    for edit in EDITS.values():
        towers.step(engine, "even")
        with torch.no_grad():
            reset(model, 0) if edit is reset else edit(model)
    towers.step(engine, "even")
    whole = engine.full_state_dict()
    engine.close()
    return whole


@pytest.mark.parametrize("case", rows.carried(1, 2, 3), ids=str)
def test_averages_of_ones_own_are_swapped_in_and_out(case: tuple[str, int, str], rank_pool: Pool) -> None:
    """An evaluation with other weights in between changes nothing of training."""
    reference, means = towers.seeded(lambda: Tower(2)), towers.seeded(lambda: Tower(2))
    optimizer = torch.optim.SGD(reference.parameters(), **towers.RATE)
    losses = []
    for number in range(3):
        optimizer.zero_grad()
        towers.mean_square(reference(towers.data(number)), None).backward()
        optimizer.step()
        with torch.no_grad():
            for mean, parameter in zip(means.parameters(), reference.parameters(), strict=True):
                mean.lerp_(parameter, 0.5)
            losses.append(towers.mean_square(means(towers.data(number)), None).item())
    for found, evaluated in rank_pool.run(swap_averages, rows.layout_of(*case), ranks=case[1], timeout_s=60):
        assert evaluated == pytest.approx(losses, rel=1e-12)
        assert plain.farthest(found, reference) < BOUND


def swap_averages(layout: dict[str, Any]) -> tuple[dict[str, Tensor], list[float]]:
    engine = towers.start(lambda: Tower(2), layout)
    averages, losses = engine.full_state_dict(), []
    for number in range(3):
        towers.step(engine, "even")
        for name, numbers in engine.full_state_dict().items():
            averages[name].lerp_(numbers, 0.5)
        kept = swapped(engine, averages)
        mine = towers.parts(number, engine.data_ranks, "even")[engine.data_rank]
        losses.append(engine.eval_step((torch.cat(mine),)).loss)
        swapped(engine, kept)
    whole = engine.full_state_dict()
    engine.close()
    return whole, losses


def swapped(engine: Engine, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
    """What was there before, in exchange for `numbers`."""
    with engine.gathered() as model:
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.copy_(numbers[name])
    return before


@pytest.mark.ranks(2)
def test_only_the_units_that_are_asked_for_are_gathered() -> None:
    engine = towers.start(Tower, {"zero": 3})
    model: Any = engine.module
    with towers.watched(engine) as watch:
        with engine.gathered([model.blocks[2].up.weight, model.blocks[4].down.bias]):
            assert watch.gathers == towers.blocks([2, 4])
            model.blocks[2].up.weight.fill_(0.25)
            with pytest.raises(StateError, match=r"blocks\.3\.up\.weight"):
                model.blocks[3].up.weight.sum()
        assert watch.whole() == []
    whole = engine.full_state_dict()
    assert (whole["blocks.2.up.weight"] == 0.25).all()


@pytest.mark.ranks(2)
def test_edits_where_nothing_is_gathered_are_refused() -> None:
    engine = towers.start(Tower, {"zero": 3})
    model: Any = engine.module
    towers.step(engine)
    before = engine.full_state_dict()
    edits: dict[str, Callable[[], object]] = {
        **{
            name: (lambda edit=edit: edit(model)) for name, edit in EDITS.items() if name != "load_state_dict"
        },
        "numbers of one's own": lambda: setattr(model.head.weight, "data", torch.zeros(2, towers.WIDTH)),
    }
    for edit in edits.values():
        with torch.no_grad(), pytest.raises(StateError, match="outside of its forward and backward"):
            edit()
    assert all(torch.equal(each, before[name]) for name, each in engine.full_state_dict().items())


class Clamping(Block):
    """Keeps its numbers small by itself, as some models do."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.up.weight.clamp_(-0.2, 0.2)
        return super().forward(x)


@pytest.mark.ranks(1, 2)
def test_a_model_that_edits_itself_is_refused_by_name() -> None:
    engine = towers.start(lambda: Tower(3, Clamping), {"zero": 3})
    with pytest.raises(
        StateError, match=r"blocks\.\d\.up\.weight changed in place during a forward"
    ) as caught:
        towers.step(engine, "even")
    assert "layout.zero = 2" in caught.value.fix


@pytest.mark.ranks(1, 2)
def test_gradients_of_gradients_are_refused_and_others_go_on(num_ranks: int) -> None:
    engine = towers.start(Tower, {"zero": 3})
    for _ in range(2):
        x = towers.data(0)[:2].requires_grad_()
        (slope,) = torch.autograd.grad(engine.module(x).sum(), x)
        reference = towers.seeded(Tower)
        (expected,) = torch.autograd.grad(reference(x).sum(), x)
        assert torch.allclose(slope, expected, rtol=0, atol=1e-12)
        with pytest.raises(StateError, match=r"create_graph=True through blocks\.5"):
            torch.autograd.grad(engine.module(x).sum(), x, create_graph=True)
    if engine.data_rank == 0:  # what one rank alone asks for, the others serve
        (slope,) = torch.autograd.grad(engine.module(x).sum(), x)
        assert torch.allclose(slope, expected, rtol=0, atol=1e-12)
    for number in range(2):
        towers.step(engine, "uneven", ("written out", "train_step")[number])
    assert plain.farthest(engine.full_state_dict(), towers.reference(Tower, 2, num_ranks)) < BOUND


# Errors that are caught.


class Bitter(torch.autograd.Function):
    """The identity, which fails in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise ValueError("poison")


class Poisoned(Tower):
    """Fails in its third block on samples that begin with a large number, or in its backward."""

    def run(self, x: Tensor) -> Tensor:
        for place, block in enumerate(self.blocks):
            if place == 2 and (x.detach() > 50).any():
                raise ValueError("poison")
            if place == 2 and (x.detach() < -50).any():
                x = Bitter.apply(x)  # type: ignore[no-untyped-call]
            x = block(x)
        return x


def poison(part: Tensor) -> Tensor:
    return torch.full_like(part, 1e4)


@pytest.mark.ranks(1, 2, 3, timeout_s=60)
@pytest.mark.parametrize("who", ["all", "one"])
@pytest.mark.parametrize("zero", [0, 3])
def test_a_forward_that_failed_counts_for_nothing(zero: int, who: str, num_ranks: int) -> None:
    reference = towers.reference(Poisoned, 4, num_ranks, "uneven")
    engine = towers.start(Poisoned, {"zero": zero})
    for number in range(4):
        for place, part in enumerate(towers.parts(number, num_ranks, "uneven")[engine.data_rank]):
            if number > 0 and place == number % 2 and (who == "all" or engine.data_rank == 0):
                with pytest.raises(ValueError, match="poison"):
                    engine(poison(part))
            engine.backward(engine(part).square().mean())
        engine.step()
    assert plain.farthest(engine.full_state_dict(), reference) < BOUND


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_an_update_that_failed_on_all_ranks_can_be_left_out(zero: int, num_ranks: int) -> None:
    reference = towers.reference(Poisoned, 4, num_ranks, "even")
    engine = towers.start(Poisoned, {"zero": zero})
    for number in range(4):
        if number in (1, 2):
            share = torch.cat(towers.parts(number, num_ranks, "even")[engine.data_rank])
            # In the last micro-batch, behind some that went well; in backward when sums are under way.
            share[-1] = 1e4 if number == 1 else -1e4
            with pytest.raises(ValueError, match="poison"):
                engine.train_step((share,))
        towers.step(engine, "even")
    assert plain.farthest(engine.full_state_dict(), reference) < BOUND
    assert towers.live_bytes(engine) == 0 or zero < 3


# Calls.


@pytest.mark.ranks(2, 3)
def test_ranks_that_make_different_calls_are_told_on_all_of_them(tmp_path: Path) -> None:
    calls: list[Callable[[Engine], object]] = [
        lambda engine: engine.save(tmp_path / "saved"),
        lambda engine: engine.train_step((towers.data(0)[:2],)),
        lambda engine: engine.full_state_dict(),
        lambda engine: engine.step(),
        lambda engine: engine.eval_step((towers.data(0)[:2],)),
        lambda engine: engine.gathered().__enter__(),
    ]
    engine = towers.start(Tower, {"zero": 3})
    for number, call in enumerate(calls):
        towers.step(engine)
        other = calls[(number + 1) % len(calls)]
        with pytest.raises(MeshError, match=r"rank 0 came to \w+; rank 1 came to \w+"):
            (call if engine.data_rank == 0 else other)(engine)


@pytest.mark.ranks(2)
def test_what_only_one_rank_begins_is_served_and_then_told() -> None:
    engine = towers.start(Tower, {"zero": 3})
    if engine.data_rank == 0:
        engine.backward(engine(towers.data(0)[:2]).square().mean())
    with pytest.raises(MeshError, match="rank 0 came to step; rank 1 came to gradients") as caught:
        engine.step() if engine.data_rank == 0 else engine.gradients()
    assert "on every rank" in caught.value.fix
    result = engine.step()
    assert result.samples == 2


@pytest.mark.ranks(2)
def test_several_engines_must_be_called_alike() -> None:
    """A rank in one engine's step cannot serve another engine's forward."""
    one, other = (towers.start(Tower, {"zero": 3}) for _ in range(2))
    with pytest.raises(
        MeshError, match=r"rank 0 came to forward of Tower .*; rank 1 came to step of Tower"
    ) as caught:
        one(towers.data(0)[:2]) if one.data_rank == 0 else other.step()
    assert "equally many micro-batches" in caught.value.fix


@pytest.mark.ranks(1, 2)
def test_a_block_by_itself_is_refused_outside_of_gathered() -> None:
    engine = towers.start(Tower, {"zero": 3})
    model: Any = engine.module
    x = torch.ones(2, towers.WIDTH, dtype=torch.float64)
    with pytest.raises(StateError, match=r"the block of blocks\.1\.up\.weight runs by itself"):
        model.blocks[1](x)
    with engine.gathered():
        whole = model.blocks[1](x)
    assert torch.equal(whole, towers.seeded(Tower).blocks[1](x))  # type: ignore[index]
    towers.step(engine)


@pytest.mark.ranks(3)
def test_nobody_takes_over_an_edit_while_another_still_reads() -> None:
    """Where ranks have cut parameters in common, a slice that is written is seen by all."""
    engine = towers.start(Tower, {"zero": 3, "transport": "host"})
    weight = engine.module.blocks[2].up.weight  # type: ignore[union-attr,index]
    with engine.gathered([weight]):
        before = weight.clone()
        if engine.data_rank == 0:
            weight.add_(1)
        if engine.data_rank == 2:
            time.sleep(0.1)
            assert torch.equal(weight, before)
    assert torch.equal(engine.full_state_dict()["blocks.2.up.weight"], before + 1)


@pytest.mark.ranks(3)
def test_an_edit_that_fails_everywhere_is_undone_in_common_memory() -> None:
    engine = towers.start(Tower, {"zero": 3, "transport": "host"})
    before = engine.full_state_dict()

    def edit() -> None:
        with engine.gathered() as whole:
            for parameter in whole.parameters():
                parameter.fill_(1 + engine.data_rank)
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="middle"):
        edit()
    for name, numbers in engine.full_state_dict().items():
        assert torch.equal(numbers, before[name]), name
    with engine.gathered() as whole:
        kept = whole.state_dict()
    towers.step(engine)
    for name, numbers in kept.items():
        assert torch.equal(numbers, before[name]), name
