"""Promise 1: every layout follows the run of one process in plain torch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import sixfold
from sixfold.engine import Engine
from sixfold.testing import Pool
from tests.covering import Case, all_cases, covering, every_value, label
from tests.ranks import plain
from tests.ranks.rows import RESIDENCIES

FP64_BOUND = 1e-10
FP32_LOSS_BOUND = 1e-5
PRECISE, NARROW = (torch.float64, 5), (torch.float32, 20)
"""Type and steps of the two comparisons."""

FACTORS: dict[str, tuple[Any, ...]] = {
    "model": ("decoder", "llama", "gpt2", "conv", "recommender", "patchwork"),
    "ranks": (1, 2, 3, 4),
    "residency": tuple(RESIDENCIES),
    "accumulation": (1, 3),
    "shares": ("even", "uneven", "empty"),
    "optimizer": ("adamw", "sgd", "adagrad"),
    "given": ("object", "factory", "config"),
    "num_groups": (1, 2),
    "clip_norm": (None, 0.3),
    "loop": ("train_step", "written_out", "two_backwards"),
    "recompute": (None, "full", "selective"),
    "transport": ("host", "network"),
}
DRAWN = ("shares", "optimizer", "given", "num_groups", "clip_norm", "recompute")
"""Not multiplied out in the full product, which would take days, but drawn for each of its cases."""


def legal(case: Case) -> bool:
    grouped_by_config = case["given"] == "config" and case["num_groups"] > 1
    shared_by_one = case["ranks"] == 1 and (case["shares"] != "even" or case["transport"] == "network")
    cut_in_groups = "shard" in RESIDENCIES[case["residency"]] and case["ranks"] != 4
    without_blocks = case["model"] == "recommender" and case["recompute"] is not None
    refused_by_torch = case["loop"] == "two_backwards" and case["recompute"] == "selective"
    beyond_comparison = is_rephrased(case) and case["optimizer"] != "sgd"
    return not (
        grouped_by_config
        or shared_by_one
        or cut_in_groups
        or without_blocks
        or refused_by_torch
        or beyond_comparison
    )


def is_rephrased(case: Case) -> bool:
    """Whether the loss is divided in another place than in one process, by a model that divides in fp32.

    It is rounded differently then, and adaptive optimizers turn that rounding into whole steps of numbers
    whose gradient should be zero.
    """
    return case["loop"] != "train_step" and plain.TASKS[case["model"]].fp32_inside


CASES = covering(FACTORS, legal)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_follows_one_process(case: Case, rank_pool: Pool) -> None:
    rank_pool.run(follow, case, reference(case, *PRECISE), ranks=case["ranks"])


@pytest.mark.parametrize("case", every_value(CASES, lambda case: case["ranks"] > 1), ids=label)
def test_losses_in_fp32_stay_together(case: Case, rank_pool: Pool) -> None:
    """Rounding drifts apart with the steps, whatever the case: every option once, not every pair."""
    rank_pool.run(stay_together, case, reference(case, *NARROW), ranks=case["ranks"])


@pytest.mark.ranks(2)
@pytest.mark.parametrize("recompute", [None, "selective"])
def test_compiled_blocks_with_cut_parameters(recompute: str | None) -> None:
    case = {name: values[0] for name, values in FACTORS.items()}
    case |= {"ranks": 2, "residency": "3", "recompute": recompute, "compile": "aot_eager", "accumulation": 3}
    engine, _, _ = run(case, torch.float64, 3)
    reference = plain.plain_run("decoder", torch.float64, 3, "adamw", 1, None)
    assert plain.farthest(engine.full_state_dict(), reference.model) < FP64_BOUND
    engine.close()


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("residency", ["0", "1", "2", "3"])
def test_follows_one_process_on_a_gpu(residency: str, ranks: int, rank_pool: Pool) -> None:
    """Two ranks share the card through gloo; NCCL refuses that."""
    first = {name: values[0] for name, values in FACTORS.items()}
    case = first | {"residency": residency, "ranks": ranks, "accumulation": 3, "clip_norm": 0.3}
    for way, kind in ((follow, PRECISE), (stay_together, NARROW)):
        found = reference(case, *kind, device="cuda")
        rank_pool.run(way, case, found, device="cuda", ranks=ranks, timeout_s=120)


@pytest.mark.matrix
@pytest.mark.parametrize("ranks", FACTORS["ranks"])
@pytest.mark.parametrize("model", FACTORS["model"])
def test_follows_one_process_in_every_combination(model: str, ranks: int, rank_pool: Pool) -> None:
    draw = random.Random(f"{model} {ranks}")
    first = dict.fromkeys(DRAWN, (None,)) | {"model": (model,), "ranks": (ranks,)}
    for case in all_cases({**FACTORS, **first}, lambda case: True):
        drawn = (case | {name: draw.choice(FACTORS[name]) for name in DRAWN} for _ in range(100))
        if full := next(filter(legal, drawn), None):
            rank_pool.run(follow, full, reference(full, *PRECISE), ranks=ranks)
            rank_pool.run(stay_together, full, reference(full, *NARROW), ranks=ranks)


def test_cases_cover_every_pair() -> None:
    def pairs(cases: Sequence[Case]) -> set[Any]:
        return {
            (one, case[one], other, case[other])
            for case in cases
            for one in case
            for other in case
            if one < other
        }

    # Of a product this large some thousand cases hold every pair many times over.
    some = random.Random(1).sample(all_cases(FACTORS, legal), 5000)
    assert pairs(CASES) == pairs(some)
    assert len(CASES) < 50


def reference(case: Case, dtype: torch.dtype, steps: int, device: str = "cpu") -> plain.PlainRun:
    """What a case is compared with, trained once for all ranks."""
    shape = (case["optimizer"], case["num_groups"], case["clip_norm"])
    return plain.plain_run(case["model"], dtype, steps, *shape, device)


def follow(case: Case, expected: plain.PlainRun, device: str = "cpu") -> None:
    """One case on every rank in fp64: parameters, losses and gradient norms."""
    engine, losses, norms = run(case, *PRECISE, device)
    whole = engine.full_state_dict()
    engine.close()
    bound, norm_bound = (1e-6, 1e-5) if is_rephrased(case) else (FP64_BOUND, FP64_BOUND)
    assert plain.farthest(whole, expected.model) < bound
    assert norms == pytest.approx(expected.grad_norms, rel=norm_bound, abs=0)
    precise = 1e-6 if plain.TASKS[case["model"]].fp32_inside else 1e-12
    assert losses == pytest.approx(expected.losses, rel=precise, abs=0)


def stay_together(case: Case, expected: plain.PlainRun, device: str = "cpu") -> None:
    """One case on every rank in fp32: losses."""
    engine, losses, _ = run(case, *NARROW, device)
    engine.close()
    assert losses == pytest.approx(expected.losses, rel=FP32_LOSS_BOUND, abs=0)
    assert losses[-1] < losses[0]  # it learns, so 20 steps mean something


def run(
    case: Case, dtype: torch.dtype, steps: int, device: str = "cpu"
) -> tuple[Engine, list[float], list[float]]:
    """The same training through the engine, each rank feeding its share."""
    task = plain.TASKS[case["model"]]
    model = task.build().to(device, dtype)
    kind, settings = plain.OPTIMIZERS[case["optimizer"]]
    config: dict[str, Any] = {"optimizer": {}, "batch": {}, "layout": {}}
    config["layout"] |= RESIDENCIES[case["residency"]]
    config["layout"] |= {"recompute": case["recompute"], "compile": case.get("compile")}
    config["layout"]["transport"] = case["transport"] if case["ranks"] > 1 else None
    if case["clip_norm"] is not None:
        config["optimizer"]["clip_norm"] = case["clip_norm"]
    if case["accumulation"] > 1:
        config["batch"]["micro"] = -(-plain.NUM_SAMPLES // (case["ranks"] * case["accumulation"]))
    optimizer: Any = None
    if case["given"] == "config":
        config["optimizer"] |= {"name": case["optimizer"], **settings}
    elif case["given"] == "object":
        optimizer = kind(plain.groups_of(model, settings, case["num_groups"]))
    else:
        optimizer = lambda parameters: kind(plain.groups_of(model, settings, case["num_groups"]))  # noqa: E731
    with plain.small_units():
        engine = sixfold.initialize(
            model, config=config, optimizer=optimizer, loss_fn=task.loss_fn, device=device
        )
    assert (engine.optimizer is optimizer) == (case["given"] == "object")
    losses, norms = [], []
    for step in range(steps):
        batch = plain.cast(task.batch(step), dtype, device)
        share = plain.rows(
            batch, plain.cuts(plain.NUM_SAMPLES, case["ranks"], case["shares"], step)[engine.data_rank]
        )
        if case["loop"] == "train_step":
            losses.append(engine.train_step(share))
        else:
            fractions = (1.0,) if case["loop"] == "written_out" else (0.25, 0.75)
            losses.append(plain.written_out_step(engine, task, share, case["accumulation"], fractions))
        assert engine.last is not None
        assert engine.last.grad_norm is not None
        norms.append(engine.last.grad_norm)
    assert engine.num_samples == steps * plain.NUM_SAMPLES
    return engine, losses, norms


@pytest.mark.ranks(2)
def test_ties_and_frozen_parts_survive() -> None:
    case = {name: values[0] for name, values in FACTORS.items()}
    case |= {"model": "recommender", "ranks": 2}
    before = plain.TASKS["recommender"].build()
    engine, _, _ = run(case, torch.float32, 3)
    model: Any = engine.module
    assert model.item.weight is model.history.weight
    assert torch.equal(model.frozen.weight, before.get_parameter("frozen.weight"))
    assert model.frozen.weight.grad is None
    whole = engine.full_state_dict()
    assert torch.equal(whole["item.weight"], whole["history.weight"])
    assert whole.keys() == model.state_dict().keys()
    assert not torch.equal(whole["rare.weight"], before.get_parameter("rare.weight"))
