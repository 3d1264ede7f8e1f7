"""Pipelines follow one process: every schedule, residency and kind of model, pairwise."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from sixfold.program import SCHEDULES, stages_of
from sixfold.testing import Pool
from tests.covering import Case, all_cases, covering, label
from tests.ranks import pipes, plain
from tests.ranks.test_parity import FP32_LOSS_BOUND, FP64_BOUND

FACTORS: dict[str, tuple[Any, ...]] = {
    "schedule": tuple(SCHEDULES),
    "pipe": (2, 3, 4),
    "num_micro": (1, 4, 7, 8),
    "zero": (0, 1, 2, 3),
    "data": (1, 2),
    "shares": ("even", "uneven", "empty"),
    "model": ("pairs", "llama", "tied-decoder", "tied-llama"),
    "frozen": (False, True),
    "ragged": (False, True),
    "evaluates": (False, True),
    "recompute": (None, "full", "selective"),
    "optimizer": ("adamw", "sgd"),
    "transport": ("host", "network"),
}

DRAWN = ("shares", "frozen", "ragged", "evaluates", "recompute", "optimizer", "transport")
"""Not multiplied out in the full product, but drawn for each of its cases."""


def legal(case: Case) -> bool:
    num_stages = sum(map(len, stages_of(case["schedule"], case["pipe"], pipes.virtual_of(case["schedule"]))))
    # Seven blocks, and the head of a language model may be a stage of its own.
    is_sequential = case["model"] == "pairs"
    too_many = num_stages > (pipes.NUM_LAYERS if is_sequential else pipes.NUM_LAYERS + 1)
    too_large = case["pipe"] * case["data"] > 4
    nothing_to_pad = case["ragged"] and is_sequential
    tied_frozen = case["frozen"] and case["model"].startswith("tied")
    one_share = case["data"] == 1 and case["shares"] != "even"
    return not (too_many or too_large or nothing_to_pad or tied_frozen or one_share)


CASES = covering(FACTORS, legal)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_a_pipeline_follows_one_process(case: Case, rank_pool: Pool) -> None:
    rank_pool.run(follow, case, pipes.plain_run(way_of(case)), ranks=case["pipe"] * case["data"])


@pytest.mark.matrix
@pytest.mark.parametrize("pipe", FACTORS["pipe"])
@pytest.mark.parametrize("schedule", FACTORS["schedule"])
def test_a_pipeline_follows_one_process_in_every_combination(
    schedule: str, pipe: int, rank_pool: Pool
) -> None:
    draw = random.Random(f"{schedule} {pipe}")
    fixed = dict.fromkeys(DRAWN, (None,)) | {"schedule": (schedule,), "pipe": (pipe,)}
    for case in all_cases({**FACTORS, **fixed}, lambda case: True):
        drawn = (case | {name: draw.choice(FACTORS[name]) for name in DRAWN} for _ in range(100))
        if full := next(filter(legal, drawn), None):
            rank_pool.run(follow, full, pipes.plain_run(way_of(full)), ranks=pipe * full["data"])


@pytest.mark.ranks(2)
@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble-v"])
def test_losses_in_fp32_stay_together(schedule: str) -> None:
    case = pipes.Case(model="tied-llama", schedule=schedule, dtype=torch.float32, steps=20)
    engine = pipes.engine_of(case)
    losses, _ = pipes.train(engine, case)
    engine.close()
    assert losses == pytest.approx(pipes.plain_run(case).losses, rel=FP32_LOSS_BOUND, abs=0)


def way_of(case: Case) -> pipes.Case:
    """All of it but whether losses are evaluated, and what the layout says besides."""
    besides = ("evaluates", "recompute", "transport")
    return pipes.Case(**{name: value for name, value in case.items() if name not in besides})


def follow(case: Case, reference: plain.PlainRun) -> None:
    """One case on every rank, in fp64."""
    way = way_of(case)
    engine = pipes.engine_of(way, recompute=case["recompute"], transport=case["transport"])
    losses, norms = pipes.train(engine, way, evaluates=case["evaluates"])
    whole = engine.full_state_dict()
    precise = 1e-6 if pipes.TASKS[way.model].fp32_inside else 1e-12
    assert plain.farthest(whole, reference.model) < FP64_BOUND
    assert norms == pytest.approx(reference.grad_norms, rel=FP64_BOUND, abs=0)
    assert losses == pytest.approx(reference.losses, rel=precise, abs=0)
    assert whole.keys() == engine.module.state_dict(keep_vars=True).keys()
    engine.close()
