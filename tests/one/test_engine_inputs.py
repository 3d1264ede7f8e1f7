"""What the engine takes in one process: batches of any structure, and losses of any form."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import sixfold
from sixfold.base.errors import CheckpointError, ConfigError, ModelError, PlanError, StateError
from sixfold.pipeline import fields_of, num_samples, split, to_device
from sixfold.state.edits import SEARCHED_UPDATES
from sixfold.state.unit import Unit
from tests.ranks import plain


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
    # What comes after the inputs is the target, not an optional argument.
    assert fields_of((1, 2, 3), two, all_of_them=False) == ((1,), {})
    assert fields_of((1, 2, 3), lambda a, b, c=0: None, all_of_them=False) == ((1, 2), {})
    assert fields_of((1, 2, 3), many, all_of_them=False) == ((1,), {})
    assert fields_of((1, 2, 3), two, all_of_them=True) == ((1, 2, 3), {})
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


def _mean_square(output: Tensor, batch: Any) -> Tensor:
    return output.square().mean()


def _ignoring(output: Tensor, batch: Any) -> Tensor:
    labels = batch["labels"] if isinstance(batch, dict) else batch[1]
    return nn.functional.cross_entropy(output, labels)


def test_texts_are_cut_with_their_samples() -> None:
    parts = split((X, ["a", "b", "c", "d", "e"], "all"), 2)
    assert [part[1] for part in parts] == [["a", "b"], ["c", "d"], ["e"]]
    assert all(part[2] == "all" for part in parts)


@pytest.mark.parametrize(
    "batch",
    [
        (torch.randn(4, 3), torch.tensor([0, -100, 2, 1])),
        {"input": torch.randn(4, 3), "labels": torch.tensor([0, -100, 2, 1])},
    ],
)
def test_left_out_labels_are_seen_wherever_they_are(batch: Any) -> None:
    engine = sixfold.initialize(nn.Linear(3, 3), config={}, loss_fn=_ignoring)
    before = engine.full_state_dict()
    with pytest.raises(ModelError, match="unequally"):
        engine.train_step(batch)
    assert torch.equal(engine.full_state_dict()["weight"], before["weight"])


def test_a_mean_over_an_unclear_number_of_samples_is_refused() -> None:
    bags = (torch.arange(10) % 5, torch.tensor([0, 2, 5, 7]))
    model = nn.EmbeddingBag(5, 3)
    with pytest.raises(ModelError, match=r"\(sum, weight\)"):
        sixfold.initialize(model, config={}, loss_fn=lambda output, batch: output.mean()).train_step(
            {"input": bags[0], "offsets": bags[1]}
        )
    paired = sixfold.initialize(model, config={}, loss_fn=lambda output, batch: (output.sum(), 4))
    paired.train_step({"input": bags[0], "offsets": bags[1]})
    assert paired.num_samples == 4


@pytest.mark.parametrize("weight", [-1, float("nan"), torch.ones(2), "three"])
def test_weights_are_finite_numbers(weight: Any) -> None:
    engine = sixfold.initialize(nn.Linear(2, 1), config={}, loss_fn=lambda out, batch: (out.sum(), weight))
    with pytest.raises(ModelError, match="weight"):
        engine.train_step(X)
    with pytest.raises(ModelError, match="weight"):
        engine.backward(engine(X).mean(), weight=weight)


def test_a_layer_put_in_later_is_noticed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    engine = sixfold.initialize(model, config={}, loss_fn=_mean_square)
    engine.train_step(X)
    model[0] = nn.Linear(2, 2)
    with pytest.raises(StateError, match=r"0\.weight"):
        engine.train_step(X)


def test_the_optimizer_is_stepped_by_the_engine_alone() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = sixfold.initialize(model, optimizer=optimizer, loss_fn=_mean_square)
    engine.train_step(X)
    with pytest.raises(StateError, match=r"engine\.step"):
        optimizer.step()
    plain = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(StateError, match=r"groups of \[2\] tensor\(s\); here are \[1\]") as caught:
        optimizer.load_state_dict(plain.state_dict())
    assert "engine.load" in caught.value.fix
    params = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["params"] = [model.weight]
    with pytest.raises(StateError, match=r"1 tensor\(s\) were added to it, 1 taken out"):
        engine.train_step(X)
    optimizer.param_groups[0]["params"] = params
    engine.train_step(X)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(StateError, match=r"1 tensor\(s\) were added to it, 0 taken out"):
        engine.train_step(X)


@pytest.mark.parametrize("added", [0, 1])
def test_a_group_that_came_later_is_told_before_its_rate(added: int) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {"lr_schedule": {"warmup_steps": 4}}
    engine = sixfold.initialize(model, config=config, optimizer=optimizer, loss_fn=_mean_square)
    engine.train_step(X)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))] * added})
    with pytest.raises(
        StateError, match=rf"{added} tensor\(s\) were added to it, 0 taken out; it has 2 group\(s\) of 1"
    ):
        engine.train_step(X)
    del optimizer.param_groups[1]
    engine.train_step(X)


class _Sharing(torch.optim.Optimizer):
    """Wraps another optimizer and has its state and its groups."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base.param_groups, base.defaults)
        self.base = base
        self.param_groups, self.state = base.param_groups, base.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.step()


