"""Evaluation mode for a while, and what of a user's model stays frozen through it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sixfold
from sixfold.models.evaluation import evaluating


class Merging(nn.Module):
    """Merges an adapter for evaluation, as some libraries do."""

    is_merged = False

    def train(self, mode: bool = True) -> Merging:
        """As torch, and the adapter."""
        self.is_merged = not mode
        return super().train(mode)


class Mean(nn.Module):
    """A frozen backbone, a head, and a loss that is divided by what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Embedding(8, 4), nn.Dropout(0.5))
        self.head = nn.Linear(4, 8)
        self.seen: list[bool] = []

    def forward(self, tokens: Tensor, labels: Tensor, num_items_in_batch: float | None = None) -> Tensor:
        self.seen.append(self.training)
        scores = self.head(self.backbone(tokens))
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="sum")
        return loss / (labels.numel() if num_items_in_batch is None else num_items_in_batch)


def modes(module: nn.Module) -> list[bool]:
    return [part.training for part in module.modules()]


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("is_training", [True, False])
def test_each_part_goes_on_in_its_own_mode(is_training: bool, raises: bool) -> None:
    inner = nn.Sequential(nn.Dropout(), Merging(), nn.Sequential(nn.Dropout(), Merging()))
    module = nn.Sequential(inner, nn.Dropout(), Merging()).train(is_training)
    inner.train(not is_training)
    inner[2].train(is_training)
    before = modes(module)
    assert len(set(before)) == 2
    merged = [part.is_merged for part in module.modules() if isinstance(part, Merging)]
    try:
        with evaluating(module):
            assert not any(modes(module))
            assert all(part.is_merged for part in module.modules() if isinstance(part, Merging))
            if raises:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert raises
    assert modes(module) == before
    assert [part.is_merged for part in module.modules() if isinstance(part, Merging)] == merged


def test_what_is_frozen_stays_frozen_through_evaluation_and_the_first_update() -> None:
    model = Mean()
    model.backbone.eval()
    before = modes(model)
    engine = sixfold.initialize(model, config={})
    batch: dict[str, Any] = {name: torch.arange(8).view(2, 4) for name in ("tokens", "labels")}
    engine.train_step(batch)
    assert model.seen == [False, False, True]  # how the loss is divided was tried first
    assert modes(model) == before
    engine.eval_step(batch)
    assert model.seen[3:] == [False]
    assert modes(model) == before
    engine.close()
