"""What an engine over a pipeline does besides training: whole views, checkpoints, ties, refusals."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import sixfold
from sixfold.base.errors import ModelError, StateError
from sixfold.base.ring import Topic
from sixfold.models.decoder import Decoder
from sixfold.pipeline import Transfers
from sixfold.pipeline.comparing import compare
from sixfold.plan import persistent_memory
from sixfold.simulate import simulated_again
from sixfold.testing.exchanges import noted_exchanges
from tests.ranks import pipes, plain

TIED = pipes.Case(model="tied-decoder", schedule="zero-bubble-v", pipe=2)
"""First and last stage on one rank, with a weight in common."""


@pytest.mark.ranks(2)
@pytest.mark.parametrize("call", ["forward", "backward", "step"])
def test_the_written_out_loop_names_train_step(call: str) -> None:
    engine = pipes.engine_of(pipes.Case())
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: engine(torch.zeros(2, 4, dtype=torch.float64)),
        "backward": lambda: engine.backward(torch.zeros((), requires_grad=True)),
        "step": engine.step,
    }
    with pytest.raises(StateError, match=r"layout.pipe = 2") as caught:
        calls[call]()
    assert "engine.train_step(batch)" in caught.value.fix
    engine.close()


@pytest.mark.ranks(2)
def test_different_batches_within_a_pipeline_are_refused() -> None:
    case = pipes.Case()
    engine = pipes.engine_of(case)
    with pytest.raises(ModelError, match="different batches") as caught:
        engine.train_step(pipes.batch_of(case, engine.mesh.rank))
    assert "rank=engine.data_rank" in caught.value.fix
    engine.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("transport", ["host", "network"])
@pytest.mark.parametrize("given", ["longer", "more", "none"])
@pytest.mark.parametrize("is_new", [True, False])
def test_batches_of_different_shapes_are_refused_before_anything_is_sent(
    transport: str, given: str, is_new: bool
) -> None:
    """Whichever of the shapes ranks have seen before: else one of them waits for ever, or reads garbage."""
    case = pipes.Case(model="decoder")
    engine = pipes.engine_of(case, transport=transport)
    batch = pipes.batch_of(case, 0)
    if not is_new:
        engine.train_step({name: field[:, :8] for name, field in batch.items()})
    wrong = {
        "longer": batch,
        "more": {name: torch.cat([field[:, :8]] * 2) for name, field in batch.items()},
        "none": None,
    }
    own = wrong[given] if engine.mesh.pipe_rank else {name: field[:, :8] for name, field in batch.items()}
    with noted_exchanges() as topics, pytest.raises(ModelError, match="different batches"):
        engine.train_step(own)
    assert transfers_of(topics) == []
    engine.close()


def transfers_of(topics: list[Topic]) -> list[tuple[str, int]]:
    """Direction and number of elements of what went between stages."""
    return [(topic.group.partition(":")[2], topic.numel) for topic in topics if topic.op == "transfer"]


@pytest.mark.ranks(2)
def test_shapes_are_told_when_they_are_new_and_never_again() -> None:
    case = pipes.Case(model="decoder", num_micro=3)
    engine = pipes.engine_of(case)
    sent: list[tuple[str, int]] = []

    def messages(length: int, num_samples: int = 2 * pipes.MICRO) -> int:
        batch = {name: field[:num_samples, :length] for name, field in pipes.batch_of(case, 0).items()}
        with noted_exchanges() as topics:
            engine.train_step(batch)
        found = transfers_of(topics)
        sent.extend(found)
        return len(found)

    # Two micro-batches: an activation and its gradient each. A new shape: its length and its words.
    assert messages(8) == 4 + 2
    assert messages(8) == 4
    assert messages(10) == 4 + 2
    assert messages(8) == messages(10) == 4
    # A second micro-batch that is smaller than the first one is of a shape of its own.
    assert messages(8, num_samples=3) == 4 + 2
    assert messages(8, num_samples=3) == 4
    told = [each for each in sent if each[1] == 1]
    assert len(told) == 3
    assert {way for way, _ in told} == {"0>1"}
    engine.close()


@pytest.mark.ranks(2)
def test_rank_0_has_the_first_weights_whatever_the_others_drew() -> None:
    rank = torch.distributed.get_rank()
    case = pipes.Case(model="tied-decoder")
    model = pipes.build(case)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(rank)
    engine = sixfold.initialize(model, config={"layout": {"pipe": 2}})
    assert plain.farthest(engine.full_state_dict(), pipes.build(case)) == 0
    engine.close()


@pytest.mark.ranks(2)
def test_a_model_on_meta_starts_as_everywhere() -> None:
    def started(**layout: Any) -> dict[str, torch.Tensor]:
        with torch.device("meta"):
            model = Decoder(pipes.build(pipes.Case(model="decoder")).config)
        engine = sixfold.initialize(model, config={"layout": layout, "seed": 5})
        whole = engine.full_state_dict()
        engine.close()
        return whole

    alone, cut = started(), started(pipe=2)
    assert all(torch.equal(alone[name], cut[name]) for name in alone)
    assert alone.keys() == cut.keys()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("zero", [0, 3])
def test_numbers_of_other_stages_are_told_to_be_elsewhere(zero: int) -> None:
    engine = pipes.engine_of(pipes.Case(zero=zero))
    name = "0.weight" if engine.mesh.pipe_rank else "6.weight"
    parameter = engine.module.get_parameter(name)
    assert parameter.numel() > 0
    with pytest.raises(StateError, match="on a rank that has other stages") as caught:
        parameter.sum()
    assert name in str(caught.value)
    engine.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("zero", [0, 3])
def test_the_whole_model_can_be_read_used_and_edited(zero: int) -> None:
    case = replace(TIED, zero=zero)
    engine = pipes.engine_of(case)
    tokens = pipes.batch_of(case, 0)["tokens"]
    reference = pipes.build(case)
    with torch.no_grad(), engine.gathered():
        loss, weight = engine.module(tokens)
        assert torch.equal(loss, reference(tokens)[0])
        if engine.mesh.rank == 0:
            for parameter in engine.module.parameters():
                parameter.mul_(2)
    for parameter in reference.parameters():
        parameter.data.mul_(2)
    assert plain.farthest(engine.full_state_dict(), reference) == 0
    # The copy on the last stage was edited too.
    assert engine.eval_step({"tokens": tokens}).loss == pytest.approx(
        float(reference(tokens)[0] / weight), rel=1e-12
    )
    engine.close()


@pytest.mark.ranks(2)
def test_copies_of_a_tied_weight_stay_equal_and_count_once(tmp_path: Path) -> None:
    reference = pipes.plain_run(TIED)
    engine = pipes.engine_of(TIED)
    _, norms = pipes.train(engine, TIED)
    assert norms == pytest.approx(reference.grad_norms, rel=1e-10)
    copies = [
        unit.working[: unit.plan.slots[0].numel] for unit in engine.state.units if unit.plan.tied == (0, 3)
    ]
    assert len(copies) == (2 if engine.mesh.pipe_rank == 0 else 0)
    assert all(torch.equal(copies[0], each) for each in copies)
    gradients = engine.gradients()
    expected = dict(reference.model.named_parameters())
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name].grad, atol=1e-12)
    engine.save(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == expected.keys()
    engine.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_memory_is_what_the_plan_says(zero: int) -> None:
    case = replace(TIED, zero=zero, steps=1)
    engine = pipes.engine_of(case)
    pipes.train(engine, case)
    assert engine.memory() == persistent_memory(engine.plan, num_moments=2)
    engine.close()


@pytest.mark.ranks(2)
def test_averages_and_bounds_hold_over_all_stages() -> None:
    case = pipes.Case(model="tied-decoder")

    def trained(**layout: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        config = {
            "layout": layout,
            "optimizer": {"lr": 1e-2, "clip_norm": 0.05, "ema_decay": 0.9},
            "batch": {"micro": pipes.MICRO},
        }
        engine = sixfold.initialize(pipes.build(case), config=config)
        pipes.train(engine, case)
        assert engine.last is not None
        assert engine.last.grad_norm is not None
        assert engine.last.grad_norm > 0.05
        both = engine.full_state_dict(), engine.ema_state_dict()
        engine.close()
        return both

    for alone, cut in zip(trained(), trained(pipe=2), strict=True):
        assert all(torch.allclose(alone[name], cut[name], atol=1e-10) for name in alone)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zero-bubble-v"])
def test_transfers_take_no_more_shared_memory_than_they_are_priced(schedule: str) -> None:
    case = pipes.Case(model="decoder", schedule=schedule, num_micro=6, size=12)
    batch = {name: field[:, :8] for name, field in pipes.batch_of(case, 0).items()}
    asked = {"layout": {"pipe": 2, "schedule": schedule}, "batch": {"micro": pipes.MICRO}}
    priced: list[int] = []
    engine = initialize_noting(priced, pipes.build(case), config=asked, example=batch)
    assert engine.mesh.host is not None
    scratch = engine.mesh.host.scratch
    make, taken = scratch._make, []

    def noting(numel: int, dtype: torch.dtype) -> torch.Tensor:
        # All else that is exchanged here is a few numbers, and shapes in words.
        taken.append(numel * dtype.itemsize if numel > 16 and dtype.is_floating_point else 0)
        return make(numel, dtype)

    scratch._make = noting  # type: ignore[method-assign]
    for step in range(4):
        if engine.mesh.pipe_rank == step % 2:  # who reads late has the other's messages pile up
            time.sleep(0.05)
        engine.train_step(batch)
    assert 0 < sum(taken) <= priced[0]
    engine.close()


def initialize_noting(priced: list[int], *args: Any, **kwargs: Any) -> sixfold.Engine:
    """An engine, and how many bytes of transfers it expects in shared memory."""
    module = sys.modules["sixfold.engine.initialize"]
    price = module.crossing_memory

    def noting(*rest: Any) -> int:
        priced.append(price(*rest))
        return priced[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "crossing_memory", noting)
        return sixfold.initialize(*args, **kwargs)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("model", ["sequential", "llama"])
def test_a_batch_of_nothing_is_evaluated_and_refused_for_an_update(model: str) -> None:
    """Of no samples, and of none that has a target, which a model that counts them finds by itself."""
    case = pipes.Case(model=model)
    engine = pipes.engine_of(case)
    batch = pipes.batch_of(case, 0)
    empty = {name: field[:0] for name, field in batch.items()}
    without = {
        name: torch.full_like(field, -100) if name == "labels" else field for name, field in batch.items()
    }
    for nothing in (None, empty, *([without] if "labels" in batch else [])):
        found = engine.eval_step(nothing)
        assert math.isnan(found.loss)
        assert found.weight == 0
        with pytest.raises(ModelError, match="global weight of this update is 0"):
            engine.train_step(nothing)
    assert math.isfinite(engine.train_step(batch))
    engine.close()


class Dawdling(nn.Linear):
    """Takes its time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return super().forward(x)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("on_meta", [False, True])