class _Showing(torch.optim.SGD):
    """Has a property where torch has an attribute."""

    @property
    def state(self) -> Any:
        return self.__dict__.setdefault("own", defaultdict(dict))

    @state.setter
    def state(self, value: Any) -> None:
        if "own" in self.__dict__:
            raise AttributeError("read-only")


class _Copying(_Showing):
    @_Showing.state.setter
    def state(self, value: Any) -> None:
        self.__dict__["own"] = defaultdict(dict, value)


@pytest.mark.parametrize("kind", [_Showing, _Copying])
def test_an_optimizer_whose_state_cannot_be_set_is_refused(kind: type[torch.optim.SGD]) -> None:
    model = nn.Linear(2, 1)
    optimizer = kind(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(StateError, match=rf"the state of {kind.__name__} is not what it was set to"):
        sixfold.initialize(model, optimizer=optimizer, loss_fn=_mean_square)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad])
def test_state_that_a_wrapper_shares_is_refused_before_it_is_missed(
    kind: type[torch.optim.Optimizer], tmp_path: Path
) -> None:
    """Adagrad makes its own in its constructor, and fails where it finds none."""
    model = nn.Linear(2, 1)
    optimizer = _Sharing(kind(model.parameters(), lr=0.1))  # type: ignore[call-arg]
    engine = sixfold.initialize(model, optimizer=optimizer, loss_fn=_mean_square)
    match = "the state of _Sharing was written into the dictionary it had before initialize"
    with pytest.raises(StateError, match=match):
        engine.train_step(X)
    with pytest.raises(StateError, match=match):
        engine.save(tmp_path / "saved")


