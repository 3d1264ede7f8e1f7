"""What stages hand to each other: types, what may be changed in place, and what is kept."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sixfold.base.errors import ModelError
from sixfold.pipeline.loss import Counts
from sixfold.pipeline.passes import Passes
from sixfold.pipeline.step import Step, Work
from sixfold.pipeline.transfers import form_of, received
from sixfold.program import Instruction, Op


def test_a_stage_may_change_in_place_what_it_was_given() -> None:
    given = received(*form_of(torch.tensor([-1.0, 2.0], requires_grad=True) + 1))
    F.relu(given.value.sub_(1), inplace=True).square().sum().backward()
    (gradient,) = given.gradients()
    assert torch.equal(gradient, torch.tensor([0.0, 4.0]))


@pytest.mark.parametrize("learns", [False, True])
def test_an_output_for_the_same_rank_is_kept_for_a_backward_only(learns: bool) -> None:
    near: Any = SimpleNamespace(is_local=lambda stage, other: True)
    unused: Any = None
    passes = Passes(unused, unused, last_stage=1, transfers=near)
    step = Step(Work(lambda stage, micro, received: torch.ones(2)), Counts())
    with torch.set_grad_enabled(learns):
        passes.forward(step, Instruction(Op.FORWARD, 0, 0))
    assert len(step.outputs) == int(learns)
    assert torch.equal(step.inputs[1, 0].value, torch.ones(2))


@pytest.mark.parametrize(
    "value",
    [namedtuple("Pair", "x y")(torch.ones(1), torch.ones(1)), OrderedDict(x=torch.ones(1)), "text"],
)
def test_types_that_would_come_out_as_others_are_refused(value: Any) -> None:
    with pytest.raises(ModelError, match=f"ends with a {type(value).__name__}"):
        form_of(value)
