"""The moving average of weights: the numbers of one process in every residency, shown, saved and priced."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sixfold
from sixfold.base.errors import StateError
from sixfold.checkpoint import open_checkpoint
from sixfold.engine import Engine
from sixfold.plan import PRESETS, persistent_memory
from sixfold.testing import Pool
from tests.ranks import plain, rows
from tests.ranks.rows import RESIDENCIES

STEPS, DECAY, LR = 5, 0.8, 0.05
MODEL = "recommender"


@cache
def by_hand(steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Weights, averages, and the loss of the averages on the first batch, in plain torch."""
    task = plain.TASKS[MODEL]
    model = task.build().double()
    trained = {name: part for name, part in model.named_parameters() if part.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=LR, momentum=0.9)
    averages = {name: part.detach().clone() for name, part in trained.items()}
    for step in range(steps):
        optimizer.zero_grad(set_to_none=False)
        task.loss(model, plain.cast(task.batch(step), torch.float64)).backward()
        optimizer.step()
        for name, part in trained.items():
            averages[name] = DECAY * averages[name] + (1 - DECAY) * part.detach()
    weights = {name: part.detach().clone() for name, part in trained.items()}
    with torch.no_grad():
        for name, part in trained.items():
            part.copy_(averages[name])
        loss = task.loss(model, plain.cast(task.batch(0), torch.float64)).item()
    return weights, averages, [loss]


def start(layout: dict[str, Any], dtype: torch.dtype = torch.float64, **precision: str) -> Engine:
    task = plain.TASKS[MODEL]
    return sixfold.initialize(
        task.build().to(dtype),
        config={
            "layout": layout,
            "batch": {"micro": 2},
            "precision": precision,
            "optimizer": {"name": "sgd", "lr": LR, "momentum": 0.9, "ema_decay": DECAY},
        },
        loss_fn=task.loss_fn,
    )


def share(engine: Engine, step: int) -> plain.Batch:
    places = plain.cuts(plain.NUM_SAMPLES, engine.data_ranks, "uneven", step)[engine.data_rank]
    return plain.rows(plain.cast(plain.TASKS[MODEL].batch(step), torch.float64), places)


def train(engine: Engine, steps: int) -> None:
    while engine.num_steps < steps:
        engine.train_step(share(engine, engine.num_steps))


def farthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((found[name].double() - each).abs().max()) for name, each in expected.items())


@pytest.mark.parametrize(("residency", "ranks"), rows.on(1, 3))
def test_averages_follow_one_process_and_leave_the_weights_alone(
    residency: str, ranks: int, rank_pool: Pool
) -> None:
    rank_pool.run(follow, RESIDENCIES[residency], ranks=ranks)


def follow(layout: dict[str, Any]) -> None:
    weights, averages, (loss,) = by_hand(STEPS)
    engine = start(layout)
    train(engine, 2)
    with engine.ema():  # in the middle, which must not show afterwards
        engine.eval_step(share(engine, 0))
    train(engine, STEPS)
    assert farthest(engine.full_state_dict(), weights) < 1e-10
    assert farthest(engine.ema_state_dict(), averages) < 1e-10
    assert farthest(averages, weights) > 1e-3
    frozen = plain.TASKS[MODEL].build().double().get_parameter("frozen.weight")
    assert torch.equal(engine.ema_state_dict()["frozen.weight"], frozen)
    batch = share(engine, 0)
    engine.module(*(batch[name] for name in ("bag", "user", "is_rare")))  # what it left whole is not averaged
    with engine.ema() as module:
        assert module is engine.module
        assert engine.eval_step(share(engine, 0)).loss == pytest.approx(loss, rel=1e-12)
    assert engine.eval_step(share(engine, 0)).loss != pytest.approx(loss, rel=1e-6)
    assert farthest(engine.full_state_dict(), weights) < 1e-10


@pytest.mark.ranks(2)
@pytest.mark.parametrize("zero", PRESETS)
def test_averages_are_as_wide_as_masters_and_priced(zero: int) -> None:
    engine = start({"zero": zero}, torch.float32, compute="bf16")
    task = plain.TASKS[MODEL]
    for step in range(3):
        engine.train_step(plain.rows(task.batch(step), range(3)))
    memory = engine.memory()
    assert memory == persistent_memory(engine.plan, num_moments=1)
    assert memory.average == memory.master > 0
    assert "average" in str(memory)
    averages = engine.ema_state_dict()
    with engine.ema(), torch.no_grad():
        if zero < 3:  # parameters are there to be looked at
            for name, parameter in engine.module.named_parameters():
                assert torch.equal(parameter, averages[name].bfloat16()), name
                if parameter.requires_grad:
                    parameter.zero_()  # forgotten
    weights = engine.full_state_dict()
    assert all(bool(part.any()) for part in weights.values())
    assert farthest(engine.ema_state_dict(), averages) == 0.0


