"""Parameters that an axis cuts, or of which it makes gradients partial: the same numbers, norms, edits and
checkpoints as in one process, in every residency. A hand-made axis stands in for those of the library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sixfold
from sixfold.base.axes import CARDS
from sixfold.engine import Engine
from sixfold.mesh import Group, Mesh
from sixfold.parallel import AxisChange
from sixfold.parallel.axes import DECIDE
from sixfold.parallel.change import Case
from sixfold.plan import Place
from sixfold.testing import Pool

WIDTH, HIDDEN, SAMPLES = 5, 8, 12


class Net(nn.Module):
    """Two linear maps with a scale for each hidden number between them, and a norm behind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.scale = nn.Parameter(torch.rand(HIDDEN))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.down(self.scale * self.up(x).tanh())).square().mean(-1).sum()


def spans_of(rank: int) -> tuple[tuple[int, int], ...]:
    """Two runs each, as of weights that are packed."""
    return ((2 * rank, 2 * rank + 2), (4 + 2 * rank, 6 + 2 * rank))


def decide(case: Case) -> AxisChange:
    spans, axes = spans_of(case.geometry.coordinate(case.rank, "tensor")), ("tensor",)
    return AxisChange(
        {
            "up.weight": Place((HIDDEN, WIDTH), (spans, ()), axes),
            "up.bias": Place((HIDDEN,), (spans,), axes),
            "down.weight": Place((WIDTH, HIDDEN), ((), spans), axes),
            # Whole, and each rank uses a part of it.
            "scale": Place((HIDDEN,), partial=axes),
        },
        lambda mesh: change(case.model, mesh),
    )


def change(model: nn.Module, mesh: Mesh) -> Any:
    group = mesh.along("tensor")
    mine = torch.cat([torch.arange(*span) for span in spans_of(group.place)])

    def forward(x: Tensor) -> Tensor:
        part = model.scale[mine] * model.up(_Copy.apply(x, group)).tanh()
        return model.norm(_Sum.apply(model.down(part), group)).square().mean(-1).sum()

    model.forward = forward
    return lambda: delattr(model, "forward")


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone().contiguous()
        ctx.group.all_reduce(grad.view(-1)).wait()
        return grad, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        x = x.clone().contiguous()
        group.all_reduce(x.view(-1)).wait()
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def start(layout: dict[str, Any]) -> Engine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CARDS, "tensor", CARDS["data"])
        patch.setitem(DECIDE, "tensor", decide)
        return sixfold.initialize(
            Net(),
            config={"layout": layout, "optimizer": {"lr": 0.01, "clip_norm": 0.5}},
            loss_fn=lambda out, batch: (out, float(len(batch["x"]))),
        )


def train(engine: Engine, steps: int) -> list[float]:
    norms = []
    for step in range(engine.num_steps, steps):
        x = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        share = SAMPLES // engine.data_ranks
        engine.train_step({"x": x[engine.data_rank * share :][:share]})
        norms.append(engine.last.grad_norm)
    return norms


def single(steps: int) -> tuple[dict[str, Tensor], list[float]]:
    """The same in a world of its own: every rank trains all of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "get_world_size", lambda: 1)
        patch.setattr(torch.distributed, "get_rank", lambda: 0)
        engine = start({})
        norms = train(engine, steps)
        return engine.full_state_dict(), norms


LAYOUTS = [
    (2, {"tensor": 2, "zero": 0}),
    (4, {"tensor": 2, "zero": 1}),
    (4, {"tensor": 2, "zero": 2, "transport": "network"}),
    (2, {"tensor": 2, "zero": 3}),
    (4, {"tensor": 2, "zero": 3}),
]


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
def test_the_numbers_of_one_process(ranks: int, layout: dict[str, Any], rank_pool: Pool) -> None:
    rank_pool.run(same_numbers, layout, ranks=ranks, timeout_s=60)


def same_numbers(layout: dict[str, Any]) -> None:
    model, norms = single(4)
    engine = start(layout)
    assert train(engine, 4) == pytest.approx(norms, rel=1e-10, abs=0)
    for name, whole in engine.full_state_dict().items():
        assert torch.allclose(whole, model[name], rtol=0, atol=1e-12), name
    assert {name: tuple(each.shape) for name, each in engine.gradients().items()} == {
        name: tuple(each.shape) for name, each in model.items()
    }
    with engine.gathered():
        assert engine.module.up.weight.shape == (HIDDEN, WIDTH)
        assert torch.equal(engine.module.up.weight, engine.full_state_dict()["up.weight"])
        engine.module.up.weight.data.mul_(2)
        engine.module.scale.data.mul_(3)
    edited = engine.full_state_dict()
    assert torch.allclose(edited["up.weight"], 2 * model["up.weight"], atol=1e-12)
    assert torch.allclose(edited["scale"], 3 * model["scale"], atol=1e-12)
