"""The loss is divided once, by the weight of the whole global batch, however that is cut."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sixfold
from sixfold.base.errors import ModelError
from sixfold.engine import Engine
from tests.ranks import plain
from tests.ranks.plain import Batch

NUM_PARTITIONS = 10
BOUND = 1e-12


class Tagger(nn.Module):
    """Scores per token; its loss leaves out labels of -100 and comes as a pair, a mean, or both alike."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.embed = nn.Embedding(plain.VOCABULARY, 6)
        self.head = nn.Linear(6, 6)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        scores = self.head(torch.tanh(self.embed(input_ids))).flatten(0, 1)
        total = F.cross_entropy(scores, labels.flatten(), reduction="sum")
        count = (labels != -100).sum()
        return (total, count) if self.form == "pair" else {"loss": total / count}


def tagger(form: str) -> nn.Module:
    torch.manual_seed(3)
    return Tagger(form).double()


def ragged_batch() -> Batch:
    batch = plain.TASKS["llama"].batch(0)
    return {"input_ids": batch["input_ids"], "labels": batch["labels"]}


def even_batch() -> Batch:
    tokens = plain.TASKS["decoder"].batch(0)["tokens"]
    return {"input_ids": tokens, "labels": tokens}


def partition(number: int, ranks: int) -> tuple[list[range], int]:
    """A random cut into shares, some of them empty, and a size of micro-batches."""
    draw = random.Random(number)
    borders = sorted(draw.choices(range(plain.NUM_SAMPLES + 1), k=ranks - 1))
    starts, stops = [0, *borders], [*borders, plain.NUM_SAMPLES]
    return [range(*ends) for ends in zip(starts, stops, strict=True)], draw.randint(1, plain.NUM_SAMPLES)


def whole_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def check_gradients(engine: Engine, expected: dict[str, Tensor]) -> None:
    # After `step` a parameter's gradient is that of the mean over the global batch.
    for name, parameter in engine.module.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad - expected[name]).abs().max() < BOUND, name


def check_partitions(
    build: Callable[[], nn.Module],
    batch: Batch,
    loss_of_whole: Callable[[nn.Module], Tensor],
    update: Callable[[Engine, Batch, int], float],
    num_ranks: int,
    loss_bound: float = BOUND,
) -> None:
    reference = build()
    loss = loss_of_whole(reference)
    expected = whole_gradients(reference, loss)
    for number in range(NUM_PARTITIONS):
        shares, micro = partition(number, num_ranks)
        config = {"batch": {"micro": micro}, "optimizer": {"name": "sgd", "lr": 1e-3}}
        engine = sixfold.initialize(build(), config=config)
        found = update(engine, plain.rows(batch, shares[engine.data_rank]), micro)
        assert found == pytest.approx(loss.item(), rel=loss_bound, abs=0)
        check_gradients(engine, expected)
        engine.close()


def by_train_step(engine: Engine, share: Batch, micro: int) -> float:
    return engine.train_step(share)


def micro_batches(share: Batch, micro: int) -> list[Batch]:
    size = len(share["input_ids"])
    return [plain.rows(share, range(start, min(start + micro, size))) for start in range(0, size, micro)]


def by_hand(engine: Engine, share: Batch, micro: int) -> float:
    for part in micro_batches(share, micro):
        loss = engine(**part)["loss"]
        engine.backward(loss, weight=int((part["labels"] != -100).sum()))
    return engine.step().loss


def by_hand_unweighted(engine: Engine, share: Batch, micro: int) -> float:
    for part in micro_batches(share, micro):
        engine.backward(engine(**part)["loss"])
    return engine.step().loss


def mean_of(form: str, batch: Batch) -> Callable[[nn.Module], Tensor]:
    def loss(model: nn.Module) -> Tensor:
        output = model(**batch)
        return output[0] / output[1] if form == "pair" else output["loss"]  # type: ignore[no-any-return]

    return loss


@pytest.mark.ranks(1, 3)
def test_any_partition_gives_the_gradient_of_one_batch(num_ranks: int) -> None:
    ragged, even = ragged_batch(), even_batch()
    check_partitions(lambda: tagger("pair"), ragged, mean_of("pair", ragged), by_train_step, num_ranks)
    check_partitions(lambda: tagger("mean"), ragged, mean_of("mean", ragged), by_hand, num_ranks)
    check_partitions(lambda: tagger("mean"), even, mean_of("mean", even), by_train_step, num_ranks)
    check_partitions(lambda: tagger("mean"), even, mean_of("mean", even), by_hand_unweighted, num_ranks)


