"""Weight gradients that are put off: the same numbers, and nothing but linear layers is touched."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from sixfold.parallel import Deferral, change_forwards


class Block(nn.Module):
    """Linear layers with and without bias, one used twice, a frozen one, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.twice = nn.LayerNorm(4), nn.Linear(4, 4)
        self.plain = nn.Linear(4, 4, bias=False)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(torch.tanh(self.twice(self.norm(x))))
        return x + self.frozen(self.plain(x))


def _model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(Block(), Block()).double()


def _given() -> torch.Tensor:
    return torch.randn(
        3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    ).requires_grad_()


def _gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: each.grad for name, each in model.named_parameters()}


@pytest.mark.parametrize("recompute", [None, "full", "selective"])
def test_both_parts_together_are_the_backward(recompute: str | None) -> None:
    plain, model = _model(), _model()
    expected, given = _given(), _given()
    plain(expected).square().sum().backward()
    change_forwards(model, ["0", "1"], recompute, None)  # type: ignore[arg-type]
    deferral = Deferral()
    deferral.attach([model])
    loss = model(given).square().sum()
    with deferral.put_off() as queue:
        loss.backward()
    # The input part: everything but the weights of linear layers, and what they need is kept.
    assert torch.equal(given.grad, expected.grad)
    linears = {name for name, each in model.named_parameters() if each.dim() == 2 and each.requires_grad}
    assert {name for name, gradient in _gradients(model).items() if gradient is None} == {
        *linears,
        *(name for name in _gradients(model) if "frozen" in name),
    }
    assert len(queue) == 2 * 3
    for product in queue:
        gradient = product.compute()
        product.weight.grad = gradient if product.weight.grad is None else product.weight.grad + gradient
    for name, gradient in _gradients(plain).items():
        found = _gradients(model)[name]
        assert (found is None) == (gradient is None)
        assert gradient is None or torch.allclose(found, gradient, rtol=1e-14, atol=0)


def test_without_a_queue_it_is_an_ordinary_backward() -> None:
    plain, model = _model(), _model()
    deferral = Deferral()
    deferral.attach([model])
    for each in (plain, model):
        each(_given()).square().sum().backward()
    for name, gradient in _gradients(plain).items():
        assert gradient is None or torch.allclose(_gradients(model)[name], gradient, rtol=1e-14, atol=0)
    deferral.remove()
    assert all("forward" not in vars(part) for part in model.modules())


@pytest.mark.parametrize("change", ["subclass", "instance"])
def test_a_forward_of_its_own_is_left_alone(change: str) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    layer = Doubled(2, 2) if change == "subclass" else nn.Linear(2, 2)
    own: Callable[[torch.Tensor], torch.Tensor] = lambda x: x  # noqa: E731
    if change == "instance":
        layer.forward = own  # type: ignore[method-assign]
    before = vars(layer).get("forward")
    Deferral().attach([layer])
    assert vars(layer).get("forward") is before


@pytest.mark.parametrize("change", [nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm])
def test_a_weight_that_is_computed_has_its_gradient_at_once(
    change: Callable[[nn.Module], nn.Module],
) -> None:
    torch.manual_seed(1)
    plain = change(nn.Linear(4, 4).double())
    model = copy.deepcopy(plain)
    deferral = Deferral()
    deferral.attach([model])
    plain(_given()).square().sum().backward()
    with deferral.put_off() as queue:
        model(_given()).square().sum().backward()
    assert not queue
    for name, gradient in _gradients(plain).items():
        found = _gradients(model)[name]
        assert gradient is not None
        assert found is not None
        assert torch.equal(found, gradient)
