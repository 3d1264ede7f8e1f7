"""Layers that are cut, on threads of one process: what they are given, and what they refuse."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sixfold.base.errors import ModelError
from sixfold.mesh import Branch, Streams
from sixfold.parallel.pieces import piece_of
from sixfold.parallel.tensor.cut import Rules, decide_tensor
from sixfold.parallel.tensor.forwards import TensorForwards
from sixfold.parallel.tensor.verify import _on_threads
from sixfold.parallel.tensor.vocabulary import Vocabulary, losses_of

VOCABULARY = 9
STYLES = {"embed": "embedding_rowwise", "up": "colwise", "down": "rowwise"}


class Net(nn.Module):
    """Tokens to hidden states; `forward` may be told to call its layers by keyword."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 4, **options)
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, ids: Tensor, by_name: bool = False) -> Tensor:
        if by_name:
            return self.down(input=self.up(input=self.embed(input=ids)))
        return self.down(self.up(self.embed(ids)))


def on_ranks(*args: Any) -> list[Any]:
    """What two ranks get, or how they fail."""
    whole = Net()
    cuts = [decide_tensor(whole, Rules(STYLES, is_exact=True), 2, place) for place in range(2)]
    parts = [deepcopy(whole) for _ in range(2)]

    def run(axis: Any) -> Tensor:
        part, cut = parts[axis.place], cuts[axis.place]
        for name, parameter in part.named_parameters():
            if name in cut.places:
                parameter.data = piece_of(parameter.data, cut.places[name])
        TensorForwards(part, cut, axis)
        return part(*args).detach()

    return _on_threads(2, run)


@pytest.mark.parametrize("number", [-1, VOCABULARY, -100])
def test_what_is_not_in_the_vocabulary_is_refused_on_every_rank(number: int) -> None:
    """As an embedding and a loss that are whole refuse it."""
    said = f"{number} .*a vocabulary of {VOCABULARY}: they lie in 0 to {VOCABULARY - 1}"
    numbers = torch.tensor([4, number])
    for found in on_ranks(numbers):
        with pytest.raises(IndexError, match=f"ids of embed .*{said}"):
            raise found
    if number == -100:
        return
    scores = torch.zeros(2, 5)
    for found in _on_threads(2, lambda axis: losses_of(scores, numbers, Vocabulary(axis, VOCABULARY))):
        with pytest.raises(IndexError, match=f"targets .*{said}"):
            raise found


def test_layers_may_be_called_by_keyword() -> None:
    ids = torch.arange(VOCABULARY)
    for found in on_ranks(ids, True):
        torch.testing.assert_close(found, Net()(ids).detach())


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_embeddings_that_need_all_their_entries_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ModelError, match=f"embed has {name} = {options[name]}"):
        decide_tensor(Net(**options), Rules(STYLES), 2, 0)


def drawn(place: int, num_here: int) -> list[Tensor]:
    """What a rank draws from the common stream, twice from its branch, and from the former again."""
    branch, device = Branch(place, torch.device("cpu")), torch.device("cpu")
    with Streams(0, device).keyed("step"):
        found = [torch.rand(3)]
        before = torch.get_rng_state()
        branch.leave()  # not entered yet
        for num in (num_here, 1):
            branch.enter()
            branch.enter()
            found.append(torch.rand(num))
        branch.leave()
        found.append(torch.rand(3))
        # As backward does that runs a part again, and stops in the middle of it; and then the whole.
        for _ in range(2):
            torch.set_rng_state(before)
            branch.enter()
            assert torch.equal(torch.rand(num_here), found[1])
    return found


def test_what_ranks_draw_for_their_parts_is_their_own_and_the_rest_alike() -> None:
    one, other = drawn(0, 3), drawn(1, 5)
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[3], other[3])
    assert not torch.equal(one[1], other[1][:3])
    assert not torch.equal(one[0], one[3])
