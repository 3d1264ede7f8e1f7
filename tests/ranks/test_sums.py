"""An update from gradients of which a sum was left out is refused, by name and axis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import sixfold
from sixfold.base.errors import StateError
from sixfold.engine import Engine
from sixfold.mesh import Replicas
from sixfold.models.decoder import Decoder, DecoderConfig
from sixfold.models.moe import ExpertsConfig
from sixfold.state.wholeness import Wholeness

SIZES = {"vocab_size": 12, "context_length": 8, "width": 8, "num_layers": 2, "num_heads": 2, "ffn_width": 8}
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "context": {"context": 2},
    "expert": {"expert": 2},
    "tensor": {"tensor": 2, "sequence_parallel": True},
    "pipe": {"pipe": 2},
}


def start(axis: str) -> Engine:
    config = DecoderConfig.derive(**SIZES)
    if axis == "expert":
        config = replace(config, experts=ExpertsConfig(2))
    return sixfold.initialize(Decoder(config), config={"layout": LAYOUTS[axis]})


def tokens() -> Tensor:
    return torch.arange(4 * 9).view(4, 9) % 12


def _without_others(engine: Engine) -> None:
    """As with a mesh that forgets an axis along which replicas stand."""
    for unit in engine.state.trained:
        assert unit.gradients is not None, "of trained units"
        own = unit.gradients._replicas
        mine = own._ranks[own._place : own._place + 1]
        unit.gradients._replicas = Replicas(mine, 0, 1, own._make, own.exchangeable, own.device)


def _without(name: str) -> Callable[[Engine], None]:
    return lambda engine: setattr(engine.state.sums, name, [])


LEFT_OUT: dict[str, Callable[[Engine], None]] = {"tensor": _without("_partial"), "pipe": _without("_ties")}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("axis", LAYOUTS)
def test_a_sum_that_was_left_out_is_named(axis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    named = axis if axis in LEFT_OUT else "data x context"
    engine = start(axis)
    LEFT_OUT.get(axis, _without_others)(engine)
    monkeypatch.setattr(Wholeness, "check", lambda self: None)  # which sees some of it, too
    before = engine.full_state_dict()
    with pytest.raises(StateError, match=rf"gradient of model\..* over 1 of the 2 ranks along {named}"):
        engine.train_step(tokens())
    after = engine.full_state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    engine.close()
