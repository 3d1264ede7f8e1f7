"""Stopping and going on equals one straight run, bit for bit, on the same layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

import sixfold
from sixfold.engine import Engine
from tests.ranks import plain

STEPS = 20
STOPS = (3, 7, 13)
GLOBAL_BATCH = 12
DATASET = 50  # epochs end inside the run, and 12 does not divide them


class Tokens(Dataset[dict[str, Tensor]]):
    """Samples that also draw random numbers of their own, as augmentation does."""

    def __len__(self) -> int:
        return DATASET

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        fixed = torch.randint(0, plain.VOCABULARY, (11,), generator=torch.Generator().manual_seed(index))
        fixed[-1] = int(torch.randint(0, plain.VOCABULARY, ()))
        return {"tokens": fixed, "index": torch.tensor(index)}


@dataclass
class Trace:
    """What a run came to, as far as this rank sees it."""

    losses: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)
    samples: list[list[int]] = field(default_factory=list)


def start(compute: str, optimizer: str, ranks: int) -> Engine:
    config: dict[str, Any] = {
        "seed": 3,
        "batch": {"global": GLOBAL_BATCH, "micro": GLOBAL_BATCH // (3 * ranks)},
        # Narrow storage, so that the masters are something else than what the model part holds.
        "precision": {"compute": compute, "storage": compute},
        "optimizer": {"name": optimizer, "lr": 1e-2, "clip_norm": 0.5},
        "lr_schedule": {"name": "cosine", "warmup_steps": 4},
        "train": {"steps": STEPS},
    }
    return sixfold.initialize(plain.TASKS["dropout"].build(), config=config)


def train(engine: Engine, until: int, trace: Trace) -> None:
    torch.manual_seed(engine.num_steps * 7 + 1)  # the process's own stream must not matter
    loader = engine.loader(Tokens())
    while engine.num_steps < until:
        for batch in loader:
            trace.samples.append(batch.pop("index").tolist())
            trace.losses.append(engine.train_step(batch))
            trace.lrs.append(engine.bound.lr)
            assert engine.last is not None
            trace.norms.append(engine.last.grad_norm)
            if engine.num_steps == until:
                return


def everything(engine: Engine) -> dict[str, Tensor]:
    state = {f"master {slot.name}": unit.slot_of(unit.master, slot) for unit, slot in engine.state.slots()}
    state |= {f"working {name}": parameter for name, parameter in engine.module.named_parameters()}
    state |= {f"{key} {name} {start}": part for name, key, start, part in engine.bound.state_pieces()}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("compute", "optimizer", "num_ranks"),
    [("fp32", "adamw", 1), ("fp32", "adamw", 2), ("bf16", "adamw", 2), ("fp32", "adagrad", 2)],
)
def test_three_stops_equal_a_straight_run(
    compute: str, optimizer: str, num_ranks: int, tmp_path: Path
) -> None:
    straight, straight_trace = start(compute, optimizer, num_ranks), Trace()
    train(straight, STEPS, straight_trace)
    stopped = Trace()
    engine = start(compute, optimizer, num_ranks)
    for stop in STOPS:
        train(engine, stop, stopped)
        engine.save(tmp_path / str(stop))
        engine = start(compute, optimizer, num_ranks)
        engine.load(tmp_path / str(stop))
        assert engine.num_steps == stop
    train(engine, STEPS, stopped)

    assert stopped == straight_trace
    assert engine.num_samples == straight.num_samples
    found, expected = everything(engine), everything(straight)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    # There was something to get wrong: the rate moved, and samples came in no order of the dataset's.
    assert len(set(straight_trace.lrs)) > STEPS / 2
    assert any(samples != sorted(samples) for samples in straight_trace.samples)


@pytest.mark.ranks(1, 2)
def test_the_same_run_twice_is_the_same_bit_for_bit(num_ranks: int) -> None:
    """Dropout is keyed by step, rank and micro-batch, not by what was drawn before."""

    def run(steps: int) -> tuple[Trace, dict[str, Tensor]]:
        engine, trace = start("fp32", "adamw", num_ranks), Trace()
        for until in range(1, steps + 1):
            before = torch.get_rng_state() if until > 1 else None
            if before is not None:
                part = {"tokens": plain.TASKS["dropout"].batch(until)["tokens"][:4]}
                trace.losses.append(engine.train_step(part))
                assert torch.equal(torch.get_rng_state(), before)
            torch.rand(until)
        return trace, everything(engine)

    torch.manual_seed(1)
    one, state = run(4)
    torch.manual_seed(2)
    other, other_state = run(4)
    assert one == other
    assert all(torch.equal(state[name], other_state[name]) for name in state)


@pytest.mark.ranks(1, 2)
def test_dropout_differs_between_steps_ranks_micro_batches_and_forwards(num_ranks: int) -> None:
    masks: list[bytes] = []

    class Noise(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.nn.functional.dropout(torch.ones(64), 0.5, self.training)
            masks.append(mask.numpy().tobytes())
            return (self.scale * mask.mean() * x).mean()

    engine = sixfold.initialize(Noise(), config={"batch": {"micro": 1}})
    for _ in range(2):
        engine.train_step(torch.ones(3))
    for _ in range(2):  # two views of one sample, as contrastive losses take them
        engine.backward(engine(torch.ones(1)) + engine(torch.ones(1)))
    engine.step()
    everyones: list[Any] = [None] * num_ranks
    torch.distributed.all_gather_object(everyones, masks)
    flat = [mask for each in everyones for mask in each]
    assert len(set(flat)) == len(flat) == 10 * num_ranks
    with_eval = len(masks)
    engine.eval_step(torch.ones(3))
    assert len(set(masks[with_eval:])) == 1  # no dropout there


@pytest.mark.ranks(1, 2)
def test_learning_rate_and_samples_do_not_depend_on_ranks_or_accumulation(num_ranks: int) -> None:
    steps, peak = 50, 0.02
    expected = [peak * (step + 1) / 5 for step in range(5)]
    expected += [
        peak
        * (0.1 + 0.9 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * t / 44, dtype=torch.float64)).item()))
        for t in range(45)
    ]
    for accumulation in (1, 2, 4):
        config = {
            "batch": {"global": 16, "micro": 16 // (num_ranks * accumulation)},
            "optimizer": {"name": "sgd", "lr": peak},
            "lr_schedule": {"name": "cosine", "warmup_steps": 5, "final_ratio": 0.1},
            "train": {"steps": steps},
        }
        engine = sixfold.initialize(
            torch.nn.Linear(2, 1), config=config, loss_fn=lambda out, batch: out.mean()
        )
        part = torch.ones(16 // num_ranks, 2)
        trace = []
        for _ in range(steps):
            engine.train_step(part)
            trace.append(engine.optimizer.param_groups[0]["lr"])
        assert trace == pytest.approx(expected, rel=1e-12)
        assert engine.num_samples == 16 * steps
