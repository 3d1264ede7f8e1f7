"""Number types: narrow working copies of wide masters, against the same written by hand."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import sixfold
from tests.ranks import plain

MODEL = "decoder"
MICRO = 3
BF16_EPS = 2.0**-8
"""Distance from 1 to the next bf16 number is twice this: one rounding errs by at most this, relatively."""
STEPS = 5
LR = 0.05


@cache
def by_hand(steps: int) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor], float]:
    """bf16 forward and backward per micro-batch, gradients summed in fp32, SGD on fp32 masters.

    Returns losses, masters, the last gradients, and the largest gradient met.
    """
    task = plain.TASKS[MODEL]
    model = task.build()
    masters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.bfloat16()
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
    losses, largest, grads = [], 0.0, {}
    for step in range(steps):
        batch = task.batch(step)
        grads = {name: torch.zeros_like(master) for name, master in masters.items()}
        loss = 0.0
        for start in range(0, plain.NUM_SAMPLES, MICRO):
            total, _ = model(**plain.rows(batch, range(start, start + MICRO)))
            model.zero_grad()
            # The form of division is part of the numbers: samples before backward, targets after it.
            (total / plain.NUM_SAMPLES).backward()
            loss += total.item() / task.weight(batch)
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                grads[name] += parameter.grad
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                grads[name] *= plain.NUM_SAMPLES / task.weight(batch)
                masters[name] -= LR * grads[name]
                parameter.copy_(masters[name])
                largest = max(largest, float(grads[name].abs().max()))
        losses.append(loss)
    return losses, masters, grads, largest


def by_engine(steps: int, **precision: str) -> tuple[list[float], dict[str, Tensor], Any]:
    task = plain.TASKS[MODEL]
    config = {
        "precision": {"compute": "bf16", **precision},
        "batch": {"micro": MICRO},
        "optimizer": {"name": "sgd", "lr": LR},
    }
    engine = sixfold.initialize(task.build(), config=config)
    part = plain.cuts(plain.NUM_SAMPLES, engine.data_ranks, "even", 0)[engine.data_rank]
    losses = [engine.train_step(plain.rows(task.batch(step), part)) for step in range(steps)]
    return losses, engine.full_state_dict(), engine


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


@pytest.mark.ranks(1, 2, 4)
def test_bf16_with_fp32_masters_is_what_one_writes_by_hand() -> None:
    # Same micro-batches, so the same bf16 roundings; only the order of the fp32 sums differs.
    _, masters, _, largest = by_hand(1)
    _, found, engine = by_engine(1)
    num_sums = plain.NUM_SAMPLES // MICRO
    weight = max(float(master.abs().max()) for master in masters.values())
    fp32_eps = torch.finfo(torch.float32).eps
    assert distance(found, masters) <= fp32_eps * (weight + 4 * num_sums * LR * largest)
    for parameter in engine.module.parameters():
        assert parameter.dtype == torch.bfloat16
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
    for name, parameter in engine.module.named_parameters():
        assert found[name].dtype == torch.float32
        assert torch.equal(parameter, found[name].bfloat16())

    # From then on such a difference may round a weight to the other neighbour in bf16, which moves
    # gradients by about one bf16 rounding.
    losses, masters, _, largest = by_hand(STEPS)
    found_losses, found, _ = by_engine(STEPS)
    assert distance(found, masters) <= STEPS * LR * largest * BF16_EPS
    assert found_losses == pytest.approx(losses, rel=BF16_EPS / 4, abs=0)
    exact = plain.plain_run(MODEL, torch.float32, STEPS, "sgd", 1, None)
    assert found_losses[0] == pytest.approx(exact.losses[0], rel=2 * BF16_EPS, abs=0)


@pytest.mark.ranks(1, 2)
def test_narrow_gradients_and_narrow_exchange_are_different_and_close(num_ranks: int) -> None:
    _, _, grads, largest = by_hand(1)
    found = {}
    for kind in ("grad", "reduce"):
        _, _, engine = by_engine(1, **{kind: "bf16"})
        found[kind] = {name: parameter.grad for name, parameter in engine.module.named_parameters()}
        gap = distance(found[kind], grads)
        # One rounding per addition: 4 micro-batches in all, the exchange, and the division by targets.
        assert 0 < gap <= 6 * BF16_EPS * largest, kind
    assert {grad.dtype for grad in found["grad"].values()} == {torch.bfloat16}
    assert {grad.dtype for grad in found["reduce"].values()} == {torch.float32}
    assert distance(found["grad"], found["reduce"]) > 0


@pytest.mark.ranks(2)
def test_masters_keep_what_bf16_would_lose() -> None:
    def moved(**precision: str) -> tuple[int, Any]:
        task = plain.TASKS[MODEL]
        config = {"precision": {"compute": "bf16", **precision}, "optimizer": {"name": "sgd", "lr": 1e-5}}
        engine = sixfold.initialize(task.build(), config=config)
        before = engine.full_state_dict()
        engine.train_step(task.batch(0))
        after = engine.full_state_dict()
        return sum(int((after[name] != before[name]).sum()) for name in before), engine

    with_master, _ = moved()
    without, engine = moved(master="bf16")
    assert without < with_master / 4
    assert engine.full_state_dict()["model.norm.weight"].dtype == torch.float32  # `storage`
    _, narrow, _ = by_engine(1, storage="bf16")
    assert {tensor.dtype for tensor in narrow.values()} == {torch.bfloat16}


@pytest.mark.ranks(2)
def test_models_of_mixed_types_keep_them() -> None:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {"wide": torch.nn.Linear(4, 4).double(), "narrow": torch.nn.Linear(4, 4).bfloat16()}
    )

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["narrow"](self.parts["wide"](x).bfloat16()).double()  # type: ignore[no-any-return]

    engine = sixfold.initialize(
        Both(), config={}, loss_fn=lambda output, batch: (output - batch[1]).square().mean()
    )
    x = torch.randn(8, 4, dtype=torch.float64)
    losses = [engine.train_step((x, x)) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert [parameter.dtype for parameter in model["wide"].parameters()] == [torch.float64] * 2
    assert [parameter.dtype for parameter in model["narrow"].parameters()] == [torch.bfloat16] * 2


@pytest.mark.ranks(1)
def test_only_the_modules_inputs_are_cast() -> None:
    """A target that bf16 cannot hold reaches the loss function as it was given."""
    seen = []

    def loss_fn(output: Tensor, batch: Any) -> Tensor:
        seen.append((output.dtype, batch["target"].dtype, float(batch["target"][0])))
        return (output.float() - batch["target"]).mean()

    class Model(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            assert x.dtype == torch.bfloat16
            return super().forward(x)

    engine = sixfold.initialize(Model(2, 1), config={"precision": {"compute": "bf16"}}, loss_fn=loss_fn)
    engine.train_step({"x": torch.ones(1, 2), "target": torch.tensor([1.0001])})
    assert seen == [(torch.bfloat16, torch.float32, pytest.approx(1.0001, rel=1e-7))]


@pytest.mark.ranks(2)
def test_the_norm_of_narrow_gradients_is_not_narrow() -> None:
    torch.manual_seed(0)
    engine = sixfold.initialize(
        torch.nn.Linear(40, 7),
        config={"precision": {"compute": "bf16", "grad": "bf16"}},
        loss_fn=lambda output, batch: output.square().mean(),
    )
    engine.train_step((torch.randn(4, 40),))
    gradients = [parameter.grad for parameter in engine.module.parameters()]
    squares = sum(float(gradient.double().square().sum()) for gradient in gradients if gradient is not None)
    assert engine.last is not None
    assert engine.last.grad_norm == pytest.approx(squares**0.5, rel=1e-5)
