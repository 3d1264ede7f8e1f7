"""Layers of the reference models: projections, embedding, norm, gated feed-forward.

Plain torch modules that draw their own parameters, so that a model built on the meta device starts by
calling every `reset_parameters`, children first. They hold no state besides and never communicate.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NORM_EPS = 1e-6


class Linear(nn.Linear):
    """A projection without bias; at first its output has half the variance of its input.

    Half rather than all: a little better after a few hundred updates, in a trial of three gains.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        self.draw(1)

    def draw(self, num_branches: int) -> None:
        """Draw it again, so that the sum of so many outputs has the variance that is meant for one."""
        nn.init.normal_(self.weight, std=(2 * self.in_features * num_branches) ** -0.5)


class Embedding(nn.Embedding):
    """As a tied head it is a projection too, and is drawn like one: first logits have variance one."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last dim, computed in fp32 (fp64 for fp64)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":  # where torch has one kernel for it
            return F.rms_norm(x, self.weight.shape, self.weight, NORM_EPS)
        out: Tensor = _Normalised.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return out


class _Normalised(torch.autograd.Function):
    """A norm in few passes over memory. Autograd makes some twenty, and keeps three wide tensors; here the
    input and one number a row are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = squares.div_(x.shape[-1]).add_(NORM_EPS).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, scale = ctx.saved_tensors
        normalised, wide, factor = x.to(scale.dtype) * scale, gradient.to(scale.dtype), weight.to(scale.dtype)
        of_factor = wide * normalised
        # What lies along x itself changes its size only, and the norm takes that out again.
        along = (of_factor @ factor).div_(x.shape[-1]).unsqueeze(-1)
        of_x = (wide * factor).addcmul_(normalised, along, value=-1).mul_(scale)
        return of_x.to(x.dtype), of_factor.flatten(0, -2).sum(0).to(weight.dtype)


class FeedForward(nn.Module):
    def __init__(self, width: int, ffn_width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, ffn_width)
        self.up_proj = Linear(width, ffn_width)
        self.down_proj = Linear(ffn_width, width)

    def draw_output(self, num_branches: int) -> None:
        """Draw the projection into the residual stream again, smaller; see `Block`."""
        self.down_proj.draw(num_branches)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out