def test_stages_are_cut_by_what_rank_0_has_measured_and_learn_the_same(on_meta: bool) -> None:
    def trained(layout: dict[str, Any], is_slow: bool) -> tuple[sixfold.Engine, dict[str, torch.Tensor]]:
        torch.manual_seed(3 + torch.distributed.get_rank())
        first = Dawdling if is_slow else nn.Linear
        with torch.device("meta" if on_meta else "cpu"):
            model = nn.Sequential(first(4, 4), nn.Tanh(), *(nn.Linear(4, 4) for _ in range(4))).double()
        batch = torch.arange(16, dtype=torch.float64).view(4, 4).sin()
        engine = sixfold.initialize(
            model,
            config={"layout": layout, "batch": {"micro": 2}, "optimizer": {"lr": 0.1}},
            loss_fn=lambda output, given: output.square().mean(),
            example=batch,
        )
        for _ in range(2):
            engine.train_step(batch)
        return engine, engine.full_state_dict()

    torch.manual_seed(3)
    engine, cut = trained({"pipe": 2, "cost": "measured"}, is_slow=True)
    other, whole = trained({"data": 2}, is_slow=False)
    assert engine.plan.stages is not None
    assert [len(blocks) for blocks in engine.plan.stages.blocks] == [1, 5]
    assert engine.plan.stages.costs[0] > 0.5
    assert all(torch.allclose(cut[name], whole[name], rtol=0, atol=1e-10) for name in whole)
    engine.close()
    other.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize(("schedule", "zero"), [("1f1b", 0), ("breadth-first", 3), ("zero-bubble-v", 1)])
