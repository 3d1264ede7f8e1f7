"""Checkpoints over all axes: what one layout wrote, any other reads, would write alike, and goes on from."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sixfold
from sixfold.checkpoint import open_checkpoint
from sixfold.checkpoint.exporting import export
from sixfold.engine import Engine
from sixfold.models.decoder import Decoder, DecoderConfig
from sixfold.models.moe import ExpertsConfig
from sixfold.testing import Pool
from tests.covering import Case, covering
from tests.ranks.test_checkpoint import bytes_of

SAMPLES, LENGTH, VOCABULARY = 12, 8, 25
"""A vocabulary that no degree divides."""


def _decoder() -> nn.Module:
    """Tied, with a frozen norm, and with the load in it that the balance of experts follows."""
    experts = ExpertsConfig(4, num_shared=1, balance="loss", balance_rate=0.5)
    sizes = {"width": 16, "num_layers": 4, "num_heads": 2, "ffn_width": 8, "context_length": LENGTH}
    model = Decoder(DecoderConfig.derive(vocab_size=VOCABULARY, experts=experts, **sizes))
    model.model.layers[1].input_layernorm.requires_grad_(False)
    return model


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 4}
    model: Any = MixtralForCausalLM(MixtralConfig(**sizes, **heads, tie_word_embeddings=True))
    model.set_experts_implementation("eager")  # the grouped product knows no fp64
    return model  # type: ignore[no-any-return]


def _tokens(step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {"tokens": torch.randint(0, VOCABULARY, (SAMPLES, LENGTH + 1), generator=draw)}


def _labelled(step: int) -> dict[str, Tensor]:
    (tokens,) = _tokens(step).values()
    return {"input_ids": tokens, "labels": tokens}


@dataclass(frozen=True)
class Task:
    """A model, its batches, and what updates it."""

    build: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Tensor]]
    optimizer: dict[str, Any]
    bound: float


TASKS = {
    "decoder": Task(_decoder, _tokens, {"name": "adamw", "lr": 0.01}, 1e-10),
    # Parts of it compute in fp32.
    "mixtral": Task(_mixtral, _labelled, {"name": "sgd", "lr": 0.1, "momentum": 0.9, "ema_decay": 0.5}, 1e-5),
}

AXES = ("data", "shard", "tensor", "pipe", "context", "expert")
FACTORS: dict[str, tuple[Any, ...]] = {
    "model": tuple(TASKS),
    "data": (1, 2, 4),
    "zero": (0, 2, 3),
    "shard": (None, 2),
    "tensor": (1, 2),
    "pipe": (1, 2),
    "schedule": (None, "interleaved", "zero-bubble-v"),
    "context": (1, 2),
    "expert": (1, 2, 4),
}


def num_ranks(case: Case) -> int:
    return int(case["data"] * case["context"] * case["tensor"] * case["pipe"])


def legal(case: Case) -> bool:
    replicas = case["data"] * case["context"]
    has_schedule = case["schedule"] is None or case["pipe"] > 1
    has_groups = case["shard"] is None or (replicas == 4 and case["zero"] > 0)
    return num_ranks(case) <= 4 and replicas % case["expert"] == 0 and has_schedule and has_groups


def links(cases: list[Case]) -> set[tuple[str, str]]:
    """(axis, axis) for all that are cut over the second after what was cut over the first."""

    def cut(case: Case) -> list[str]:
        return [axis for axis in AXES if case[axis] not in (None, 1)]

    return {link for first, then in pairwise(cases) for link in product(cut(first), cut(then))}


@cache
def walks() -> dict[str, list[Case]]:
    """All pairs of options, for each model in an order in which many axes follow each other: the best of
    some."""
    cases, draw, seen = covering(FACTORS, legal), random.Random(0), set[tuple[str, str]]()
    found: dict[str, list[Case]] = {}
    for model in TASKS:
        own = [case for case in cases if case["model"] == model]
        orders = (draw.sample(own, len(own)) for _ in range(1000))
        found[model] = max(orders, key=lambda order: len(links(order) - seen))
        seen |= links(found[model])
    return found


def test_each_axis_follows_each() -> None:
    assert set.union(*map(links, walks().values())) == set(product(AXES, AXES))


def engine_of(case: Case) -> Engine:
    task = TASKS[case["model"]]
    layout = {key: case[key] for key in FACTORS if key in case and key != "model"}
    if layout.get("schedule") == "interleaved":
        layout["virtual_stages"] = 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = task.build().double()
    config = {"layout": layout, "batch": {"micro": 3}, "optimizer": task.optimizer}
    return sixfold.initialize(model, config=config)


def step(engine: Engine, case: Case) -> float:
    batch = TASKS[case["model"]].batch(engine.num_steps)
    return engine.train_step(
        {name: field.chunk(engine.data_ranks)[engine.data_rank] for name, field in batch.items()}
    )


@pytest.mark.parametrize("model", TASKS)
def test_every_layout_goes_on_from_what_another_one_wrote(
    model: str, tmp_path: Path, rank_pool: Pool
) -> None:
    """All write the same bytes of the same state, so what one of them has written stands for what any has."""
    walk, bound = walks()[model], TASKS[model].bound
    losses = rank_pool.run(alone, model, len(walk), tmp_path, ranks=1)[0]
    for number, case in enumerate(walk):
        before, after = tmp_path / str(number), tmp_path / str(number + 1)
        loss = rank_pool.run(visit, case, before, after, ranks=num_ranks(case), timeout_s=60)[0]
        assert loss == pytest.approx(losses[number], rel=bound), case
    last, expected = open_checkpoint(tmp_path / str(len(walk))), open_checkpoint(tmp_path / "alone")
    for name, tensor in expected.model():
        torch.testing.assert_close(last.read_model(name), tensor, rtol=0, atol=bound, msg=name)
    if model == "mixtral":
        has_whole_names_elsewhere(last, tmp_path / "exported")


def alone(model: str, num_steps: int, folder: Path) -> list[float]:
    """One process: saves after its first update, and at the end; its further losses."""
    engine = engine_of({"model": model})
    step(engine, {"model": model})
    engine.save(folder / "0")
    losses = [step(engine, {"model": model}) for _ in range(num_steps)]
    engine.save(folder / "alone")
    engine.close()
    return losses


def visit(case: Case, before: Path, after: Path) -> float:
    """Load, and save the same; then one more update, and save that."""
    engine = engine_of(case)
    engine.load(before)
    saved, whole = open_checkpoint(before), engine.full_state_dict()
    assert set(saved.model_names) == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, saved.read_model(name)), name
    engine.save(again := before.with_name(f"{before.name}-again"))
    assert bytes_of(again) == bytes_of(before)
    loss = step(engine, case)
    engine.save(after)
    engine.close()
    return loss


def has_whole_names_elsewhere(saved: Any, folder: Path) -> None:
    """A library that knows nothing of layouts reads every tensor, under its own names."""
    from transformers import AutoModelForCausalLM

    export(saved, folder)
    module, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float64)
    assert not any(told.values())
    assert set(saved.model_names) == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, saved.read_model(name)), name
