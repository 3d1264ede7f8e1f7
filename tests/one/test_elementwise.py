"""Which optimizers may work on slices: found out by trying, and the trial leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import sixfold
from sixfold.base.errors import ConfigError, StateError
from sixfold.state import state_bytes_per_weight
from sixfold.state.elementwise import ELEMENTWISE, elementwise_groups
from tests.one import optimizers


def made(kind: type[Optimizer], **settings: Any) -> Optimizer:
    parameters = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2, 2))]
    return kind(parameters, **settings)


def tried(optimizer: Optimizer) -> bool:
    """The verdict of the trial, for listed classes too."""
    kind = type(optimizer)
    optimizer.__class__ = type(kind.__name__, (kind,), {})
    (found,) = elementwise_groups(optimizer)
    return found


@pytest.mark.parametrize("kind", ELEMENTWISE, ids=lambda kind: kind.__name__)
def test_the_trial_finds_what_is_listed(kind: type[Optimizer]) -> None:
    assert tried(made(kind, **({"momentum": 0.9, "weight_decay": 0.1} if kind is torch.optim.SGD else {})))


@pytest.mark.parametrize("kind", [optimizers.Lion, optimizers.Hoarding], ids=lambda kind: kind.__name__)
def test_unknown_elementwise_optimizers_are_accepted(kind: type[Optimizer]) -> None:
    assert elementwise_groups(made(kind)) == [True]


@pytest.mark.parametrize(
    "kind",
    [
        *(torch.optim.Muon, torch.optim.Adafactor, optimizers.Decaying, optimizers.Normalised),
        *(optimizers.Late, optimizers.Distant, optimizers.Noisy, optimizers.Factored),
    ],
    ids=lambda kind: kind.__name__,
)
def test_what_looks_at_whole_tensors_gives_itself_away(kind: type[Optimizer]) -> None:
    assert elementwise_groups(made(kind)) == [False]


def test_a_rate_of_zero_hides_nothing() -> None:
    assert elementwise_groups(made(optimizers.Normalised, lr=0.0)) == [False]


def test_a_group_is_judged_by_its_own_settings() -> None:
    class Two(optimizers.Own):
        def direction(self, parameter: Any, grad: Any, state: Any, group: Any) -> Any:
            return grad / grad.norm() if group["whole"] else grad

    one, other = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = Two([{"params": [one], "whole": True}, {"params": [other], "whole": False}])
    assert elementwise_groups(optimizer) == [False, True]


@pytest.mark.parametrize("word", [True, False])
def test_the_users_word_is_taken(word: bool) -> None:
    optimizer = made(optimizers.Lion)
    optimizer.elementwise = word  # type: ignore[attr-defined]
    assert elementwise_groups(optimizer) == [word]


def test_the_trial_leaves_no_trace() -> None:
    optimizer = made(optimizers.Hoarding, lr=0.3)
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)  # wraps the object's own `step`
    torch.manual_seed(0)
    drawn = torch.rand(1)
    before = [parameter.clone() for parameter in optimizer.param_groups[0]["params"]]
    torch.manual_seed(0)
    assert elementwise_groups(optimizer) == [True]
    assert torch.equal(torch.rand(1), drawn)
    assert not calls
    assert not optimizer.state
    assert optimizer.num_steps == [0]  # type: ignore[attr-defined]
    assert schedule.get_last_lr() == [optimizer.param_groups[0]["lr"]]
    for parameter, old in zip(optimizer.param_groups[0]["params"], before, strict=True):
        assert torch.equal(parameter, old)
        assert parameter.grad is None


@pytest.mark.parametrize("kind", [torch.optim.SparseAdam, torch.optim.LBFGS], ids=lambda kind: kind.__name__)
def test_optimizers_that_cannot_be_driven_are_refused(kind: type[Optimizer]) -> None:
    with pytest.raises(ConfigError, match=kind.__name__) as caught:
        sixfold.initialize(nn.Linear(2, 2), optimizer=kind)  # type: ignore[arg-type]
    assert "use" in caught.value.fix


def test_a_parameter_has_one_optimizer() -> None:
    model = nn.Linear(2, 2)
    both = [torch.optim.SGD(model.parameters(), lr=1.0), torch.optim.SGD([model.weight], lr=1.0)]
    with pytest.raises(StateError, match=r"has 1 twice \(weight\)"):
        sixfold.initialize(model, optimizer=both)
    with pytest.raises(StateError, match=r"misses 1 of its trainable ones \(weight\)"):
        sixfold.initialize(model, optimizer=[torch.optim.SGD([model.bias], lr=1.0)])


@pytest.mark.parametrize("shapes", [((), (3, 4)), ((3, 4), ())])
def test_what_an_optimizer_keeps_does_not_depend_on_the_order_of_its_parameters(
    shapes: tuple[tuple[int, ...], ...],
) -> None:
    """One without dimensions among them, of which a count of steps has the shape."""
    optimizer = torch.optim.Adagrad([nn.Parameter(torch.ones(shape)) for shape in shapes])
    assert tried(optimizer)
    assert state_bytes_per_weight([optimizer], [torch.float32]) == [4]