@pytest.mark.ranks(1, 3)
def test_counting_models_get_the_global_count(num_ranks: int) -> None:
    for task in (plain.TASKS["llama"], plain.TASKS["gpt2"]):
        batch = task.batch(0)
        check_partitions(
            lambda task=task: task.build().double(),
            batch,
            lambda model, task=task, batch=batch: task.loss(model, batch),
            by_train_step,
            num_ranks,
            loss_bound=1e-6,  # the model sums its loss in fp32
        )
        # And that count is the right one: the mean over the shifted labels, as the model itself takes it.
        model = task.build().double()
        assert task.loss(model, batch).item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)


class Ignores(nn.Module):
    """Takes `num_items_in_batch` and does not divide by it, as some models do."""

    def __init__(self, ignores: bool) -> None:
        super().__init__()
        self.inner, self.ignores = Tagger("pair"), ignores

    def forward(self, input_ids: Tensor, labels: Tensor, num_items_in_batch: float | None = None) -> Any:
        total, count = self.inner(input_ids, labels)
        return {"loss": total / (count if self.ignores or num_items_in_batch is None else num_items_in_batch)}


@pytest.mark.ranks(1, 3)
def test_the_count_is_given_only_to_models_that_honour_it(num_ranks: int) -> None:
    """Without a shift of labels too: the count is that of the labels the model itself counts."""

    def build(ignores: bool) -> nn.Module:
        torch.manual_seed(3)
        return Ignores(ignores).double()

    ragged = ragged_batch()
    check_partitions(lambda: build(False), ragged, mean_of("mean", ragged), by_train_step, num_ranks)
    engine = sixfold.initialize(build(True), config={})
    with pytest.raises(ModelError, match="unequally many per sample"):
        engine.train_step(plain.rows(ragged, range(engine.data_rank * 2, engine.data_rank * 2 + 2)))


@pytest.mark.ranks(1, 3)
def test_ragged_means_are_refused_on_every_rank_with_the_ways_out(num_ranks: int) -> None:
    ragged = ragged_batch()
    shares = [range(5), range(5, 12), range(12, 12)]  # one rank sees no sample, and is told all the same
    engine = sixfold.initialize(tagger("mean"), config={"batch": {"micro": 2}})
    share = plain.rows(ragged, shares[engine.data_rank])
    before = {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
    for attempt in (engine.train_step, engine.eval_step, lambda part: by_hand_unweighted(engine, part, 2)):
        with pytest.raises(ModelError) as caught:
            attempt(share)
        assert "(sum, weight)" in caught.value.fix
        assert "engine.backward(loss, weight=...)" in caught.value.fix
    for name, tensor in engine.module.state_dict().items():
        assert torch.equal(tensor, before[name])
    by_hand(engine, share, 3)  # the refused updates left nothing behind
    assert engine.num_steps == 1


@pytest.mark.ranks(1, 2)
def test_no_weight_anywhere_is_refused_and_the_engine_goes_on() -> None:
    ragged = ragged_batch()
    blank = {**ragged, "labels": torch.full_like(ragged["labels"], -100)}
    for build in (lambda: tagger("pair"), lambda: plain.TASKS["llama"].build().double()):
        engine = sixfold.initialize(build(), config={"batch": {"micro": 5}})
        for batch in (blank, None, plain.rows(ragged, range(0))):
            with pytest.raises(ModelError, match="global weight of this update is 0"):
                engine.train_step(batch)
        with pytest.raises(ModelError, match="global weight of this update is 0"):
            engine.step()
        assert engine.num_steps == 0
        reference = build()
        loss = mean_of("pair" if isinstance(reference, Tagger) else "mean", ragged)(reference)
        expected = whole_gradients(reference, loss)
        engine.train_step(ragged if engine.data_rank == 0 else None)
        for name, parameter in engine.module.named_parameters():
            assert parameter.grad is not None
            assert torch.allclose(parameter.grad, expected[name], rtol=1e-5, atol=1e-7), name


@pytest.mark.ranks(2)
def test_eval_step_gives_the_same_mean_and_weight(num_ranks: int) -> None:
    ragged = ragged_batch()
    whole = mean_of("pair", ragged)(tagger("pair")).item()
    for number in range(NUM_PARTITIONS):
        shares, micro = partition(number, num_ranks)
        engine = sixfold.initialize(tagger("pair"), config={"batch": {"micro": micro}})
        result = engine.eval_step(plain.rows(ragged, shares[engine.data_rank]))
        assert result.loss == pytest.approx(whole, rel=BOUND, abs=0)
        assert result.weight == float((ragged["labels"] != -100).sum())
        assert result.grad_norm is None
