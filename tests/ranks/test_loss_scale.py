"""Training in fp16 with a loss scale, against torch's own GradScaler in one process; and the report of
gradients that are not finite."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sixfold
from sixfold.base.errors import ModelError
from sixfold.engine import Engine
from sixfold.plan import LearningRate
from sixfold.testing import Pool
from tests.ranks import plain, rows
from tests.ranks.rows import RESIDENCIES

MODEL = "decoder"
MICRO = 3
STEPS = 12
FP16_EPS = 2.0**-11
INITIAL, GROWTH_STEPS = 2.0**22, 3  # overflows at first, and grows and overflows again later


ByHand = tuple[dict[str, Tensor], list[float], list[float]]


@cache
def by_hand() -> ByHand:
    """fp16 forward and backward, fp32 masters, torch's GradScaler: masters, losses, scale of each step."""
    task = plain.TASKS[MODEL]
    model = task.build()
    masters = {name: nn.Parameter(each.detach().clone()) for name, each in model.named_parameters()}
    model.half()
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
    optimizer = torch.optim.AdamW(masters.values(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=INITIAL, growth_interval=GROWTH_STEPS)
    losses, scales = [], []
    for step in range(STEPS):
        batch, loss = task.batch(step), 0.0
        model.zero_grad()
        for start in range(0, plain.NUM_SAMPLES, MICRO):
            total, _ = model(**plain.rows(batch, range(start, start + MICRO)))
            scaler.scale(total.float() / task.weight(batch)).backward()
            loss += total.item() / task.weight(batch)
        for name, parameter in model.named_parameters():
            masters[name].grad = parameter.grad
        scales.append(scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(masters[name])
        losses.append(loss)
    return {name: master.detach() for name, master in masters.items()}, losses, scales


def start(layout: dict[str, Any], **precision: Any) -> Engine:
    settings = {"compute": "fp16", "initial_scale": INITIAL, "growth_steps": GROWTH_STEPS, **precision}
    return sixfold.initialize(
        plain.TASKS[MODEL].build(),
        config={
            "layout": layout,
            "batch": {"micro": MICRO},
            "precision": {key: value for key, value in settings.items() if value is not None},
            "optimizer": {"lr": 0.01},
        },
    )


def train(engine: Engine, steps: int) -> list[Any]:
    results = []
    while engine.num_steps < steps:
        batch = plain.TASKS[MODEL].batch(engine.num_steps)
        places = plain.cuts(plain.NUM_SAMPLES, engine.data_ranks, "even", 0)[engine.data_rank]
        engine.train_step(plain.rows(batch, places))
        results.append(engine.last)
    return results


def farthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((found[name] - each).abs().max()) for name, each in expected.items())


@pytest.mark.parametrize(("residency", "ranks"), rows.on(1, 2))
def test_fp16_follows_torchs_own_scaler(residency: str, ranks: int, rank_pool: Pool) -> None:
    rank_pool.run(follow, RESIDENCIES[residency], by_hand(), ranks=ranks)


def follow(layout: dict[str, Any], expected: ByHand) -> None:
    masters, losses, scales = expected
    engine = start(layout)
    results = train(engine, STEPS)
    assert [result.loss_scale for result in results] == scales
    skipped = [result.skipped for result in results]
    overflowed = [scales[step + 1] < scales[step] for step in range(STEPS - 1)]
    assert skipped[:-1] == overflowed
    assert 2 <= sum(skipped) < STEPS / 2
    assert max(scales[5:]) > min(scales), "the scale grows again"
    assert engine.num_skipped == sum(skipped)
    assert engine.num_samples == STEPS * plain.NUM_SAMPLES
    # Same micro-batches, so the same roundings in fp16; Adam turns what differs into parts of its rate.
    assert [result.loss for result in results] == pytest.approx(losses, rel=4 * FP16_EPS, abs=0)
    assert farthest(engine.full_state_dict(), masters) < 0.01 * 0.2
    assert {parameter.dtype for parameter in engine.module.parameters()} == {torch.float16}


@pytest.mark.ranks(1, 2)
def test_a_models_own_fp16_is_scaled_too() -> None:
    engine = sixfold.initialize(
        nn.Linear(4, 1).half(), loss_fn=lambda output, batch: (output.float() - 1).square().mean()
    )
    engine.train_step((torch.ones(2, 4, dtype=torch.float16),))
    assert engine.last is not None
    assert engine.last.loss_scale == 65536.0


@pytest.mark.ranks(2)
def test_a_skipped_update_changes_nothing_but_the_scale() -> None:
    engine = start({"zero": 2}, initial_scale=2.0**40)
    before = engine.full_state_dict()
    (result,) = train(engine, 1)
    assert result.skipped
    assert result.loss == pytest.approx(by_hand()[1][0], rel=1e-2)
    assert farthest(engine.full_state_dict(), before) == 0.0
    assert engine.bound.state_specs() == {}
    assert (engine.num_steps, engine.num_skipped) == (1, 1)
    engine.learning_rate = LearningRate("linear", 4, 0.0, 10)
    while engine.last.skipped:  # type: ignore[union-attr]
        train(engine, engine.num_steps + 1)
    assert engine.bound.lr == pytest.approx(0.01 / 4), "the schedule counts updates that were made"


@pytest.mark.ranks(2)
def test_a_checkpoint_holds_the_scale(tmp_path: Path) -> None:
    whole = start({"zero": 1})
    expected = [result.loss_scale for result in train(whole, STEPS)]
    first = start({"zero": 0})
    found = [result.loss_scale for result in train(first, 5)]
    first.save(tmp_path)
    second = start({"zero": 2})
    second.load(tmp_path)
    assert second.num_skipped == first.num_skipped > 0
    assert found + [result.loss_scale for result in train(second, STEPS)] == expected


@pytest.mark.ranks(2)
def test_a_fixed_scale_is_undone_and_overflows_loudly() -> None:
    unscaled, scaled = (
        start({"zero": 0}, compute="fp32", initial_scale=None, growth_steps=None),
        start({"zero": 0}, initial_scale=None, growth_steps=None, loss_scale=1024.0),
    )
    train(unscaled, 1)
    train(scaled, 1)
    gradients, expected = scaled.gradients(), unscaled.gradients()
    largest = max(float(each.abs().max()) for each in expected.values())
    assert farthest(gradients, expected) < 0.01 * largest
    loud = start({"zero": 2}, initial_scale=None, growth_steps=None, loss_scale=2.0**40)
    with pytest.raises(ModelError, match=r"of update 1 is .*, the loss scale 1.09951e\+12"):
        train(loud, 1)


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"fine": nn.Linear(2, 1), "sick": nn.Linear(2, 1, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return (self.parts["fine"](x) + self.parts["sick"](x.sqrt())).float().mean()


@pytest.mark.ranks
@pytest.mark.parametrize(("zero", "num_ranks"), rows.presets(1, 3))
@pytest.mark.parametrize("compute", ["fp32", "fp16"])
def test_what_never_becomes_finite_is_reported_with_parameter_rank_and_step(compute: str, zero: int) -> None:
    scale = {"initial_scale": 4.0} if compute == "fp16" else {}
    engine = sixfold.initialize(
        Half(), config={"layout": {"zero": zero}, "precision": {"compute": compute, **scale}}
    )
    engine.train_step(torch.ones(2, 2))
    last = engine.data_ranks - 1
    bad = torch.full((2, 2), -1.0 if engine.data_rank == last else 1.0)
    failed = 2 if compute == "fp32" else 4
    for _ in range(failed - 2):  # 4, 2, and then the scale would fall below 1
        engine.train_step(bad)
    with pytest.raises(ModelError) as caught:
        engine.train_step(bad)
    assert f"of update {failed} is nan" in caught.value.given
    assert (
        f"first: parts.sick.weight (it or others of its unit before the sum on rank(s) {last})"
        in caught.value.given
    )
    assert engine.num_skipped == failed - 2
