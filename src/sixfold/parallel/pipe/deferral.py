"""Linear layers whose weight gradients may be put off: what a zero-bubble schedule moves into its gaps.

Called by `initialize` for such schedules, and by the player around the input part of a backward. Everything
but the weights of `nn.Linear` stays in the input part. It accumulates nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Product:
    """The gradient of one weight [out, in] for one use of it, not computed yet.

    Args:
        inputs: what the layer was given, [..., in].
        gradient: of what it returned, [..., out].
    """

    weight: nn.Parameter
    inputs: torch.Tensor
    gradient: torch.Tensor

    def compute(self) -> torch.Tensor:
        """The gradient."""
        return self.gradient.flatten(0, -2).t() @ self.inputs.flatten(0, -2)


@dataclass
class Deferral:
    """Whether weight gradients are put off now, and where to."""

    queue: list[Product] | None = None
    _changed: list[nn.Module] = field(default_factory=list)

    @contextmanager
    def put_off(self) -> Iterator[list[Product]]:
        """Inside, backwards leave products in the list that is given."""
        self.queue = list[Product]()
        try:
            yield self.queue
        finally:
            self.queue = None

    def attach(self, modules: Iterable[nn.Module]) -> None:
        """Give the linear layers in `modules` a forward whose weight gradient can be put off."""
        for module in modules:
            for part in module.modules():
                is_plain = isinstance(part, nn.Linear) and type(part).forward is nn.Linear.forward
                if is_plain and "forward" not in vars(part):
                    part.forward = MethodType(_deferring(self), part)
                    self._changed.append(part)

    def remove(self) -> None:
        """Give them their own forward again."""
        while self._changed:
            del self._changed.pop().forward


def _deferring(deferral: Deferral) -> Callable[[nn.Linear, torch.Tensor], torch.Tensor]:
    def forward(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        # A weight that is computed (weight_norm, spectral_norm) is no leaf: its gradient goes on at once.
        is_leaf = isinstance(weight, nn.Parameter) and weight.requires_grad
        if input.dim() < 2 or not (torch.is_grad_enabled() and is_leaf):
            return F.linear(input, weight, bias)
        output: torch.Tensor = _Linear.apply(input, weight, bias, deferral)  # type: ignore[no-untyped-call]
        return output

    return forward


class _Linear(torch.autograd.Function):
    """`F.linear`; its backward leaves the weight's gradient to a deferral that asks for it."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, weight: nn.Parameter, bias: Any, deferral: Deferral
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.weight, ctx.deferral = weight, deferral
        return F.linear(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        wants_inputs, _, wants_bias, _ = ctx.needs_input_grad
        product = Product(ctx.weight, inputs, gradient)
        queue = ctx.deferral.queue
        if queue is not None:
            queue.append(product)
        return (
            gradient @ weight if wants_inputs else None,
            product.compute() if queue is None else None,
            gradient.flatten(0, -2).sum(0) if wants_bias else None,
            None,
        )
