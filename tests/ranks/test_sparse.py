"""Sparse gradients of embeddings, in every residency, against the dense ones of plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sixfold
from tests.ranks import plain, rows


class Bags(nn.Module):
    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 8, sparse=sparse)
        self.bag = nn.EmbeddingBag(40, 8, mode="sum", sparse=sparse)
        self.head = nn.Linear(8, 6)

    def forward(self, items: Tensor) -> Tensor:
        out: Tensor = self.head(self.table(items).mean(1) + self.bag(items))
        return out


def build(*, sparse: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Bags(sparse=sparse)


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    items = torch.randint(0, 40, (12, 3), generator=generator)
    return items, torch.randint(0, 6, (12,), generator=generator)


@pytest.mark.ranks
@pytest.mark.parametrize(("zero", "num_ranks"), rows.presets(1, 3))
@pytest.mark.parametrize("loop", ["train_step", "written_out"])
def test_sparse_gradients_are_summed_like_dense_ones(loop: str, zero: int) -> None:
    reference = build(sparse=False).double()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.01)
    engine = sixfold.initialize(
        build(sparse=True).double(),
        config={
            "layout": {"zero": zero},
            "batch": {"micro": 2},
            "optimizer": {"lr": 0.01, "weight_decay": 0.01},
        },
        loss_fn=lambda output, batch: F.cross_entropy(output, batch[1]),
    )
    for step in range(4):
        items, targets = data(step)
        optimizer.zero_grad()
        F.cross_entropy(reference(items), targets).backward()
        optimizer.step()
        places = plain.cuts(12, engine.data_ranks, "even", step)[engine.data_rank]
        mine = slice(places.start, places.stop)
        if loop == "train_step":
            engine.train_step((items[mine], targets[mine]))
        else:
            for part in torch.arange(12)[mine].split(2):
                engine.backward(F.cross_entropy(engine(items[part]), targets[part]))
            engine.step()
    found = engine.full_state_dict()
    for name, each in reference.named_parameters():
        assert torch.allclose(found[name], each.detach(), rtol=0, atol=1e-10), name


@pytest.mark.ranks(2)
def test_sparse_gradients_of_a_narrow_table() -> None:
    """bf16 tables whose gradients are kept in fp32."""
    norms = []
    for sparse in (True, False):
        engine = sixfold.initialize(
            build(sparse=sparse),
            config={"precision": {"compute": "bf16"}, "batch": {"micro": 2}},
            loss_fn=lambda output, batch: F.cross_entropy(output.float(), batch[1]),
        )
        items, targets = data(0)
        mine = slice(6 * engine.data_rank, 6 * engine.data_rank + 6)
        engine.train_step((items[mine], targets[mine]))
        assert engine.last is not None
        norms.append(engine.last.grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=2**-7)
