"""Experts dealt out to ranks: the numbers of one process, however tokens fall and batches are cut."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sixfold
from sixfold.base.errors import ModelError, PlanError
from sixfold.engine import Engine
from sixfold.models.decoder import Decoder, DecoderConfig
from sixfold.models.moe import Experts, ExpertsConfig, Router
from sixfold.plan import dispatch_traffic, persistent_memory
from sixfold.testing import Pool
from sixfold.testing.exchanges import noted_exchanges
from tests.covering import Case, covering, label, with_drawn

SAMPLES, LENGTH, VOCABULARY, STEPS = 12, 8, 19, 5
PLAIN = DecoderConfig.derive(
    vocab_size=VOCABULARY, context_length=LENGTH, width=16, num_layers=2, num_heads=2, ffn_width=8
)
FORMS = {
    "loss": ExpertsConfig(4, num_shared=1, balance="loss", balance_rate=0.5, z_weight=0.1),
    "bias": ExpertsConfig(4, num_choices=1, balance="bias", balance_rate=0.2),
    "capacity": ExpertsConfig(8, num_choices=3, capacity_factor=0.8),
}


class Forced(Router):
    """All tokens go to one expert, the next one after every update, so the others get none on any rank."""

    num_updates = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        before = self.tally.clone()
        experts, weights = super().forward(x)
        turn, num_experts = self.num_updates % self.config.num_experts, self.config.num_experts
        if not torch.equal(self.tally, before):
            self.tally[:num_experts] = before[:num_experts]
            self.tally[turn] += len(experts)
        return torch.full_like(experts[:, :1], turn), weights[:, :1]

    def end_update(self, tally: Tensor) -> None:
        super().end_update(tally)
        assert self.last is None or max(self.last.load) == 1.0
        self.num_updates += 1


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
    "tensor": (None, "whole", "sequence"),
    "context": (1, 2),
    "micro": (None, 5),
    "shares": ("even", "uneven", "empty"),
    "recompute": (None, "full", "selective"),
    "transport": ("host", "network"),
}

DRAWN = ("groups", "micro", "shares", "recompute", "transport")
"""Not multiplied out in the full product, but drawn for each of its cases."""


def data_ranks(case: Case) -> int:
    return case["ranks"] // case["pipe"] // case["context"] // (1 if case["tensor"] is None else 2)


def legal(case: Case) -> bool:
    data, replicas = data_ranks(case), data_ranks(case) * case["context"]
    shard = replicas // case["groups"]
    fits = data and shard and replicas % case["expert"] == 0 and (case["groups"] == 1 or case["zero"] > 0)
    divides = shard % case["expert"] == 0 or case["expert"] % max(1, shard) == 0
    is_whole = case["form"] != "capacity" or (case["tensor"] != "sequence" and case["context"] == 1)
    return fits and divides and is_whole and (case["shares"] == "even" or data > 1)


CASES = covering(FACTORS, legal)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_follows_one_process(case: Case, rank_pool: Pool) -> None:
    rank_pool.run(follow, case, reference(case["form"]), ranks=case["ranks"], timeout_s=60)


EIGHT = [
    {"tensor": "whole", "context": 2, "expert": 2, "zero": 3},
    {"tensor": "sequence", "context": 2, "expert": 4, "zero": 1, "micro": 2},
    {"pipe": 2, "tensor": "whole", "expert": 2, "zero": 2, "micro": 2},
    {"pipe": 2, "context": 2, "expert": 4, "zero": 3, "micro": 2, "recompute": "full"},
]


@pytest.mark.matrix
@pytest.mark.parametrize("changes", EIGHT, ids=str)
@pytest.mark.parametrize("form", ["loss", "bias", "forced"])
def test_follows_one_process_on_eight_ranks(form: str, changes: dict[str, Any], rank_pool: Pool) -> None:
    case = {name: values[0] for name, values in FACTORS.items()} | {"form": form, "ranks": 8} | changes
    assert legal(case)
    rank_pool.run(follow, case, reference(form), ranks=8, timeout_s=120)


@pytest.mark.matrix
@pytest.mark.parametrize("ranks", FACTORS["ranks"])
@pytest.mark.parametrize("form", FACTORS["form"])
def test_follows_one_process_in_every_combination(form: str, ranks: int, rank_pool: Pool) -> None:
    for case in with_drawn({**FACTORS, "form": (form,), "ranks": (ranks,)}, DRAWN, legal):
        rank_pool.run(follow, case, reference(form), ranks=ranks, timeout_s=60)


@pytest.mark.matrix  # compiling takes long
@pytest.mark.parametrize("recompute", [None, "full"])
@pytest.mark.parametrize(("ranks", "expert"), [(1, 1), (2, 2)])
def test_compiled_blocks_send_tokens(ranks: int, expert: int, recompute: str | None, rank_pool: Pool) -> None:
    case = {name: values[0] for name, values in FACTORS.items()}
    case |= {"ranks": ranks, "expert": expert, "compile": "aot_eager", "recompute": recompute}
    rank_pool.run(follow, case, reference("loss"), ranks=ranks, timeout_s=120)


def start(case: Case, model: nn.Module) -> Engine:
    layout = {name: case[name] for name in ("expert", "zero", "pipe", "context", "recompute", "transport")}
    if "compile" in case:
        layout["compile"] = case["compile"]
    if case["groups"] > 1:
        layout["shard"] = data_ranks(case) * case["context"] // case["groups"]
    if case["tensor"] is not None:
        layout |= {"tensor": 2, "sequence_parallel": case["tensor"] == "sequence"}
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
    here = {part.down_proj.shape[0] for part in engine.module.modules() if isinstance(part, Experts)}
    num_experts = engine.module.config.experts.num_experts
    assert case["zero"] == 3 or min(here) == num_experts // case["expert"]
    widths = {part.down_proj.shape[2] for part in engine.module.modules() if isinstance(part, Experts)}
    assert case["zero"] == 3 or min(widths) == PLAIN.ffn_width // (1 if case["tensor"] is None else 2)
    assert engine.memory() == persistent_memory(engine.plan, 2)
    whole = engine.full_state_dict()
    # Compiled blocks that recompute tally twice, which changes no fraction.
    kept = [name for name in parameters if "compile" not in case or not name.endswith(("load", "bias_steps"))]
    far = {name: (whole[name] - parameters[name]).abs().max().item() for name in kept}
    assert max(far.values()) < 1e-10, far
    known = engine.routing()
    assert case["pipe"] > 1 or list(known.values()) == routing
    assert all(each in routing for each in known.values())
    engine.close()


class InTurn(Router):
    """Tokens go to all experts in turn."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        experts, weights = super().forward(x)
        return torch.arange(experts.numel()).view(experts.shape) % self.config.num_experts, weights


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("recompute", [None, "full"])
def test_the_plan_says_what_goes_to_experts(recompute: str | None, num_ranks: int) -> None:
    case = {name: values[0] for name, values in FACTORS.items()}
    case |= {"expert": num_ranks, "ranks": num_ranks, "recompute": recompute}
    model = build("loss")
    for part in model.modules():
        if isinstance(part, Router):
            part.__class__ = InTurn
    engine = start(case, model)
    with noted_exchanges() as topics:
        engine.train_step({"tokens": batch(0)[: SAMPLES // 3]})
    sent = [topic.num_bytes for topic in topics if topic.op == "all-to-all"]
    layer = dispatch_traffic(
        engine.plan.geometry,
        choices=SAMPLES // 3 * LENGTH * 2,
        num_experts=4,
        width=16,
        dtype="fp64",
        num_forwards=1 if recompute is None else 2,
    )
    assert sum(sent) == 2 * layer > 0
    engine.close()


@pytest.mark.ranks(2)
def test_what_cannot_be_dealt_out_is_refused() -> None:
    config = {"layout": {"expert": 2}}
    with pytest.raises(ModelError, match="without stacked experts"):
        sixfold.initialize(Decoder(PLAIN), config=config)
    odd = Decoder(replace(PLAIN, experts=ExpertsConfig(3)))
    with pytest.raises(PlanError, match=r"(?s)3 experts in model\.layers\.0.*one of 1, 3"):
        sixfold.initialize(odd, config=config)
    engine = sixfold.initialize(build("loss"), config={**config, "batch": {"micro": 2}})
    with pytest.raises(ModelError, match="no tensors in the batch of replica 0"):
        engine.train_step({"tokens": batch(0)} if engine.data_rank else None)


@pytest.mark.ranks(4)
def test_a_rank_may_begin_without_samples_in_a_bare_tensor() -> None:
    """It serves those that try whether sequences can be cut."""
    layout = {"context": 2, "expert": 4}
    engine = sixfold.initialize(build("loss"), config={"layout": layout, "optimizer": {"lr": 0.01}})
    _, losses, _, _ = reference("loss")
    own = batch(0) if engine.data_rank else batch(0)[:0]
    assert engine.train_step(own) == pytest.approx(losses[0], rel=1e-10)
    engine.close()
