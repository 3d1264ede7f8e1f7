"""State that is cut over ranks: whatever the residency, the same numbers, the bytes that the plan says, and
checkpoints that load in any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sixfold
from sixfold.checkpoint import open_checkpoint
from sixfold.engine import Engine
from sixfold.plan import PRESETS, Memory, persistent_memory
from sixfold.testing import Pool
from tests.ranks import plain, towers

STEPS = 5
Layout = dict[str, Any]


def start(name: str, layout: Layout, optimizer: str = "adamw", num_groups: int = 2, micro: int = 2) -> Engine:
    task = plain.TASKS[name]
    model = task.build().double()
    kind, settings = plain.OPTIMIZERS[optimizer]
    made = kind(plain.groups_of(model, settings, num_groups))
    config = {"layout": layout, "batch": {"micro": micro}}
    return sixfold.initialize(model, config=config, optimizer=made, loss_fn=task.loss_fn)


def train(engine: Engine, name: str, steps: int, shares: str = "uneven") -> None:
    task = plain.TASKS[name]
    for step in range(engine.num_steps, steps):
        batch = plain.cast(task.batch(step), torch.float64)
        places = plain.cuts(plain.NUM_SAMPLES, engine.data_ranks, shares, step)[engine.data_rank]
        engine.train_step(plain.rows(batch, places))


# Checkpoints.

SECONDARY = {"zero": 3, "shard": 2, "gradients": "all", "optimizer": "all"}
"""Parameters whole in each group together, everything else cut over all ranks."""
GROUPS = {"zero": 2, "shard": 2, "transport": "network"}

ROUTES: list[tuple[str, str, Layout, int, Layout, int]] = [
    # optimizer and model, layout and ranks that save, layout and ranks that go on. What any layout saves is
    # the same, and any loads it (test_checkpoint.py): these go through those that are not tried there.
    ("adamw", "decoder", {"zero": 0}, 2, {"zero": 2, "transport": "network"}, 3),
    ("adagrad", "recommender", GROUPS, 4, {"zero": 1, "shard": 1}, 2),
    ("adamw", "decoder", {"zero": 3}, 1, {**SECONDARY, "zero": 2}, 4),
    ("adagrad", "recommender", SECONDARY, 4, {"zero": 3}, 2),
]


@pytest.mark.parametrize(("optimizer", "name", "before", "ranks", "after", "other_ranks"), ROUTES)
def test_a_run_goes_on_in_another_residency_and_world(
    optimizer: str,
    name: str,
    before: Layout,
    ranks: int,
    after: Layout,
    other_ranks: int,
    tmp_path: Path,
    rank_pool: Pool,
) -> None:
    rank_pool.run(first_part, name, before, optimizer, tmp_path / "saved", ranks=ranks, timeout_s=60)
    rank_pool.run(second_part, name, after, optimizer, tmp_path / "saved", ranks=other_ranks, timeout_s=60)


def first_part(name: str, layout: Layout, optimizer: str, folder: Path) -> None:
    engine = start(name, layout, optimizer)
    train(engine, name, 3)
    engine.save(folder)


def second_part(name: str, layout: Layout, optimizer: str, folder: Path) -> None:
    engine = start(name, layout, optimizer)
    engine.load(folder)
    assert engine.num_steps == 3
    train(engine, name, STEPS)
    reference = plain.plain_run(name, torch.float64, STEPS, optimizer, 2, None)
    assert plain.farthest(engine.full_state_dict(), reference.model) < 1e-10


@pytest.mark.ranks(2, 3)
def test_groups_may_keep_different_state(tmp_path: Path) -> None:
    """Momentum in one group alone: ranks whose slice lies in the other have no such key."""

    def engine(layout: Layout) -> Engine:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 1)).double()
        first, second = list(model[0].parameters()), list(model[2].parameters())
        made = torch.optim.SGD([{"params": first}, {"params": second, "momentum": 0.9}], lr=0.1)
        return sixfold.initialize(
            model, config={"layout": layout}, optimizer=made, loss_fn=lambda out, batch: out.square().mean()
        )

    def step(engine: Engine) -> None:
        x = torch.arange(54, dtype=torch.float64).view(6, 9).sin()
        places = plain.cuts(6, engine.data_ranks, "even", 0)[engine.data_rank]
        engine.train_step((x[places.start : places.stop],))

    cut, whole = engine({"zero": 2}), engine({"zero": 0})
    for _ in range(3):
        step(cut)
        step(whole)
    assert cut.bound.state_specs() == whole.bound.state_specs()
    assert cut.bound.state_specs().keys() == {"2.weight", "2.bias"}
    cut.save(tmp_path / "cut")
    whole.save(tmp_path / "whole")
    mine, theirs = (dict(open_checkpoint(tmp_path / name).optimizer()) for name in ("cut", "whole"))
    assert mine.keys() == theirs.keys() == {"2.weight", "2.bias"}
    for name, state in theirs.items():
        assert state.keys() == mine[name].keys()
        for key, value in state.items():
            assert mine[name][key].shape == value.shape
            assert torch.allclose(mine[name][key], value, rtol=0, atol=1e-12)
    again = engine({"zero": 1})
    again.load(tmp_path / "cut")
    step(again)
    step(whole)
    assert plain.farthest(again.full_state_dict(), whole.module) < 1e-12


# Gradients and bytes.


@pytest.mark.ranks(1, 2, 4)
@pytest.mark.parametrize("zero", PRESETS)
def test_gradients_are_whole_in_every_residency(zero: int) -> None:
    engine = start("recommender", {"zero": zero})
    task = plain.TASKS["recommender"]
    reference = task.build().double()
    task.loss(reference, plain.cast(task.batch(0), torch.float64)).backward()
    train(engine, "recommender", 1)
    found = engine.gradients()
    expected = {name: each.grad for name, each in reference.named_parameters() if each.requires_grad}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None
        assert torch.allclose(found[name], gradient, rtol=0, atol=1e-12), name
    shown = {
        parameter.grad is not None for parameter in engine.module.parameters() if parameter.requires_grad
    }
    assert shown == {zero == 0}  # a slice of a sum is never shown as if it were a gradient


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("precision", [{}, {"compute": "bf16"}, {"compute": "bf16", "grad": "bf16"}])
@pytest.mark.parametrize("zero", PRESETS)
def test_live_bytes_are_those_of_the_plan(zero: int, precision: dict[str, str]) -> None:
    task = plain.TASKS["recommender"]
    engine = sixfold.initialize(
        task.build(), config={"layout": {"zero": zero}, "precision": precision}, loss_fn=task.loss_fn
    )
    for step in range(2):
        engine.train_step(plain.rows(task.batch(step), range(3)))
    assert engine.memory() == persistent_memory(engine.plan, num_moments=2)


@pytest.mark.ranks(4)
def test_bytes_per_parameter_are_those_of_the_table() -> None:
    """Mixed-precision AdamW: 2 working + 4 gradient + 12 state, whole or cut by the row."""
    numel = 4 * 32 * 4
    bf16 = {"zero": 2, "grad": "bf16"}
    cases: list[tuple[Layout, Memory]] = [
        ({"zero": 0}, Memory(2 * numel, 4 * numel, 4 * numel, 8 * numel)),
        ({"zero": 1}, Memory(2 * numel, 4 * numel, numel, 2 * numel)),
        ({"zero": 2}, Memory(2 * numel, numel, numel, 2 * numel)),
        (bf16, Memory(2 * numel, numel // 2, numel, 2 * numel)),
        ({"zero": 3}, Memory(numel // 2, numel, numel, 2 * numel)),
        ({"zero": 3, "shard": 2}, Memory(numel, 2 * numel, 2 * numel, 4 * numel)),
        (SECONDARY, Memory(numel, numel, numel, 2 * numel)),
        ({**SECONDARY, "parameters": "all"}, Memory(numel // 2, numel, numel, 2 * numel)),
        ({**SECONDARY, "zero": 2}, Memory(2 * numel, numel, numel, 2 * numel)),
    ]
    for case, expected in cases:
        layout = {key: value for key, value in case.items() if key != "grad"}
        precision = {"compute": "bf16", "grad": case.get("grad", "fp32")}
        engine = sixfold.initialize(
            nn.Linear(numel // 8, 8, bias=False),
            config={"layout": layout, "precision": precision},
            loss_fn=lambda output, batch: output.mean(),
        )
        engine.train_step((torch.ones(1, numel // 8),))
        assert engine.memory() == expected == persistent_memory(engine.plan, num_moments=2), case
        working = towers.live_bytes(engine)
        assert working == (0 if engine.plan.residency.parameters else expected.parameters), case
