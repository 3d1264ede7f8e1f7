"""torch's own modules, as blocks that come and go: they keep their weights and train like plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import sixfold
from tests.ranks import plain, towers

BOUND = 1e-10
BATCH = 2


def ids(x: Tensor) -> Tensor:
    """Whole numbers below 7 of [n, 6, 4] numbers: [n, 6]."""
    return (x[..., 0] * 1000).long().abs() % 7


class Held(nn.Module):
    """Parameters in a list, in a dictionary, as numbers, frozen, and one that is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ParameterList([torch.rand(4) for _ in range(2)])
        self.named = nn.ParameterDict({"scale": torch.rand(()), "shift": torch.rand(4)})
        self.parts = nn.ModuleDict({"one": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
        self.parts["other"].weight = self.parts["one"].weight
        self.fixed = nn.Parameter(torch.rand(4), requires_grad=False)
        self.turn = nn.Parameter(torch.rand(4, dtype=torch.complex64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.rows[0] + self.rows[1] * self.named["scale"] + self.named["shift"] + self.fixed
        out: Tensor = self.parts["other"](torch.tanh(self.parts["one"](x))) * self.turn.real
        return out


Case = tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]


def alone(module: Any, x: Tensor) -> Tensor:
    out: Tensor = module(x)
    return out


def first(module: Any, x: Tensor) -> Tensor:
    out: Tensor = module(x)[0]
    return out


def image(module: Any, x: Tensor) -> Tensor:
    out: Tensor = module(x[:, None])
    return out


TYPES: dict[str, Case] = {
    "Linear": (lambda: nn.Linear(4, 5), alone),
    "Linear without bias": (lambda: nn.Linear(4, 5, bias=False), alone),
    "Conv1d": (lambda: nn.Conv1d(6, 3, 2), alone),
    "Conv2d": (lambda: nn.Conv2d(1, 3, 2), image),
    "Conv3d": (lambda: nn.Conv3d(1, 2, 2), lambda m, x: m(x.view(-1, 1, 2, 3, 4))),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(1, 2, 2), image),
    "Embedding": (lambda: nn.Embedding(7, 3, padding_idx=1), lambda m, x: m(ids(x))),
    "sparse Embedding": (lambda: nn.Embedding(7, 3, sparse=True), lambda m, x: m(ids(x))),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(7, 3), lambda m, x: m(ids(x))),
    "LayerNorm": (lambda: nn.LayerNorm(4), alone),
    "RMSNorm": (lambda: nn.RMSNorm(4), alone),
    "GroupNorm": (lambda: nn.GroupNorm(2, 6), alone),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(6, affine=True), alone),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), alone),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(1), image),
    "RNN": (lambda: nn.RNN(4, 3, batch_first=True), first),
    "LSTM": (lambda: nn.LSTM(4, 3, 2, bidirectional=True, batch_first=True), first),
    "GRU": (lambda: nn.GRU(4, 3, batch_first=True), first),
    "LSTMCell": (lambda: nn.LSTMCell(4, 3), lambda m, x: m(x[:, 0])[0]),
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True),
        lambda m, x: m(x, x, x)[0],
    ),
    "attention of other widths": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=2, batch_first=True),
        lambda m, x: m(x, x[..., :3], x[..., :2])[0],
    ),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        alone,
    ),
    "TransformerDecoderLayer": (
        lambda: nn.TransformerDecoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        lambda m, x: m(x, x.flip(1)),
    ),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
        ),
        alone,
    ),
    "Bilinear": (lambda: nn.Bilinear(3, 2, 4), lambda m, x: m(x[..., :3], x[..., :2])),
    "PReLU": (lambda: nn.PReLU(6), alone),
    "AdaptiveLogSoftmax": (
        lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 7, [3]),
        lambda m, x: m(x.flatten(0, 1), ids(x).flatten())[1],
    ),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 3)), alone),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), alone),
    "old weight norm": (lambda: nn.utils.weight_norm(nn.Linear(4, 3)), alone),
    "holders": (Held, alone),
    "Sequential": (lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)), alone),
}


class Pair(nn.Module):
    """Two of a kind, each a block; the output is the loss."""

    def __init__(self, name: str) -> None:
        super().__init__()
        build, self.call = TYPES[name]
        self.parts = nn.ModuleList(build() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        losses = [self.call(part, x).square().mean() for part in self.parts]
        return losses[0] + losses[1]


def shares(step: int, ranks: int) -> list[Tensor]:
    """Each rank's samples [BATCH, 6, 4]."""
    numbers = torch.arange(ranks * BATCH * 24, dtype=torch.float64)
    return list((numbers * 0.37 + step).sin().view(-1, 6, 4).split(BATCH))


def follow(zero: int) -> dict[str, str]:
    """What is wrong with each type."""
    wrong: dict[str, str] = {}
    for name in TYPES:
        try:
            check(name, zero)
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"
    return wrong


def check(name: str, zero: int) -> None:
    ranks = torch.distributed.get_world_size()
    reference = towers.seeded(lambda: Pair(name))
    config = {
        "layout": {"zero": zero, "blocks": ["parts.*"]},
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        "model": {"batch_stats": "micro"},
    }
    with plain.small_units():
        engine = sixfold.initialize(towers.seeded(lambda: Pair(name)), config=config)
    whole, built = engine.full_state_dict(), reference.state_dict()
    assert whole.keys() == built.keys()
    assert all(torch.equal(whole[key], built[key]) for key in built), "other weights than it was built with"
    trained = [parameter for parameter in reference.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    for step in range(2):
        optimizer.zero_grad()
        for share in shares(step, ranks):
            (reference(share) / ranks).backward()
        for parameter in trained:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()
        optimizer.step()
        engine.train_step((shares(step, ranks)[engine.data_rank],))
    distance = plain.farthest(engine.full_state_dict(), reference)
    assert distance < BOUND, f"{distance} from plain torch"
    engine.close()


@pytest.mark.ranks
@pytest.mark.parametrize(("zero", "num_ranks"), [(0, 2), (3, 1), (3, 2), (3, 3), (3, 4)])
def test_every_type_keeps_its_weights_and_trains_like_plain_torch(zero: int) -> None:
    assert follow(zero) == {}
