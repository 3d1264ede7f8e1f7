"""Crossings of an axis: values, gradients, and cross-entropy over a cut vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sixfold.mesh import Group, Scratch
from sixfold.parallel.tensor import crossing
from sixfold.parallel.tensor.crossing import bounds, cross
from sixfold.parallel.tensor.vocabulary import Vocabulary, losses_of


def axis_of(num_ranks: int) -> Group:
    return Group(range(num_ranks), dist.get_rank(), Scratch(torch.device("cpu")), None)


def numbers(place: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(place), dtype=torch.float64)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("length", [6, 7])
def test_what_arrives_and_what_goes_back(length: int, num_ranks: int) -> None:
    """Each operation against what it means, and each way back as the transpose of the way there."""
    axis = axis_of(num_ranks)
    start, stop = bounds(length, num_ranks, axis.place)
    wholes = [numbers(place, 2, length, 3) for place in range(num_ranks)]
    everyone = range(num_ranks)
    parts = [wholes[place][:, slice(*bounds(length, num_ranks, place))] for place in everyone]
    mine = wholes[axis.place]
    total = torch.stack(wholes).sum(0)
    expected = {
        "same": (mine, mine),
        "sum": (mine, total),
        "gather": (parts[axis.place], torch.cat(parts, 1)),
        "part": (mine, mine[:, start:stop]),
        "scatter": (mine, total[:, start:stop]),
    }
    for kind in (
        crossing.COPIED,
        crossing.SUMMED,
        crossing.GATHERED,
        crossing.PARTED,
        crossing.OPENED,
        crossing.CLOSED,
    ):
        given, out = expected[kind.there]
        x = given.clone().requires_grad_()
        crossed = cross(x, kind, axis, 1, length)
        torch.testing.assert_close(crossed, out, rtol=0, atol=1e-15)
        arriving, back = expected[kind.back]
        crossed.backward(arriving)
        assert x.grad is not None
        torch.testing.assert_close(x.grad, back, rtol=0, atol=1e-15)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_and_gradients_are_those_of_the_whole_vocabulary(dtype: torch.dtype, num_ranks: int) -> None:
    size = 7
    vocabulary = Vocabulary(axis_of(num_ranks), size)
    whole = (20 * numbers(0, 5, size)).to(dtype).requires_grad_()
    targets = torch.tensor([0, 6, -100, 3, 2])
    start, stop = vocabulary.span
    part = whole.detach()[:, start:stop].clone().requires_grad_()
    losses = losses_of(part, targets, vocabulary)
    expected = F.cross_entropy(whole, targets, reduction="none")
    torch.testing.assert_close(losses, expected)
    weight = numbers(1, 5).to(dtype)
    (losses * weight).sum().backward()
    (expected * weight).sum().backward()
    assert part.grad is not None
    assert whole.grad is not None
    torch.testing.assert_close(part.grad, whole.grad[:, start:stop])
