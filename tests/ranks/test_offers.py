"""What ranks along an axis exchange in shared memory takes no more of it than is priced before training."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import sixfold
from sixfold.engine import Engine
from sixfold.models.decoder import Decoder, DecoderConfig
from sixfold.models.moe import ExpertsConfig, Router
from sixfold.plan.memory import PAGE_BYTES
from sixfold.testing import Pool
from tests.ranks import plain
from tests.ranks.test_expert import InTurn

LENGTH = 128
CONFIG = DecoderConfig.derive(
    vocab_size=100, context_length=LENGTH, width=48, num_layers=2, num_heads=6, num_kv_heads=2, ffn_width=64
)
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor": 2},
    "sequence": {"tensor": 2, "sequence_parallel": True},
    "heads": {"context": 2},
    "ring": {"context": 3},
    "both": {"context": 2, "tensor": 2},
    "expert": {"expert": 2},
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name != "expert":
        return Decoder(CONFIG)
    model = Decoder(replace(CONFIG, experts=ExpertsConfig(4)))
    for part in model.modules():
        if isinstance(part, Router):
            part.__class__ = InTurn  # load is even
    return model


def follow(name: str) -> None:
    module: Any = sys.modules["sixfold.engine.initialize"]
    price, priced = module.axes_memory, list[int]()

    def noting(*given: Any) -> int:
        priced.append(price(*given))
        return priced[0]

    batch = {"tokens": torch.randint(0, 100, (4, LENGTH + 1), generator=torch.Generator().manual_seed(1))}
    with pytest.MonkeyPatch.context() as patch, plain.small_units():
        patch.setattr(module, "axes_memory", noting)
        config = {"layout": LAYOUTS[name], "batch": {"micro": 2}}
        engine = sixfold.initialize(build(name), config=config, example=batch)
    taken = taken_by(engine)
    for _ in range(3):
        engine.train_step(batch)
    # How many of the two buffers of a kind are needed is a matter of who reads how soon.
    assert priced[0] / 8 < sum(taken) <= priced[0], (taken, priced)
    engine.close()


def taken_by(engine: Engine) -> list[int]:
    """Bytes of shared memory that are taken from here on: not for gradients, nor for messages of some words
    and the few rows that the first batch is tried with."""
    assert engine.mesh.host is not None
    scratch, taken = engine.mesh.host.scratch, list[int]()
    make, of_units = scratch._make, {unit.numel for unit in engine.plan.units}

    def noting(numel: int, dtype: torch.dtype) -> torch.Tensor:
        size = numel * dtype.itemsize
        taken.append(-(-size // PAGE_BYTES) * PAGE_BYTES if size > 4000 and numel not in of_units else 0)
        return make(numel, dtype)

    scratch._make = noting  # type: ignore[method-assign]
    return taken


@pytest.mark.parametrize("name", LAYOUTS)
def test_exchanges_take_no_more_than_they_are_priced(name: str, rank_pool: Pool) -> None:
    layout = LAYOUTS[name]
    ranks = layout.get("tensor", 1) * layout.get("context", 1) * layout.get("expert", 1)
    rank_pool.run(follow, name, ranks=ranks)
