"""What users do to an optimizer between updates, on every rank: as in one process, or an error that says
how."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

import sixfold
from sixfold.base.errors import StateError
from sixfold.engine import Engine
from sixfold.testing import Pool
from tests.ranks import pipes, plain, rows, towers
from tests.ranks.towers import Tower

BOUND = 1e-10
Edit = Callable[[Optimizer], object]


def _rates(optimizer: Optimizer) -> None:
    for number, group in enumerate(optimizer.param_groups):
        group["lr"] *= 0.5 + number
        group["weight_decay"] = 0.1 * number


def _second_moments(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            state = optimizer.state[tensor]
            state["exp_avg_sq"].add_(1e-3)
            state["seen"] = torch.ones_like(tensor)  # state of one's own


def _first_moments(optimizer: Optimizer) -> None:
    for state in optimizer.state.values():
        state["exp_avg"].mul_(-0.5)


def _count(optimizer: Optimizer) -> None:
    for state in optimizer.state.values():
        state["step"].zero_()


def _betas(optimizer: Optimizer) -> None:
    first, second = optimizer.param_groups
    first["betas"], second["betas"] = (0.5, 0.9), first["betas"]


EDITS: dict[str, Edit] = {
    "rates of the groups": _rates,
    "second moments": _second_moments,
    "first moments": _first_moments,
    "a new start": lambda optimizer: optimizer.state.clear(),
    "betas": _betas,
    "another dictionary": lambda optimizer: setattr(optimizer, "state", defaultdict(dict)),
    "the count of updates": _count,
    "its own state, copied": lambda optimizer: optimizer.load_state_dict(
        copy.deepcopy(optimizer.state_dict())
    ),
}


def adamw(model: nn.Module) -> AdamW:
    return AdamW(plain.groups_of(model, {"lr": 1e-2, "weight_decay": 0.05}, 2))


@cache
def edited() -> nn.Module:
    """The same in plain torch."""
    model = towers.seeded(lambda: Tower(2))
    optimizer = adamw(model)
    for step, edit in enumerate([*EDITS.values(), None]):
        optimizer.zero_grad()
        towers.mean_square(model(towers.data(step)), None).backward()
        optimizer.step()
        if edit is not None:
            edit(optimizer)
    return model


@pytest.mark.parametrize("case", rows.carried(1, 2, 3), ids=str)
def test_edits_of_an_optimizer_act_as_in_one_process(case: tuple[str, int, str], rank_pool: Pool) -> None:
    rank_pool.run(edit_each, rows.layout_of(*case), edited(), ranks=case[1])


def edit_each(layout: dict[str, Any], expected: nn.Module) -> None:
    engine = start(layout)
    for edit in (*EDITS.values(), None):
        towers.step(engine, "even")
        if edit is not None:
            edit(engine.optimizer)
    assert plain.farthest(engine.full_state_dict(), expected) < BOUND
    engine.close()


def start(layout: dict[str, Any], **more: Any) -> Engine:
    config = {"layout": layout, "batch": {"micro": towers.MICRO}} | more
    with plain.small_units():
        model = towers.seeded(lambda: Tower(2))
        return sixfold.initialize(model, config=config, optimizer=adamw(model), loss_fn=towers.mean_square)


BY_PARAMETER: dict[str, Callable[[Any, nn.Parameter], object]] = {
    "a key of it": lambda state, parameter: state[parameter]["exp_avg"].zero_(),
    "set": lambda state, parameter: state.__setitem__(parameter, {}),
    "get": lambda state, parameter: state.get(parameter),
    "in": lambda state, parameter: parameter in state,
    "pop": lambda state, parameter: state.pop(parameter, None),
    "del": lambda state, parameter: state.__delitem__(parameter),
    "setdefault": lambda state, parameter: state.setdefault(parameter, {}),
}


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("zero", [0, 3])
def test_state_by_parameter_is_refused_by_name(zero: int) -> None:
    engine = start({"zero": zero})
    towers.step(engine, "even")
    check_refused(engine.optimizer.state, engine.module, "blocks.1.up.weight")
    weight = engine.module.get_parameter("blocks.1.up.weight")
    engine.optimizer.state = defaultdict(dict, {weight: {"step": torch.zeros(())}})
    with pytest.raises(StateError, match=r"the optimizer's state of blocks\.1\.up\.weight"):
        towers.step(engine, "even")
    engine.optimizer.state = defaultdict(dict)
    towers.step(engine, "even")


@pytest.mark.ranks(2)
def test_state_by_parameter_of_any_stage_is_refused_on_all_of_them() -> None:
    """Of frozen ones too, though nobody has state of these."""
    engine = pipes.engine_of(pipes.Case(frozen=True))
    engine.train_step(pipes.share_of(engine, pipes.Case(frozen=True), 0))
    state = engine.optimizer.state
    before = len(state)
    names = [name for name, _ in engine.module.named_parameters()]
    for name in (names[0], names[-2], names[-1]):
        check_refused(state, engine.module, name)
    assert len(state) == before


def check_refused(state: Any, module: nn.Module, name: str) -> None:
    for edit in BY_PARAMETER.values():
        with pytest.raises(StateError, match=rf"the optimizer's state of {re.escape(name)}") as caught:
            edit(state, module.get_parameter(name))
        assert "engine.optimizer.param_groups" in caught.value.fix


@pytest.mark.ranks(1, 2)
def test_a_rate_that_a_schedule_would_overwrite_is_refused() -> None:
    engine = start({"zero": 1}, lr_schedule={"warmup_steps": 4})
    towers.step(engine, "even")
    group = engine.optimizer.param_groups[1]
    before = group["lr"]
    group["lr"] = 0.5
    with pytest.raises(StateError, match=r"learning rates \[0\.0025, 0\.5\]") as caught:
        towers.step(engine, "even")
    assert "lr_schedule.warmup_steps = 0" in caught.value.fix
    group["lr"] = before
    towers.step(engine, "even")
    assert group["lr"] == pytest.approx(2 * before)
