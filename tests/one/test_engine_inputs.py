"""What the engine takes in one process: batches of any structure, and losses of any form."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import sixfold
from sixfold.base.errors import ModelError
from sixfold.pipeline import fields_of, num_samples, split, to_device


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


X = torch.arange(10.0).view(5, 2)
BATCHES: list[Any] = [
    X,
    {"x": X},
    (X, X),
    [X, 3, "text"],
    Pair(X, X[:, 0]),
    {"inputs": {"x": X, "scale": torch.tensor(2.0)}, "labels": [X, X]},
]


def leaves(batch: Any) -> list[Any]:
    if isinstance(batch, dict):
        return [leaf for value in batch.values() for leaf in leaves(value)]
    if isinstance(batch, tuple | list):
        return [leaf for value in batch for leaf in leaves(value)]
    return [batch]


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: type(batch).__name__)
def test_batches_of_any_structure_are_cut_and_cast(batch: Any) -> None:
    assert num_samples(batch) == 5
    parts = split(batch, 2)
    assert [num_samples(part) for part in parts] == [2, 2, 1]
    for part in parts:
        assert type(part) is type(batch)
    for place, whole in enumerate(leaves(batch)):
        cut = [leaves(part)[place] for part in parts]
        if isinstance(whole, Tensor) and whole.dim():
            assert torch.equal(torch.cat(cut), whole)
            assert cut[0].data_ptr() == whole.data_ptr()  # a view
        else:
            assert all(each is whole for each in cut)
    assert split(batch, None) == [batch]
    cast = [leaf for leaf in leaves(to_device(batch, X.device, torch.bfloat16)) if isinstance(leaf, Tensor)]
    assert {leaf.dtype for leaf in cast} == {torch.bfloat16}


@pytest.mark.parametrize("batch", [None, (), {}, X[:0], {"x": X[:0]}, {"a": {"b": X[:0]}}])
def test_empty_batches_have_no_micro_batch(batch: Any) -> None:
    assert num_samples(batch) == 0
    assert split(batch, 2) == []


def test_fields_of_different_length_cannot_be_cut() -> None:
    with pytest.raises(ModelError, match="3, 5 entries"):
        split({"x": X, "y": {"z": X[:3]}}, 2)
    assert len(split({"x": X, "y": X[:3]}, None)) == 1


def test_fields_go_where_the_forward_wants_them() -> None:
    def two(x: Any, y: Any = None) -> None: ...

    def many(*fields: Any, **named: Any) -> None: ...

    assert fields_of({"x": 1, "z": 2}, two, all_of_them=False) == ((), {"x": 1})
    assert fields_of({"x": 1, "z": 2}, two, all_of_them=True) == ((), {"x": 1, "z": 2})
    assert fields_of({"x": 1, "z": 2}, many, all_of_them=False) == ((), {"x": 1, "z": 2})
    assert fields_of((1, 2, 3), two, all_of_them=False) == ((1, 2), {})
    assert fields_of((1, 2, 3), many, all_of_them=False) == ((1, 2, 3), {})
    assert fields_of(X, two, all_of_them=True) == ((X,), {})


def test_written_out_forward_counts_samples_however_they_are_passed() -> None:
    class Model(nn.Linear):
        def forward(self, x: Tensor, *, power: float = 1.0) -> Tensor:
            return super().forward(x).pow(power).mean()

    for args, kwargs in (((X,), {"power": 2.0}), ((), {"x": X, "power": 2.0}), ((X,), {})):
        engine = sixfold.initialize(Model(2, 1), config={})
        engine.backward(engine(*args, **kwargs))
        assert engine.step().weight == 5
        assert engine.num_samples == 5


def test_backward_starts_from_one_number() -> None:
    engine = sixfold.initialize(nn.Linear(2, 1), config={})
    with pytest.raises(ModelError, match=r"loss\.mean"):
        engine.backward(engine(X))


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (torch.ones(3), "a tensor of shape"),
        ((torch.ones(()), 1, 2), "a tuple of 3"),
        ((torch.ones(2), 2), "a tuple of 2"),
        ({"logits": 1}, "dict"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_loss_is_named(output: Any, said: str) -> None:
    engine = sixfold.initialize(nn.Linear(2, 1), config={}, loss_fn=lambda scores, batch: output)
    with pytest.raises(ModelError, match=said):
        engine.train_step((torch.ones(4, 2),))


def _trained(optimizer: bool, lr: float) -> sixfold.Engine:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    if optimizer:
        made = torch.optim.AdamW(model.parameters(), lr=lr)
        return sixfold.initialize(model, optimizer=made, loss_fn=lambda output, batch: output.square().mean())
    config = {"optimizer": {"lr": lr}}
    return sixfold.initialize(model, config=config, loss_fn=lambda output, batch: output.square().mean())


def test_settings_of_a_handed_over_optimizer_come_back_with_a_checkpoint(tmp_path: Path) -> None:
    first = _trained(optimizer=True, lr=1e-2)
    first.optimizer.param_groups[0]["lr"] = 2e-3  # by the user's own scheduler, say
    first.train_step(torch.ones(3, 4))
    first.save(tmp_path / "saved")
    second = _trained(optimizer=True, lr=5e-2)
    second.load(tmp_path / "saved")
    assert second.optimizer.param_groups[0]["lr"] == 2e-3
    assert second.bound.base_lrs == [1e-2]


def test_settings_of_a_configured_optimizer_are_the_configurations(tmp_path: Path) -> None:
    first = _trained(optimizer=False, lr=1e-2)
    first.train_step(torch.ones(3, 4))
    first.save(tmp_path / "saved")
    second = _trained(optimizer=False, lr=5e-2)
    second.load(tmp_path / "saved")
    assert second.optimizer.param_groups[0]["lr"] == 5e-2


def test_settings_that_only_the_train_command_reads_are_told(caplog: pytest.LogCaptureFixture) -> None:
    config = {"model.width": 64, "train.steps": 5, "optimizer.lr": 0.1}
    sixfold.initialize(nn.Linear(4, 2), config=config)
    assert "model.width" in caplog.text
    assert "train.steps" not in caplog.text
    assert "optimizer.lr" not in caplog.text