class _Counting(torch.optim.SGD):
    """Counts on a default of its own."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.state = defaultdict(lambda: {"seen": torch.zeros(())})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for tensor in group["params"]:
                self.state[tensor]["seen"] += 1
        super().step()


def test_a_default_of_its_own_is_kept() -> None:
    model = nn.Linear(2, 1)
    engine = sixfold.initialize(model, optimizer=_Counting(model.parameters()), loss_fn=_mean_square)
    for _ in range(2):
        engine.train_step(X)
    assert [float(state["seen"]) for state in engine.optimizer.state.values()] == [2.0] * len(
        engine.optimizer.state
    )


class _WithoutRate(torch.optim.Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})


@pytest.mark.parametrize(
    ("model", "optimizer", "error"),
    [
        (nn.Linear(2, 1).requires_grad_(False), None, ModelError),
        (nn.ReLU(), None, ModelError),
        (nn.Linear(2, 1), lambda parameters: None, ConfigError),
        (nn.Linear(2, 1), _WithoutRate, ConfigError),
    ],
)
def test_what_cannot_train_is_refused(model: nn.Module, optimizer: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        sixfold.initialize(model, optimizer=optimizer, loss_fn=_mean_square)


@pytest.mark.parametrize("edit", ["counted", "uncounted"])
def test_edits_at_any_time_hold_under_a_narrow_compute_type(edit: str, tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    config = {"precision": {"compute": "bf16"}, "optimizer": {"lr": 1e-6, "ema_decay": 0.5}}
    engine = sixfold.initialize(model, config=config, loss_fn=_mean_square)

    def write(value: float) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                (parameter if edit == "counted" else parameter.data).fill_(value)

    def weights() -> list[float]:
        return [round(value, 3) for value in engine.full_state_dict()["weight"].flatten().tolist()]

    write(1.0)
    engine.train_step(X)
    assert weights() == [1, 1]
    engine.backward(engine(X).mean())
    write(2.0)
    engine.step()
    assert weights() == [2, 2]
    write(3.0)
    assert weights() == [3, 3]
    write(4.0)
    engine.save(tmp_path)
    write(5.0)
    with engine.ema():
        pass
    assert weights() == [5, 5]
    write(6.0)
    with pytest.raises(RuntimeError, match="mine"), engine.gathered():
        raise RuntimeError("mine")
    assert weights() == [6, 6]
    engine.load(tmp_path)
    assert weights() == [4, 4]
    for number in range(2 * SEARCHED_UPDATES):  # having seen such edits, every update looks for them
        write(number)
        engine.train_step(X)
        assert weights() == [number, number]


def test_a_weight_that_is_no_number_is_no_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 1)
    model.idle = nn.Parameter(torch.full((3,), torch.nan))
    engine = sixfold.initialize(model, config={"precision": {"compute": "bf16"}}, loss_fn=_mean_square)
    own, searches = Unit.absorb_edits, list[Unit]()
    monkeypatch.setattr(Unit, "absorb_edits", lambda unit: searches.append(unit) or own(unit))
    for _ in range(2 * SEARCHED_UPDATES):
        engine.train_step(X)
    assert len(searches) == SEARCHED_UPDATES
    assert engine.full_state_dict()["idle"].isnan().all()


@pytest.mark.parametrize("compute", ["bf16", "fp32"])
def test_an_edit_that_fails_is_undone(compute: str) -> None:
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    engine = sixfold.initialize(model, config={"precision": {"compute": compute}}, loss_fn=_mean_square)
    before, bias = model.weight.clone(), model.bias.clone()
    state = engine.full_state_dict()

    def edit() -> None:
        with engine.gathered() as whole:
            whole.weight.fill_(7.0)
            whole.bias.fill_(7.0)
            engine.full_state_dict()
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="middle"):
        edit()
    assert torch.equal(model.weight, before)
    assert torch.equal(model.bias, bias)
    assert torch.equal(engine.full_state_dict()["weight"], state["weight"])


@pytest.mark.parametrize("zero", [0, 3])
def test_what_is_lent_is_neither_trained_nor_saved_meanwhile(zero: int, tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    engine = sixfold.initialize(model, config={"layout": {"zero": zero}}, loss_fn=_mean_square)
    engine.save(tmp_path / "saved")
    asked: list[Any] = [model.weight, torch.ones(1)]
    refusing: tuple[Callable[[], object], ...] = (
        lambda: engine.train_step(X),
        lambda: engine.backward(engine(X).mean()),
        engine.step,
        lambda: engine.load(tmp_path / "saved"),
        lambda: engine.save(tmp_path / "saved"),
        lambda: engine.gathered().__enter__(),
    )
    with engine.gathered():
        for call in refusing:
            with pytest.raises(StateError, match=r"inside `with engine\.gathered"):
                call()
        engine.eval_step(X)
    with pytest.raises(StateError, match=r"1 of 2 tensor\(s\) to be gathered are not parameters"):
        engine.gathered(asked).__enter__()
    before = engine.full_state_dict()
    with pytest.raises(StateError, match="weight no longer lies in its unit"), engine.gathered():
        model.weight.data = torch.zeros(1, 2)
    assert torch.equal(engine.full_state_dict()["weight"], before["weight"])
    engine.train_step(X)


class _Blocks(nn.Module):
    """What lies outside of blocks is one unit, each block another."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 200), nn.Linear(200, 2)) for _ in range(3))
        self.out = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.out(x)
        return out


