"""Clipping by norm, whole and group by group, against plain torch in one process."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import sixfold
from sixfold.base.errors import ConfigError
from sixfold.pipeline.clipping import clip_factors
from sixfold.testing import Pool
from tests.ranks import plain, rows
from tests.ranks.rows import RESIDENCIES

STEPS = 4
BOUNDS = (0.05, None, 0.2)
SHARED = 0.1


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Three groups that share units: norms, other vectors and small matrices, the rest."""
    parameters = list(model.parameters())
    small = [each for each in parameters if each.dim() > 1 and each.numel() <= 16 * 16]
    vectors = [each for each in parameters if each.dim() <= 1]
    rest = [each for each in parameters if each.dim() > 1 and each.numel() > 16 * 16]
    settings = [{} if bound is None else {"clip_norm": bound} for bound in BOUNDS]
    return [
        {"params": part, **setting} for part, setting in zip((small, vectors, rest), settings, strict=True)
    ]


@cache
def by_hand(name: str) -> tuple[nn.Module, list[list[float]]]:
    task = plain.TASKS[name]
    model = task.build().double()
    optimizer = torch.optim.SGD(groups(model), lr=0.3, momentum=0.9)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        task.loss(model, plain.cast(task.batch(step), torch.float64)).backward()
        norms.append(
            [
                float(torch.nn.utils.clip_grad_norm_(group["params"], bound or SHARED))
                for group, bound in zip(optimizer.param_groups, BOUNDS, strict=True)
            ]
        )
        optimizer.step()
    return model, norms


@pytest.mark.parametrize(("residency", "ranks"), rows.on(1, 3))
def test_groups_are_clipped_each_by_its_own_norm(residency: str, ranks: int, rank_pool: Pool) -> None:
    rank_pool.run(clip, RESIDENCIES[residency], ranks=ranks)


def clip(layout: dict[str, Any]) -> None:
    reference, expected = by_hand("decoder")
    task = plain.TASKS["decoder"]
    model = task.build().double()
    engine = sixfold.initialize(
        model,
        config={"layout": layout, "optimizer": {"clip_norm": SHARED}, "batch": {"micro": 2}},
        optimizer=torch.optim.SGD(groups(model), lr=0.3, momentum=0.9),
    )
    for step in range(STEPS):
        batch = plain.cast(task.batch(step), torch.float64)
        places = plain.cuts(plain.NUM_SAMPLES, engine.data_ranks, "uneven", step)[engine.data_rank]
        engine.train_step(plain.rows(batch, places))
        assert engine.last is not None
        assert engine.last.group_norms == pytest.approx(expected[step], rel=1e-10, abs=0)
        whole = sum(norm**2 for norm in expected[step]) ** 0.5
        assert engine.last.grad_norm == pytest.approx(whole, rel=1e-10, abs=0)
        assert all(norm > (bound or SHARED) for norm, bound in zip(expected[step], BOUNDS, strict=True)), (
            "every group is clipped, or the test proves less"
        )
    found = engine.full_state_dict()
    for name, each in reference.named_parameters():
        assert torch.allclose(found[name], each.detach(), rtol=0, atol=1e-10), name


@pytest.mark.ranks(1)
@pytest.mark.parametrize("bound", [0, -1.0, "1", float("inf")])
def test_a_bound_is_a_positive_number(bound: Any) -> None:
    model = nn.Linear(2, 1)
    groups = [{"params": model.parameters(), "clip_norm": bound}]
    with pytest.raises(ConfigError, match="clip_norm"):
        sixfold.initialize(model, optimizer=torch.optim.SGD(groups, lr=0.1))


def test_factors() -> None:
    assert clip_factors([3.0, 4.0], [None, None], None) == [1.0, 1.0]
    assert clip_factors([3.0, 4.0], [None, None], 10.0) == [1.0, 1.0]
    both = clip_factors([3.0, 4.0], [None, None], 1.0)
    assert both == pytest.approx([0.2, 0.2], rel=1e-6)
    assert clip_factors([3.0, 4.0], [None, 1.0], 6.0) == pytest.approx([1.0, 0.25], rel=1e-6)
