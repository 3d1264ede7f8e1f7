"""What parts of a model cost when they are timed, and that timing leaves the model as it was."""

from __future__ import annotations

import copy
import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sixfold
from sixfold.base.errors import ConfigError, ModelError
from sixfold.config import LayoutConfig, load
from sixfold.engine.costs import crossing_memory, cut_by_measure
from sixfold.mesh import Mesh, Streams
from sixfold.models.decoder import Decoder, DecoderConfig
from sixfold.parallel import ModelCut, handed_bytes, measured_costs, on_meta
from sixfold.parallel.pipe.parts import find_parts
from sixfold.pipeline import LossForm
from sixfold.plan import BlockCosts, decide_geometry, decide_stages, transfer_memory
from sixfold.program import training

PAUSE_S = 0.02
CPU = torch.device("cpu")


class Slow(torch.autograd.Function):
    """Nothing, for a while, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        time.sleep(PAUSE_S)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        time.sleep(PAUSE_S)
        return gradient


class Block(nn.Module):
    def __init__(self, *, is_slow: bool = False) -> None:
        super().__init__()
        self.norm, self.linear, self.drop = nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Dropout(0.5)
        self.is_slow = is_slow

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.linear(self.norm(x)))
        out: Tensor = Slow.apply(x) if self.is_slow else x  # type: ignore[no-untyped-call]
        return out


def blocks(slow: int = 0, number: int = 4) -> nn.Sequential:
    return nn.Sequential(*(Block(is_slow=place == slow) for place in range(number)))


def costs_of(model: nn.Module, batch: Tensor, compute: torch.dtype | None = None) -> BlockCosts:
    def run(call: Any) -> Tensor:
        out = call(batch)
        loss: Tensor = out[0] if isinstance(out, tuple) else out.square().mean()
        return loss

    return measured_costs(model, find_parts(model), run, device=CPU, compute=compute)


def test_a_slow_block_costs_its_time_forward_and_backward() -> None:
    costs = costs_of(blocks(slow=1), torch.randn(8, 4))
    assert 2 * PAUSE_S <= costs.blocks[1] < 4 * PAUSE_S
    assert max(costs.blocks[0], *costs.blocks[2:]) < PAUSE_S
    assert (costs.before, costs.after) == (0.0, 0.0)


def test_the_model_is_left_as_it_was() -> None:
    model = blocks(slow=-1).requires_grad_(True)
    own = model[2].forward
    model[2].forward = own
    before = copy.deepcopy(model.state_dict())
    drawn = torch.get_rng_state()
    with Streams(0, CPU).keyed("cost"):
        costs_of(model, torch.randn(8, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [vars(part).get("forward") for part in model] == [None, None, own, None]
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_block_that_stands_twice_shares_its_time() -> None:
    slow = Block(is_slow=True)
    costs = costs_of(nn.Sequential(slow, Block(), slow), torch.randn(8, 4))
    # What is computed behind all blocks counts with the last one.
    assert 2 * PAUSE_S <= costs.blocks[0] <= costs.blocks[2] < 4 * PAUSE_S
    assert costs.blocks[1] < PAUSE_S


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_the_head_counts_with_the_loss_behind_it(tie: bool, compute: torch.dtype | None) -> None:
    config = DecoderConfig.derive(
        vocab_size=20_000, context_length=32, width=16, num_layers=3, num_heads=1, tie_embeddings=tie
    )
    model = Decoder(config)
    model.model.layers.requires_grad_(False)
    costs = costs_of(model, torch.randint(20_000, (4, 33)), compute)
    assert len(costs.blocks) == 3
    assert all(cost > 0 for cost in (*costs.blocks, costs.before))
    # Scores of 20 000 entries against blocks of width 16.
    assert costs.after > max(costs.blocks)


def measured_cut(model: nn.Module, example: Any) -> ModelCut:
    asked = load(values={"layout": {"pipe": 2, "cost": "measured"}, "batch": {"micro": 8}}).config
    mesh = Mesh(decide_geometry(LayoutConfig(), 1), 0, CPU)
    form = LossForm(model, lambda output, batch: F.mse_loss(output, torch.zeros_like(output)))
    cut = ModelCut.decide(model, asked.layout)
    return cut_by_measure(cut, model, asked, mesh, Streams(0, CPU), form, example)


def test_a_slow_block_moves_the_cut() -> None:
    model = blocks(slow=0)
    estimated = ModelCut.decide(model, LayoutConfig(pipe=2))
    measured = measured_cut(model, torch.randn(16, 4))
    for cut, sizes in ((estimated, [2, 2]), (measured, [1, 3])):
        assert cut.plan is not None
        assert [len(each) for each in cut.plan.blocks] == sizes


def test_a_model_that_cannot_be_run_is_told_with_its_own_words() -> None:
    with pytest.raises(ModelError, match=r"measure its parts: RuntimeError: .*8x5") as caught:
        measured_cut(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(16, 5))
    assert "layout.cost" in caught.value.fix


def test_costs_are_not_measured_without_an_example() -> None:
    with pytest.raises(ConfigError, match="given no example") as caught:
        sixfold.initialize(blocks(), config={"layout": {"pipe": 2, "cost": "measured"}})
    assert "example=batch" in caught.value.fix


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(("compute", "size"), [(None, 4), (torch.bfloat16, 2)])
def test_what_parts_hand_on_is_known_without_running_them(
    tie: bool, compute: torch.dtype | None, size: int
) -> None:
    config = DecoderConfig.derive(
        vocab_size=50, context_length=32, width=16, num_layers=2, num_heads=1, tie_embeddings=tie
    )
    model = Decoder(config)
    tokens = torch.zeros(4, 33, dtype=torch.int64, device="meta")
    found = handed_bytes(model, find_parts(model), partial(on_meta(model, compute), tokens))
    assert [found[f"model.layers.{number}"] for number in range(2)] == [4 * 32 * 16 * size] * 2
    assert all("forward" not in vars(part) for part in model.modules())


def test_transfers_are_priced_by_what_may_be_under_way() -> None:
    """Of four micro-batches, 1F1B on three ranks has 3, 2 and 1 that wait for their backward."""
    stages = decide_stages(LayoutConfig(pipe=3), BlockCosts((1.0,) * 3))
    programs = training("1f1b", 3, 4)
    handed = (100, 10, 0)
    assert [transfer_memory(stages, programs, rank, handed) for rank in range(3)] == [
        3 * 100,
        2 * 10 + 3 * 100,
        2 * 10,
    ]
    looped = decide_stages(LayoutConfig(pipe=2, schedule="zero-bubble-v"), BlockCosts((1.0,) * 4))
    # Stages 1 and 2 are on one rank, and what passes between them is sent nowhere.
    assert transfer_memory(looped, training("zero-bubble-v", 2, 4), 1, (0, 1000, 0, 0)) == 0


def test_without_an_example_transfers_are_not_priced(caplog: pytest.LogCaptureFixture) -> None:
    asked = load(values={"layout": {"pipe": 2}, "batch": {"micro": 8}}).config
    mesh = Mesh(decide_geometry(LayoutConfig(), 1), 0, CPU)

    def priced(model: nn.Module, example: Any) -> int:
        form = LossForm(model, lambda output, batch: output.mean())
        return crossing_memory(ModelCut.decide(model, asked.layout), model, asked, mesh, form, example)

    assert priced(blocks(), None) == 0
    # Two micro-batches, both under way from the first rank to the second.
    assert priced(blocks(slow=-1), torch.zeros(16, 4)) == 2 * 8 * 4 * 4

    class Looking(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.sum()) > 1 else x

    with caplog.at_level("INFO"):
        assert priced(nn.Sequential(Looking(4, 4), nn.Linear(4, 4)), torch.zeros(16, 4)) == 0
    assert "does not run on meta" in caplog.text
