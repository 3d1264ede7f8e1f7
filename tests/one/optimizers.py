"""Optimizers that torch does not have, as tests hand them over: elementwise ones and others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Own(Optimizer):
    """A step that asks `direction` for what to subtract, times the rate."""

    def __init__(self, params: Iterable[Any], lr: float = 0.1, **settings: Any) -> None:
        super().__init__(params, {"lr": lr, **settings})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    parameter.sub_(group["lr"] * self.direction(parameter, parameter.grad, state, group))

    def direction(self, parameter: Tensor, grad: Tensor, state: Any, group: Any) -> Tensor:
        raise NotImplementedError


class Lion(Own):
    """X. Chen et al., Symbolic discovery of optimization algorithms, 2023."""

    def direction(self, parameter: Tensor, grad: Tensor, state: Any, group: Any) -> Tensor:
        average = state.setdefault("exp_avg", torch.zeros_like(parameter))
        found = torch.sign(0.9 * average + 0.1 * grad)
        average.mul_(0.99).add_(grad, alpha=0.01)
        return found


class Decaying(Own):
    """Elementwise in its numbers, but only matrices decay."""

    def direction(self, parameter: Tensor, grad: Tensor, state: Any, group: Any) -> Tensor:
        return grad + 0.1 * parameter if parameter.dim() > 1 else grad


class Normalised(Own):
    """Divides by the norm of the whole tensor's gradient."""

    def direction(self, parameter: Tensor, grad: Tensor, state: Any, group: Any) -> Tensor:
        return grad / grad.norm()


class Late(Own):
    """The same, from the 60th update on."""

    def direction(self, parameter: Tensor, grad: Tensor, state: Any, group: Any) -> Tensor:
        state["calls"] = state.get("calls", 0) + 1
        return grad / grad.norm() if state["calls"] > 60 else grad


class Distant(Own):
    """One rate for all, from the distance that a constant gradient has brought all of them."""

    def direction(self, parameter: Tensor, grad: Tensor, state: Any, group: Any) -> Tensor:
        start = state.setdefault("start", parameter.clone())
        found = float((grad * (start - parameter)).sum() / (1e-6 + grad.abs().sum()))
        group["distance"] = max(group.get("distance", 1e-6), found)
        return grad * group["distance"]


class Noisy(Own):
    """Draws a number for each element."""

    def direction(self, parameter: Tensor, grad: Tensor, state: Any, group: Any) -> Tensor:
        return grad + torch.randn_like(grad)


class Factored(Own):
    """Keeps sums of squares by row and by column, and a count as a number."""

    def direction(self, parameter: Tensor, grad: Tensor, state: Any, group: Any) -> Tensor:
        rows = state.setdefault("rows", torch.zeros_like(grad.sum(-1)))
        columns = state.setdefault("columns", torch.zeros_like(grad.sum(0)))
        state["updates"] = state.get("updates", torch.tensor(0, dtype=torch.int64)) + 1
        rows.add_(grad.square().sum(-1))
        columns.add_(grad.square().sum(0))
        if grad.dim() == 1:
            return grad / columns.sqrt().add(1e-6)
        return grad / torch.outer(rows, columns / columns.sum()).sqrt().add(1e-6)


class Hoarding(Lion):
    """Lion that keeps its parameters, itself and a counter aside."""

    def __init__(self, params: Iterable[Any], **settings: Any) -> None:
        super().__init__(params, **settings)
        self.held = [parameter for group in self.param_groups for parameter in group["params"]]
        self.again = self.step
        self.num_steps = [0]

    def step(self, closure: Any = None) -> None:
        self.num_steps[0] += 1
        with torch.no_grad():
            self.held[0].add_(0.0 * self.num_steps[0])
        super().step()