ROUTES = [({"zero": 0}, 2, {"zero": 3}, 3), ({"zero": 2, "shard": 2}, 4, {"zero": 1}, 2)]


@pytest.mark.parametrize(("before", "ranks", "after", "other_ranks"), ROUTES)
def test_a_checkpoint_holds_the_average_for_any_residency(
    before: dict[str, int],
    ranks: int,
    after: dict[str, int],
    other_ranks: int,
    tmp_path: Path,
    rank_pool: Pool,
) -> None:
    rank_pool.run(first_part, before, tmp_path / "saved", ranks=ranks, timeout_s=60)
    rank_pool.run(second_part, after, tmp_path / "saved", ranks=other_ranks, timeout_s=60)


def first_part(layout: dict[str, int], folder: Path) -> None:
    engine = start(layout)
    train(engine, 3)
    engine.save(folder)


def second_part(layout: dict[str, int], folder: Path) -> None:
    engine = start(layout)
    engine.load(folder)
    train(engine, STEPS)
    weights, averages, _ = by_hand(STEPS)
    assert farthest(engine.full_state_dict(), weights) < 1e-10
    assert farthest(engine.ema_state_dict(), averages) < 1e-10


@pytest.mark.ranks(2)
def test_a_checkpoint_without_an_average_starts_one_and_one_too_many_is_left(tmp_path: Path) -> None:
    task = plain.TASKS[MODEL]
    without = sixfold.initialize(
        task.build().double(),
        config={"optimizer": {"name": "sgd", "lr": LR, "momentum": 0.9}},
        loss_fn=task.loss_fn,
    )
    train(without, 2)
    without.save(tmp_path / "without")
    engine = start({"zero": 2})
    engine.load(tmp_path / "without")
    assert farthest(engine.ema_state_dict(), without.full_state_dict()) == 0.0
    train(engine, 3)
    engine.save(tmp_path / "with")
    without.load(tmp_path / "with")
    assert without.bound.state_specs()["mix.weight"].keys() == {"momentum_buffer"}
    with pytest.raises(StateError, match="ema_decay = None"):
        without.ema_state_dict()


@pytest.mark.ranks(1, 3)
def test_a_save_in_the_background_holds_the_average_of_its_moment(tmp_path: Path) -> None:
    engine = start({"zero": 2}, torch.float32, compute="bf16")
    train(engine, 2)
    before = engine.ema_state_dict()
    engine.save(tmp_path / "now", wait=False)
    train(engine, 3)
    engine.wait_for_save()
    saved = dict(open_checkpoint(tmp_path / "now").optimizer())
    trained = [name for name, part in engine.module.named_parameters() if part.requires_grad]
    for name in trained:
        assert torch.equal(saved[name]["ema"], before[name]), name
    after = engine.ema_state_dict()
    assert farthest(after, before) > 0
    engine.load(tmp_path / "now")
    assert farthest(engine.ema_state_dict(), before) == 0.0


@pytest.mark.ranks(1, 2)
def test_of_a_part_that_is_loaded_the_average_starts_anew(tmp_path: Path) -> None:
    giver, taker = start({"zero": 0}), start({"zero": 2})
    train(giver, 2)
    train(taker, 3)
    kept = taker.ema_state_dict()
    giver.save(tmp_path / "part", only="mix.*")
    taker.load(tmp_path / "part")
    found, given = taker.ema_state_dict(), giver.full_state_dict()
    for name in found:
        assert torch.equal(found[name], (given if name.startswith("mix") else kept)[name]), name
    assert taker.num_steps == 3


@pytest.mark.ranks(2)
def test_averaged_weights_are_lent_for_evaluation_only(tmp_path: Path) -> None:
    engine = start({"zero": 1})
    train(engine, 1)
    before = engine.full_state_dict()
    with engine.ema():
        for refused in (
            lambda: engine.train_step(share(engine, 1)),
            engine.step,
            engine.full_state_dict,
            lambda: engine.save(tmp_path),
            lambda: engine.gathered().__enter__(),
        ):
            with pytest.raises(StateError, match="inside `with engine"):
                refused()
    with pytest.raises(RuntimeError, match="mine"), engine.ema():
        raise RuntimeError("mine")
    assert farthest(engine.full_state_dict(), before) == 0.0
    train(engine, 2)
