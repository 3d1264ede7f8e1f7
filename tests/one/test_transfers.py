"""What stages hand to each other: types, what may be changed in place, and what is kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sixfold.pipeline.transfers import form_of, received


def test_a_stage_may_change_in_place_what_it_was_given() -> None:
    given = received(*form_of(torch.tensor([-1.0, 2.0], requires_grad=True) + 1))
    F.relu(given.value.sub_(1), inplace=True).square().sum().backward()
    (gradient,) = given.gradients()
    assert torch.equal(gradient, torch.tensor([0.0, 4.0]))