def test_a_recorded_update_is_an_update_that_can_be_simulated(schedule: str, zero: int) -> None:
    case = pipes.Case(schedule=schedule, zero=zero)
    engine, same = pipes.engine_of(case), pipes.engine_of(case)
    timeline = engine.timed_step(pipes.batch_of(case, 0)).aligned()
    assert engine.last is not None
    assert engine.last.loss == same.train_step(pipes.batch_of(case, 0))
    assert timeline.num_ranks == 2
    assert simulated_again(timeline).makespan > 0
    for rank in range(2):
        starts = [each.start for each in timeline.passes(rank)]
        assert starts == sorted(starts)
        assert 0 < timeline.busy(rank) <= timeline.makespan
    engine.close()
    same.close()


@pytest.mark.ranks(2)
def test_over_the_network_an_activation_is_let_go_with_its_gradient() -> None:
    engine = pipes.engine_of(pipes.Case(), transport="network")
    transfers, kind = Transfers(engine.mesh, lambda stage: stage), ("any",)
    if engine.mesh.pipe_rank == 0:
        sent = torch.ones(3, requires_grad=True)
        transfers.send_activation(0, 0, kind, sent)
        (gradient,) = transfers.take_gradient(0, 0, transfers.receive_gradient(0, [sent]))
        assert torch.equal(gradient, torch.full((3,), 2.0))
        assert transfers.num_held == 0
    else:
        taken = transfers.take_activation(1, transfers.receive_activation(1, kind))
        (2 * taken.value).sum().backward()
        transfers.send_gradient(1, 0, taken.gradients())
    transfers.finish()
    engine.close()


class Peeping(nn.Linear):
    """Hands on as many rows as the numbers say."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[: 1 + int(x[0, 0] > 0)]


@pytest.mark.ranks(2)
def test_a_shape_that_depends_on_numbers_is_refused() -> None:
    model = nn.Sequential(Peeping(2, 2), nn.Linear(2, 2))
    engine = sixfold.initialize(
        model,
        config={"layout": {"pipe": 2}, "batch": {"micro": 2}},
        loss_fn=lambda output, batch: output.mean(),
    )
    engine.train_step(torch.ones(2, 2))
    if engine.mesh.pipe_rank == 0:
        with pytest.raises(ModelError, match="whose like gave"):
            engine.train_step(-torch.ones(2, 2))
    else:  # no more than what comes before transfers: nothing would come
        compare(-torch.ones(2, 2), engine.mesh)
