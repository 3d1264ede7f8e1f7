"""Optimizers that need whole matrices: each matrix is owned by one rank, and the numbers are those of one
process in every residency."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import sixfold
from sixfold.checkpoint import open_checkpoint
from sixfold.checkpoint.together import Saving
from sixfold.engine import Engine
from sixfold.plan import cut_units, persistent_memory
from sixfold.testing import Pool
from tests.one.optimizers import Factored, Lion, Normalised
from tests.ranks import plain, rows

STEPS = 5
MODEL = "decoder"


def muon(model: nn.Module) -> list[Optimizer]:
    """Muon for the matrices inside the blocks, AdamW in two groups for the rest."""
    blocks = [part for name, part in model.named_parameters() if "layers" in name and part.dim() == 2]
    inside = set(blocks)
    rest = [part for part in model.parameters() if part not in inside]
    groups = [
        {"params": [part for part in rest if part.dim() > 1], "weight_decay": 0.1},
        {"params": [part for part in rest if part.dim() <= 1], "weight_decay": 0.0},
    ]
    return [torch.optim.Muon(blocks, lr=0.02), torch.optim.AdamW(groups, lr=3e-3)]


def all_by(kind: Callable[..., Optimizer]) -> Callable[[nn.Module], list[Optimizer]]:
    return lambda model: [kind([part for part in model.parameters() if part.requires_grad], lr=2e-3)]


MAKERS: dict[str, Callable[[nn.Module], list[Optimizer]]] = {
    "muon and adamw": muon,
    "adafactor": all_by(torch.optim.Adafactor),
    "normalised": all_by(Normalised),
    "factored": all_by(Factored),
    "lion": all_by(Lion),
}


@cache
def by_hand(maker: str, steps: int) -> nn.Module:
    task = plain.TASKS[MODEL]
    model = task.build().double()
    made = MAKERS[maker](model)
    for step in range(steps):
        model.zero_grad()
        task.loss(model, plain.cast(task.batch(step), torch.float64)).backward()
        for optimizer in made:
            optimizer.step()
    return model


def start(maker: str, layout: dict[str, Any], dtype: torch.dtype = torch.float64) -> Engine:
    model = plain.TASKS[MODEL].build().to(dtype)
    config = {"layout": layout, "batch": {"micro": 2}}
    return sixfold.initialize(model, config=config, optimizer=MAKERS[maker](model))


def train(engine: Engine, steps: int) -> None:
    for step in range(engine.num_steps, steps):
        batch = plain.TASKS[MODEL].batch(step)
        places = plain.cuts(plain.NUM_SAMPLES, engine.data_ranks, "uneven", step)[engine.data_rank]
        engine.train_step(plain.rows(batch, places))


def check(engine: Engine, reference: nn.Module) -> None:
    found = engine.full_state_dict()
    for name, each in reference.named_parameters():
        assert torch.allclose(found[name], each.detach(), rtol=0, atol=1e-10), name


@pytest.mark.ranks
@pytest.mark.parametrize(("zero", "num_ranks"), rows.presets(1, 3))
@pytest.mark.parametrize("maker", MAKERS)
def test_every_optimizer_follows_one_process(maker: str, zero: int) -> None:
    engine = start(maker, {"zero": zero})
    train(engine, STEPS)
    check(engine, by_hand(maker, STEPS))
    is_whole = {unit.whole for unit in engine.plan.units}
    assert is_whole == {"lion": {False}, "muon and adamw": {True, False}}.get(maker, {True})


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    "layout",
    [{"zero": 3}, {"zero": 2, "shard": 2}, {"zero": 1, "shard": 2, "optimizer": "all"}],
)
def test_in_small_units_and_groups_too(layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_units, "__defaults__", (4096,))
    engine = start("muon and adamw", layout)
    assert sum(unit.whole for unit in engine.plan.units) > 1
    train(engine, STEPS)
    check(engine, by_hand("muon and adamw", STEPS))


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("zero", [1, 2])
def test_each_matrix_has_one_owner_and_the_work_is_shared(zero: int) -> None:
    engine = start("muon and adamw", {"zero": zero}, torch.float32)
    owned = {id(part) for part in engine.optimizer.param_groups[0]["params"]}
    shapes = [tuple(part.shape) for part in engine.optimizer.param_groups[0]["params"]]
    assert all(len(shape) == 2 for shape in shapes)
    num_owned = engine.mesh.total(float(len(owned)))[0]
    (unit,) = [unit for unit in engine.plan.units if unit.whole]
    assert num_owned == len(unit.slots)
    assert len(owned) < len(unit.slots)
    train(engine, 2)
    planned, lives = persistent_memory(engine.plan, num_moments=2), engine.memory()
    assert (lives.parameters, lives.gradients, lives.master) == (
        planned.parameters,
        planned.gradients,
        planned.master,
    )
    assert 0 < lives.optimizer <= planned.optimizer


ROUTES = [
    # What any layout saves is the same (test_checkpoint.py), so each route needs one of the optimizers.
    ("muon and adamw", {"zero": 0}, 2, {"zero": 2}, 3),
    ("factored", {"zero": 2, "shard": 2}, 4, {"zero": 1}, 2),
    ("muon and adamw", {"zero": 1}, 3, {}, 1),
]


@pytest.mark.parametrize(("maker", "before", "ranks", "after", "other_ranks"), ROUTES)
def test_a_run_goes_on_in_another_residency_and_world(
    maker: str,
    before: dict[str, int],
    ranks: int,
    after: dict[str, int],
    other_ranks: int,
    tmp_path: Path,
    rank_pool: Pool,
) -> None:
    rank_pool.run(first_part, maker, before, tmp_path / "saved", ranks=ranks, timeout_s=60)
    rank_pool.run(second_part, maker, after, tmp_path / "saved", ranks=other_ranks, timeout_s=60)


def first_part(maker: str, layout: dict[str, Any], folder: Path) -> None:
    engine = start(maker, layout)
    train(engine, 3)
    engine.save(folder)


def second_part(maker: str, layout: dict[str, Any], folder: Path) -> None:
    engine = start(maker, layout)
    engine.load(folder)
    train(engine, STEPS)
    check(engine, by_hand(maker, STEPS))


@pytest.mark.ranks(1, 3)
def test_state_of_any_shape_is_saved_whole_by_its_owners(tmp_path: Path) -> None:
    engines = {"cut": start("factored", {"zero": 2}), "whole": start("factored", {"zero": 0})}
    for name, engine in engines.items():
        train(engine, 2)
        engine.save(tmp_path / name)
    mine, theirs = (dict(open_checkpoint(tmp_path / name).optimizer()) for name in engines)
    assert mine.keys() == theirs.keys()
    kinds: set[Any] = set()
    for name, state in theirs.items():
        assert state.keys() == mine[name].keys()
        for key, value in state.items():
            assert (mine[name][key].shape, mine[name][key].dtype) == (value.shape, value.dtype)
            assert torch.allclose(mine[name][key].double(), value.double(), rtol=0, atol=1e-12)
            kinds.add((value.dim(), value.dtype))
    assert {(0, torch.int64), (1, torch.float64)} <= kinds


@pytest.mark.ranks(1, 2)
def test_a_rehearsal_foresees_matrices_and_averages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain.TASKS[MODEL].build()
    config = {"layout": {"zero": 1}, "precision": {"compute": "bf16"}, "optimizer": {"ema_decay": 0.9}}
    engine = sixfold.initialize(model, config=config, optimizer=MAKERS["muon and adamw"](model))
    foreseen: list[int] = []
    monkeypatch.setattr(Saving, "rehearse", lambda self, folder, needed: foreseen.append(needed))
    engine.rehearse_save(tmp_path)
    engine.train_step(plain.TASKS[MODEL].batch(0))
    engine.save(tmp_path)
    entries = open_checkpoint(tmp_path).manifest.tensors
    assert foreseen == [sum(entry.stop - entry.start for entry in entries if entry.shape)]