@pytest.mark.parametrize("loop", ["train_step", "step"])
def test_edits_that_are_refused_are_undone_all_at_once_and_change_no_update(loop: str) -> None:
    with plain.small_units():
        model = _Blocks()
        engine = sixfold.initialize(
            model, config={"layout": {"zero": 3}, "optimizer": {"name": "sgd"}}, loss_fn=_mean_square
        )
    x = torch.ones(3, 2)
    engine.train_step(x)
    names = [slot.name for unit in engine.plan.units for slot in unit.slots]
    first = min("out.weight", "blocks.2.1.weight", key=names.index)
    before = engine.full_state_dict()
    if loop == "step":
        engine.backward(_mean_square(engine(x), x))
    engine(x)  # leaves what lies outside and the last block whole for its backward
    with torch.no_grad():
        model.out.weight.fill_(7.0)
        if loop == "step":  # nothing runs before all are looked at
            model.blocks[2][1].weight.fill_(7.0)  # type: ignore[index]
    edited = "weight" if loop == "train_step" else first
    with pytest.raises(StateError, match=f"{edited} changed in place during a forward or backward"):
        engine.step() if loop == "step" else engine.train_step(x)
    after = engine.full_state_dict()
    assert all(torch.equal(after[name], each) for name, each in before.items())
    assert engine.num_steps == 1
    engine.train_step(x)
    assert engine.num_steps == 2


def test_state_of_another_optimizer_is_refused_before_anything_changes(tmp_path: Path) -> None:
    first = _trained(optimizer=True, lr=1e-2)
    first.train_step(torch.ones(3, 4))
    first.save(tmp_path / "saved")
    model = nn.Linear(4, 2)
    other = sixfold.initialize(
        model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), loss_fn=_mean_square
    )
    before = model.weight.clone()
    with pytest.raises(CheckpointError, match="AdamW"):
        other.load(tmp_path / "saved")
    assert torch.equal(model.weight, before)


def _lazy() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.LazyLinear(2)


@pytest.mark.parametrize(
    ("model", "config", "said"),
    [
        (lambda: [nn.Linear(2, 1)], {}, "list"),
        (lambda: nn.DataParallel(nn.Linear(2, 1)), {}, r"model\.module"),
        (_lazy, {}, "one forward"),
        (lambda: nn.ParameterList([torch.ones(2, dtype=torch.complex64)]), {}, "view_as_complex"),
        (lambda: nn.Sequential(nn.BatchNorm1d(2)), {"precision": {"compute": "bf16"}}, "GroupNorm"),
    ],
)
def test_models_that_cannot_be_trained_are_refused(model: Any, config: Any, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        sixfold.initialize(model(), config=config, loss_fn=_mean_square)


def test_a_schedule_without_an_end_is_refused_at_once() -> None:
    config = {"lr_schedule": {"name": "cosine"}, "train": {"minutes": 3}}
    with pytest.raises(PlanError, match=r"train\.steps"):
        sixfold.initialize(nn.Linear(2, 1), config=config)


def test_a_rehearsal_that_fails_puts_buffers_back_too() -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 1)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += len(x)
            if not x.isfinite().all():
                raise ArithmeticError("not finite")
            return super().forward(x).square().mean()

    model = Counting()
    engine = sixfold.initialize(model, config={"batch": {"micro": 2}})
    engine.rehearse(X)
    with pytest.raises(ArithmeticError):
        engine.rehearse(torch.cat([X[:2], X[:2] * float("nan")]))
    assert model.seen == 0
    engine.train_step(X)
    assert model.seen == len(X)


def test_a_closed_engine_refuses_to_train(tmp_path: Path) -> None:
    engine = sixfold.initialize(nn.Linear(2, 1), loss_fn=_mean_square)
    engine.close()
    for use in (lambda: engine.train_step(X), engine.step, lambda: engine.save(tmp_path)):
        with pytest.raises(StateError, match="close"):
            use()


def test_a_module_without_numbers_says_where_they_are() -> None:
    model = nn.Linear(2, 1)
    engine = sixfold.initialize(model, config={"layout": {"zero": 3}}, loss_fn=_mean_square)
    engine(X)
    engine.close()
    with pytest.raises(StateError, match=r"linear after engine\.close") as caught:
        model(X)
    assert "before engine.close" in caught.value.fix
    with pytest.raises(ModelError, match=r"2 parameter\(s\) without numbers, first weight"):
        sixfold.initialize(model, loss_fn=_mean_square)
