"""The context axis follows one process: every degree, residency and transport, with data ranks, pipelines and
tensor ranks, packed documents, padding and lengths that do not divide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sixfold
from sixfold.engine import Engine
from sixfold.models.attention import within_documents
from sixfold.models.decoder import Decoder, DecoderConfig
from sixfold.models.moe import ExpertsConfig, Router
from sixfold.testing import Pool
from tests.covering import Case, covering, label, with_drawn
from tests.ranks import plain

LENGTH, SAMPLES, VOCABULARY, STEPS = 21, 6, 24, 5


def _decoder() -> Decoder:
    return Decoder(
        DecoderConfig(
            vocab_size=VOCABULARY,
            context_length=LENGTH,
            width=24,
            num_layers=2,
            num_heads=6,
            num_kv_heads=2,
            ffn_width=12,
        )
    )


def _llama(attention: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation=attention,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def _tokens(step: int, length: int) -> Tensor:
    return torch.randint(0, 6, (SAMPLES, length), generator=torch.Generator().manual_seed(step))


def _documents(step: int, length: int) -> Tensor:
    draw = torch.Generator().manual_seed(step)
    return (torch.rand(SAMPLES, length, generator=draw) < 0.2).cumsum(1)


def _plain(step: int) -> plain.Batch:
    return {"tokens": _tokens(step, LENGTH + 1)}


def _packed(step: int) -> plain.Batch:
    return {**_plain(step), "documents": _documents(step, LENGTH + 1)}


def _padded(step: int) -> plain.Batch:
    """Padding in front of some samples and behind others; prompts without targets."""
    tokens, place = _tokens(step, LENGTH), torch.arange(LENGTH)[None]
    front = torch.tensor([0, 3, 0, 9, 0, 0])[:, None]
    behind = torch.tensor([0, 0, 8, 0, 1, 0])[:, None]
    mask = (place >= front) & (place < LENGTH - behind)
    labels = tokens.masked_fill(~mask | (place < 4), -100)
    return {"input_ids": tokens, "attention_mask": mask.long(), "labels": labels}


def _anew(step: int) -> plain.Batch:
    """Documents told by positions."""
    tokens, documents = _tokens(step, LENGTH), _documents(step, LENGTH)
    place = torch.arange(LENGTH).expand(SAMPLES, -1)
    begins = torch.where(F.pad(documents.diff(dim=1), (1, 0)) > 0, place, 0).cummax(1).values
    return {"input_ids": tokens, "position_ids": place - begins, "labels": tokens}


def _by_pairs(step: int) -> plain.Batch:
    """Documents told by a mask of pairs, added to scores."""
    tokens, documents = _tokens(step, LENGTH), _documents(step, LENGTH)
    mask = torch.where(within_documents(documents), 0.0, float("-inf")).double()
    return {"input_ids": tokens, "labels": tokens, "attention_mask": mask}


@dataclass(frozen=True)
class Task:
    """A model and its global batches."""

    build: Callable[[], nn.Module]
    batch: Callable[[int], plain.Batch]
    bound: float = 1e-10


def _experts() -> nn.Module:
    shared = ExpertsConfig(num_experts=4, num_shared=1, balance="loss", balance_rate=0.1, z_weight=0.01)
    return Decoder(replace(_decoder().config, experts=shared))


TASKS = {
    "plain": Task(_decoder, _plain),
    "packed": Task(_decoder, _packed),
    # Parts of these compute in fp32. Attention that is written out is replaced by one that can be answered.
    "padded": Task(lambda: _llama("sdpa"), _padded, 1e-6),
    "anew": Task(lambda: _llama("eager"), _anew, 1e-6),
    "pairs": Task(lambda: _llama("sdpa"), _by_pairs, 1e-6),
    "experts": Task(_experts, _plain),
}

FACTORS: dict[str, tuple[Any, ...]] = {
    "context": (2, 3, 4),
    "model": tuple(TASKS),
    "zero": (0, 1, 2, 3),
    "groups": (1, 2),
    "data": (1, 2),
    "pipe": (1, 2),
    "tensor": (1, 2),
    "expert": (1, 2),
    "shares": ("even", "uneven", "empty"),
    "recompute": (None, "full", "selective"),
    "micro": (3, None),
    "transport": ("host", "network"),
}


DRAWN = ("groups", "shares", "recompute", "micro", "transport")
"""Not multiplied out in the full product, but drawn for each of its cases."""


def num_ranks(case: Case) -> int:
    return int(case["context"] * case["data"] * case["pipe"] * case["tensor"])


def legal(case: Case, most: int = 4) -> bool:
    replicas = case["context"] * case["data"]
    is_divided = case["expert"] == 1 or (case["model"] == "experts" and replicas % case["expert"] == 0)
    shard = replicas // case["groups"]
    has_groups = case["groups"] == 1 or (case["zero"] > 0 and replicas % case["groups"] == 0)
    fits = shard % case["expert"] == 0 or case["expert"] % shard == 0
    has_shares = case["shares"] == "even" or case["data"] > 1
    return num_ranks(case) <= most and is_divided and has_groups and fits and has_shares


CASES = covering(FACTORS, legal)


def build(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return TASKS[name].build().double()


def mean_loss(module: nn.Module, batch: plain.Batch) -> Tensor:
    output = module(**batch)
    return output[0] / output[1] if isinstance(output, tuple) else output.loss


@cache
def alone(name: str) -> plain.PlainRun:
    """The model after some steps of plain torch, losses and gradient norms."""
    module = build(name)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = mean_loss(module, TASKS[name].batch(step))
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), float("inf"))))
        optimizer.step()
        for part in module.modules():
            if isinstance(part, Router):
                part.end_update(part.tally)
        losses.append(loss.item())
    return plain.PlainRun(module, losses, norms)


def engine_of(name: str, micro: int | None = 2, **layout: Any) -> Engine:
    config = {
        "layout": layout,
        "batch": {"micro": micro},
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0},
    }
    with plain.small_units():
        return sixfold.initialize(build(name), config=config)


def share_of(engine: Engine, name: str, step: int, shares: str = "even") -> plain.Batch:
    places = plain.cuts(SAMPLES, engine.data_ranks, shares, step)[engine.data_rank]
    return plain.rows(TASKS[name].batch(step), places)


def follow(case: Case, expected: plain.PlainRun) -> None:
    """One case on every rank."""
    name = case["model"]
    layout = {key: case[key] for key in FACTORS if key not in ("model", "micro", "shares", "groups")}
    if case["groups"] > 1:
        layout["shard"] = case["data"] * case["context"] // case["groups"]
    losses, norms = expected.losses, expected.grad_norms
    engine = engine_of(name, case["micro"], **layout)
    for step in range(STEPS):
        share = share_of(engine, name, step, case["shares"])
        if step == 1:
            assert engine.eval_step(share).loss == pytest.approx(losses[step], rel=TASKS[name].bound)
        assert engine.train_step(share) == pytest.approx(losses[step], rel=TASKS[name].bound)
        assert engine.last is not None
        assert engine.last.grad_norm == pytest.approx(norms[step], rel=TASKS[name].bound)
        assert engine.last.samples == SAMPLES
    assert plain.farthest(engine.full_state_dict(), expected.model) < TASKS[name].bound
    engine.close()


@pytest.mark.parametrize("case", CASES, ids=label)
def test_ranks_along_context_follow_one_process(case: Case, rank_pool: Pool) -> None:
    rank_pool.run(follow, case, alone(case["model"]), ranks=num_ranks(case))


@pytest.mark.matrix
@pytest.mark.parametrize("model", TASKS)
@pytest.mark.parametrize("context", [*FACTORS["context"], 6])
def test_ranks_along_context_follow_one_process_in_every_combination(
    context: int, model: str, rank_pool: Pool
) -> None:
    fixed = FACTORS | {"context": (context,), "model": (model,)}
    for case in with_drawn(fixed, DRAWN, lambda case: legal(case, 8)):
        rank_pool.run(follow, case, alone(model), ranks=num_ranks(case), timeout_s=120)
