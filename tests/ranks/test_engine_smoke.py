"""Smoke."""

from __future__ import annotations
import pytest, torch
from torch import nn
import sixfold


@pytest.mark.ranks(1, 2, 3)
def test_equals_one_process() -> None:
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    import copy

    r = copy.deepcopy(m)
    ro = torch.optim.AdamW(r.parameters(), lr=1e-2)
    e = sixfold.initialize(
        m, config={"optimizer": {"lr": 1e-2}}, loss_fn=lambda o, b: ((o - b[1]) ** 2).mean()
    )
    for i in range(5):
        x = torch.randn(10, 8, dtype=torch.float64)
        y = torch.randn(10, 1, dtype=torch.float64)
        lo, hi = e.data_rank * 10 // e.data_ranks, (e.data_rank + 1) * 10 // e.data_ranks
        l = e.train_step((x[lo:hi], y[lo:hi]))
        ro.zero_grad()
        rl = ((r(x) - y) ** 2).mean()
        rl.backward()
        ro.step()
        assert abs(l - rl.item()) < 1e-12
    assert max((a - b).abs().max().item() for a, b in zip(m.parameters(), r.parameters())) < 1e-12
    e.close()
