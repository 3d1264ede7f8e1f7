"""Reducing every micro-batch, or holding gradients and reducing once: the same numbers in every residency,
and the bytes that the plan says, held and sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import sixfold
from sixfold.engine import Engine
from sixfold.plan import persistent_memory, update_traffic
from tests.ranks import plain, rows

MODEL, STEPS, MICRO = "recommender", 4, 2


def start(layout: dict[str, Any], **precision: str) -> Engine:
    task = plain.TASKS[MODEL]
    kind, settings = plain.OPTIMIZERS["adamw"]
    model = task.build() if precision else task.build().double()
    return sixfold.initialize(
        model,
        config={"layout": layout, "batch": {"micro": MICRO}, "precision": precision},
        optimizer=kind(plain.groups_of(model, settings, 2)),
        loss_fn=task.loss_fn,
    )


def train(engine: Engine, steps: int, shares: str) -> None:
    for step in range(steps):
        batch = plain.TASKS[MODEL].batch(step)
        places = plain.cuts(plain.NUM_SAMPLES, engine.data_ranks, shares, step)[engine.data_rank]
        engine.train_step(plain.rows(batch, places))


@pytest.mark.ranks
@pytest.mark.parametrize(("zero", "num_ranks"), rows.presets(1, 3))
@pytest.mark.parametrize("reduce", ["each", "last"])
def test_both_ways_follow_one_process(reduce: str, zero: int) -> None:
    engine = start({"zero": zero, "reduce": reduce})
    assert engine.plan.residency.reduces_each == (reduce == "each")
    train(engine, STEPS, "uneven")
    reference = plain.plain_run(MODEL, torch.float64, STEPS, "adamw", 2, None)
    found = engine.full_state_dict()
    for name, each in reference.model.named_parameters():
        assert torch.allclose(found[name], each.detach(), rtol=0, atol=1e-10), name
    assert engine.last is not None
    assert engine.last.grad_norm == pytest.approx(reference.grad_norms[-1], rel=1e-10, abs=0)
    assert engine.memory() == persistent_memory(engine.plan, num_moments=2)


class Wire:
    """Counts what this rank hands over to others; small messages of numbers are left out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
        self.sent = 0.0
        isend, all_reduce = dist.isend, dist.all_reduce

        def counted_isend(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
            self.sent += tensor.nbytes
            return isend(tensor, *args, **options)

        def counted_all_reduce(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
            if tensor.numel() >= 32:
                self.sent += 2 * tensor.nbytes * (ranks - 1) / ranks
            return all_reduce(tensor, *args, **options)

        monkeypatch.setattr(dist, "isend", counted_isend)
        monkeypatch.setattr(dist, "all_reduce", counted_all_reduce)


LAYOUTS = [
    {"zero": 0},
    {"zero": 1},
    {"zero": 2},
    {"zero": 2, "shard": 2},
    {"zero": 2, "optimizer": "all", "shard": 2},
]


@pytest.mark.ranks(4)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("reduce", ["each", "last"])
def test_the_plan_says_the_bytes_on_the_wire(
    reduce: str, layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = Wire(monkeypatch, dist.get_world_size())  # first: exchanges are prepared once
    engine = start({**layout, "reduce": reduce, "transport": "network"}, compute="bf16", reduce="bf16")
    train(engine, 1, "even")  # 3 samples a rank: two micro-batches
    wire.sent = 0.0
    train(engine, 1, "even")
    priced = update_traffic(engine.plan, num_micro=2)
    assert wire.sent == priced.total > 0
    once = update_traffic(engine.plan, num_micro=1)
    assert priced.reduce == once.reduce * (2 if reduce == "each" else 1)
    assert priced.publish == once.publish
    assert "reduce" in str(priced)


@pytest.mark.ranks(2)
def test_what_is_held_and_what_is_sent_are_traded() -> None:
    """Preset 2 as it is, and held: the memory of the plan against its traffic."""
    each, last = start({"zero": 2}), start({"zero": 2, "reduce": "last"})
    assert persistent_memory(each.plan, 2).gradients * 2 == persistent_memory(last.plan, 2).gradients
    assert update_traffic(each.plan, 3).reduce == 3 * update_traffic(last.plan, 3).reduce
    assert each.plan.residency == start({"zero": 1, "reduce": "each"}).plan.residency
