"""Models that are cut into stages, and their training in one process of plain torch.

Used by the tests of pipelines. Everything is small; seven blocks divide by no number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sixfold
from sixfold.engine import Engine
from sixfold.models.decoder import Decoder, DecoderConfig
from tests.ranks import plain
from tests.ranks.towers import Block

NUM_LAYERS = 7
MICRO = 2
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 3e-3}),
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
}


def _decoder(tie: bool) -> Decoder:
    return Decoder(
        DecoderConfig(
            vocab_size=24,
            context_length=10,
            width=8,
            num_layers=NUM_LAYERS,
            num_heads=2,
            num_kv_heads=1,
            ffn_width=12,
            tie_embeddings=tie,
        )
    )


def _llama(tie: bool) -> nn.Module:
    from transformers import LlamaForCausalLM

    config = plain.llama_config()
    config.num_hidden_layers, config.tie_word_embeddings = NUM_LAYERS, tie
    model: nn.Module = LlamaForCausalLM(config)
    return model


class Pairs(nn.Module):
    """A block that takes and returns a tuple with a dictionary in it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, given: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
        x, others = given
        return self.block(x) + others["skip"], {
            "skip": torch.tanh(others["skip"] + x),
            "mask": others["mask"],
        }


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.stem(x), {"skip": x.mean(1, keepdim=True), "mask": x[:, :1] > 0}


class Join(nn.Module):
    def forward(self, given: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
        x, others = given
        return torch.where(others["mask"], x, others["skip"] * x)


def _sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), *(Block() for _ in range(NUM_LAYERS - 2)), nn.Linear(6, 2))


def _pairs() -> nn.Module:
    return nn.Sequential(Split(), *(Pairs() for _ in range(NUM_LAYERS - 2)), Join())


def _freeze(model: nn.Module) -> None:
    """What comes first, and some at the end: no gradient goes back over the first border."""
    parameters = list(model.parameters())
    for parameter in (*parameters[: len(parameters) // 2], *parameters[-2:-1]):
        parameter.requires_grad_(False)


def _vectors(step: int) -> plain.Batch:
    draw = torch.Generator().manual_seed(step)
    return {
        "x": torch.randn(plain.NUM_SAMPLES, 4, generator=draw),
        "y": torch.randn(plain.NUM_SAMPLES, 2, generator=draw),
    }


TASKS: dict[str, plain.Task] = {
    "sequential": plain.Task(
        build=_sequential,
        batch=lambda step: dict(zip(("input", "y"), _vectors(step).values(), strict=True)),
        loss=lambda model, batch: F.mse_loss(model(batch["input"]), batch["y"]),
        weight=lambda batch: float(len(batch["y"])),
        loss_fn=lambda output, batch: F.mse_loss(output, batch["y"]),
    ),
    "pairs": plain.Task(
        build=_pairs,
        batch=lambda step: dict(zip(("input", "y"), _vectors(step).values(), strict=True)),
        loss=lambda model, batch: model(batch["input"]).square().mean(),
        weight=lambda batch: float(len(batch["y"])),
        loss_fn=lambda output, batch: output.square().mean(),
    ),
    "decoder": replace(plain.TASKS["decoder"], build=lambda: _decoder(tie=False)),
    "tied-decoder": replace(plain.TASKS["decoder"], build=lambda: _decoder(tie=True)),
    "llama": replace(plain.TASKS["llama"], build=lambda: _llama(tie=False)),
    "tied-llama": replace(plain.TASKS["llama"], build=lambda: _llama(tie=True)),
}


@dataclass(frozen=True)
class Case:
    """One way to train.

    Args:
        model: a name of `TASKS`.
        num_micro: micro-batches of a data rank that has an even share.
        shares: see `plain.cuts`.
        frozen: whether what comes first is.
        ragged: whether batches are of different lengths.
        size: samples in a global batch; None: as many as give `num_micro` micro-batches.
    """

    model: str = "sequential"
    schedule: str = "1f1b"
    pipe: int = 2
    data: int = 1
    num_micro: int = 4
    zero: int = 0
    shares: str = "even"
    frozen: bool = False
    ragged: bool = False
    optimizer: str = "adamw"
    dtype: torch.dtype = torch.float64
    steps: int = 3
    size: int | None = None

    @property
    def num_samples(self) -> int:
        """In a global batch; the last micro-batch of an even share is smaller than the others."""
        return self.size or self.data * (MICRO * self.num_micro - 1)


def build(case: Case) -> nn.Module:
    """The model, always the same one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = TASKS[case.model].build().to(case.dtype)
    if case.frozen:
        _freeze(model)
    return model


def batch_of(case: Case, step: int) -> plain.Batch:
    """The global batch of a step; a ragged one is cut to another length in every step."""
    parts = [TASKS[case.model].batch(step + 100 * number) for number in range(3)]
    whole = {name: torch.cat([part[name] for part in parts])[: case.num_samples] for name in parts[0]}
    batch = plain.cast(whole, case.dtype)
    if case.ragged:
        batch = {name: field[:, : 8 + step % 3] for name, field in batch.items()}
    return batch


def virtual_of(schedule: str) -> int | None:
    """Stages on each rank, for schedules that leave it open."""
    return 2 if schedule in ("interleaved", "breadth-first") else None


def plain_run(case: Case) -> plain.PlainRun:
    """The loop that everything is compared with."""
    return _plain_run(replace(case, schedule="1f1b", pipe=1, zero=0, shares="even"))


@cache
def _plain_run(case: Case) -> plain.PlainRun:
    task, module = TASKS[case.model], build(case)
    kind, settings = OPTIMIZERS[case.optimizer]
    made = kind([each for each in module.parameters() if each.requires_grad], **settings)
    losses, norms = [], []
    for step in range(case.steps):
        made.zero_grad()
        loss = task.loss(module, batch_of(case, step))
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), float("inf"))))
        made.step()
        losses.append(loss.item())
    return plain.PlainRun(module, losses, norms)


def engine_of(case: Case, **layout: Any) -> Engine:
    """The model in an engine, cut as the case says."""
    kind, settings = OPTIMIZERS[case.optimizer]
    asked = {"pipe": case.pipe, "zero": case.zero, **layout}
    if case.pipe > 1:
        asked |= {"schedule": case.schedule, "virtual_stages": virtual_of(case.schedule)}
    with plain.small_units():
        return sixfold.initialize(
            build(case),
            config={"layout": asked, "batch": {"micro": MICRO}},
            optimizer=lambda parameters: kind(parameters, **settings),
            loss_fn=TASKS[case.model].loss_fn,
        )


def share_of(engine: Engine, case: Case, step: int) -> plain.Batch:
    """This rank's part of the global batch of a step."""
    places = plain.cuts(case.num_samples, engine.data_ranks, case.shares, step)[engine.data_rank]
    return plain.rows(batch_of(case, step), places)


def train(
    engine: Engine, case: Case, first: int = 0, *, evaluates: bool = False
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of some updates.

    Args:
        evaluates: whether the same batch is evaluated before each, which must tell the same loss.
    """
    losses, norms = [], []
    for step in range(first, first + case.steps):
        share = share_of(engine, case, step)
        seen = engine.eval_step(share) if evaluates else None
        losses.append(engine.train_step(share))
        assert engine.last is not None
        assert seen is None or abs(seen.loss - losses[-1]) < 1e-5 * abs(losses[-1])
        norms.append(engine.last.grad_norm or 0.0)
    return losses, norms
