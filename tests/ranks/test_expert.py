"""Experts dealt out to ranks: the numbers of one process, however tokens fall and batches are cut."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sixfold
from sixfold.engine import Engine
from sixfold.models.decoder import Decoder, DecoderConfig
from sixfold.models.moe import ExpertsConfig, Router
from sixfold.testing import Pool
from tests.covering import Case, covering, label

SAMPLES, LENGTH, VOCABULARY, STEPS = 12, 6, 19, 4
PLAIN = DecoderConfig.derive(
    vocab_size=VOCABULARY, context_length=LENGTH, width=16, num_layers=2, num_heads=2, ffn_width=8
)
FORMS = {
    "loss": ExpertsConfig(4, num_shared=1, balance="loss", balance_rate=0.5, z_weight=0.1),
    "bias": ExpertsConfig(4, num_choices=1, balance="bias", balance_rate=0.2),
    "capacity": ExpertsConfig(8, num_choices=3, capacity_factor=0.8),
}


class Forced(Router):
    """All tokens go to one expert, another one at every update, so the rest get none on any rank."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        experts, weights = super().forward(x)
        turn = int(self.bias_steps.abs().sum()) % self.config.num_experts
        return torch.full_like(experts[:, :1], turn), weights[:, :1]


def build(form: str) -> Decoder:
    torch.manual_seed(0)
    forced = form == "forced"
    model = Decoder(replace(PLAIN, experts=FORMS["bias" if forced else form])).double()
    if forced:
        for part in model.modules():
            if isinstance(part, Router):
                part.__class__ = Forced
    return model


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, VOCABULARY, (SAMPLES, LENGTH + 1), generator=generator)


@cache
def reference(form: str) -> tuple[dict[str, Tensor], list[float], list[float], list[Any]]:
    """The same in plain torch: parameters, losses and gradient norms, and how tokens were shared out."""
    model = build(form)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses, norms = [], []
    routers = [part for part in model.modules() if isinstance(part, Router)]
    for step in range(STEPS):
        optimizer.zero_grad()
        loss, weight = model(batch(step))
        (loss / weight).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        losses.append(float(loss.detach() / weight))
        optimizer.step()
        for router in routers:
            router.end_update(router.tally)
    return model.state_dict(), losses, norms, [router.last for router in routers]


FACTORS: dict[str, tuple[Any, ...]] = {
    "form": ("loss", "bias", "capacity", "forced"),
    "ranks": (2, 4),
    "expert": (2, 4),
    "zero": (0, 1, 2, 3),
    "groups": (1, 2),
    "pipe": (1, 2),
    "micro": (None, 2),
    "shares": ("even", "uneven", "empty"),
    "recompute": (None, "full", "selective"),
    "transport": ("host", "network"),
}


def legal(case: Case) -> bool:
    data = case["ranks"] // case["pipe"]
    shard = data // case["groups"]
    fits = shard >= 1 and data % case["expert"] == 0 and (case["groups"] == 1 or case["zero"] > 0)
    divides = shard % case["expert"] == 0 or case["expert"] % max(1, shard) == 0
    return fits and divides and (case["shares"] == "even" or data > 1)


CASES = covering(FACTORS, legal)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_follows_one_process(case: Case, rank_pool: Pool) -> None:
    rank_pool.run(follow, case, reference(case["form"]), ranks=case["ranks"], timeout_s=60)


def start(case: Case, model: nn.Module) -> Engine:
    data = case["ranks"] // case["pipe"]
    layout = {name: case[name] for name in ("expert", "zero", "pipe", "recompute", "transport")}
    if case["groups"] > 1:
        layout["shard"] = data // case["groups"]
    config = {
        "batch": {"micro": case["micro"]},
        "layout": layout,
        "optimizer": {"name": "adamw", "lr": 0.01, "clip_norm": 0.5},
    }
    return sixfold.initialize(model, config=config)


def share(engine: Engine, case: Case, step: int) -> dict[str, Tensor]:
    """This rank's samples."""
    ranks, tokens = engine.data_ranks, batch(step)
    sizes = [SAMPLES // ranks] * ranks
    if case["shares"] == "uneven":
        sizes = [SAMPLES - sum(range(1, ranks)), *range(1, ranks)]
    elif case["shares"] == "empty":
        sizes = [SAMPLES, *[0] * (ranks - 1)]
    return {"tokens": tokens.split(sizes)[(engine.data_rank + step) % ranks]}


def follow(case: Case, expected: tuple[dict[str, Tensor], list[float], list[float], list[Any]]) -> None:
    parameters, losses, norms, routing = expected
    engine = start(case, build(case["form"]))
    for step in range(STEPS):
        loss = engine.train_step(share(engine, case, step))
        assert loss == pytest.approx(losses[step], rel=1e-10)
        assert engine.last is not None
        assert engine.last.grad_norm == pytest.approx(norms[step], rel=1e-10)
    whole = engine.full_state_dict()
    far = {name: (whole[name] - number).abs().max().item() for name, number in parameters.items()}
    assert max(far.values()) < 1e-10, far
    known = engine.routing()
    assert case["pipe"] > 1 or list(known.values()) == routing
    assert all(each in routing for each in known.values())
    engine.close()
