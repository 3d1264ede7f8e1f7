"""What a context rank makes of a batch: lengths that divide or do not, and what a cut is tried on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sixfold.base.errors import ModelError
from sixfold.parallel import ContextAttention, off_zero
from sixfold.pipeline import SequenceCut, tensors_of


def cut_of(num_ranks: int, multiple: int, module: nn.Module | None = None, place: int = 0) -> SequenceCut:
    group: Any = SimpleNamespace(num_ranks=num_ranks, place=place)
    return SequenceCut(module or nn.Identity(), ContextAttention(group), torch.device("cpu"), multiple)


def rows_of(length: int, num_ranks: int, multiple: int) -> list[int]:
    cuts = (cut_of(num_ranks, multiple, place=place) for place in range(num_ranks))
    pieces: list[Tensor] = [cut.piece(torch.zeros(2, length), shift=None).batch for cut in cuts]
    return [piece.shape[1] for piece in pieces]


@pytest.mark.parametrize(("num_ranks", "multiple"), [(2, 1), (2, 2), (4, 2), (3, 4), (2, 16)])
def test_what_is_tried_divides_as_the_batch_does(num_ranks: int, multiple: int) -> None:
    """All of it, or as much of its beginning as a rank can run alone."""
    whole = num_ranks * multiple
    for length in (40 * whole, 2001 * whole, 9000 * whole, *((9333,) if multiple == 1 else ())):
        short = cut_of(num_ranks, multiple).short(torch.zeros(2, length))
        tried, fits = short.shape[1], max(4096, length // num_ranks)
        assert tried == length if length <= fits else fits <= tried < fits + 2 * whole
        parts = zip(rows_of(length, num_ranks, multiple), rows_of(tried, num_ranks, multiple), strict=True)
        assert all(part % multiple == 0 and (part - short) % multiple == 0 for part, short in parts)


def test_a_length_is_refused_on_all_ranks_or_on_none() -> None:
    """Of 34 tokens ranks have 9, 8, 8 and 9."""
    for place in range(4):
        with pytest.raises(ModelError, match=r"34 tokens .* have 9, 8, 8, 9") as caught:
            cut_of(4, 2, place=place).piece(torch.zeros(2, 34), shift=None)
        assert "a multiple of 8" in caught.value.fix


def fields(tokens: Tensor, targets: Tensor) -> list[Any]:
    """A batch in every form."""
    return [
        (tokens, targets),
        {"tokens": tokens, "targets": targets},
        {"tokens": tokens, "labels": targets},
        [{"tokens": tokens}, targets],
    ]


@pytest.mark.parametrize("form", range(4))
def test_targets_are_counted_wherever_they_are(form: int) -> None:
    """Of 32 tokens, of which eight have no target, ranks have 8 and 16 that have one; tried is a piece with
    one everywhere."""
    tokens, targets = torch.ones(2, 2, 32, dtype=torch.long)
    targets[:, :8] = -100
    batch = fields(tokens, targets)[form]
    pieces = [cut_of(2, 1, place=place).piece(batch, shift=None) for place in range(2)]
    assert [(piece.share, piece.targets) for piece in pieces] == [(1 / 3, 16), (2 / 3, 32)]
    assert [piece.least for piece in pieces] == [1 / 3, 1 / 3]
    assert all(int(each.min()) >= 0 for each in tensors_of(cut_of(2, 1).short(batch)))
    assert int(targets.min()) == -100


def test_weights_at_rest_are_moved_while_a_module_runs() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    first, second = model[0], model[1]
    with torch.no_grad():
        first.bias.zero_()
        second.weight.fill_(1e-6)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    x = torch.ones(2, 4)
    plain = [first(x), model(x)]
    with torch.no_grad(), off_zero(model):
        assert not torch.allclose(first(x), plain[0])
        torch.testing.assert_close(first.weight @ x[0] + first.bias, plain[0][0])
        moved = model(x)
        assert not torch.allclose(moved, plain[1])
        assert torch.equal(model(x), moved)
    torch.testing.assert_close(model(x), plain[1], rtol=0, atol=0)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
