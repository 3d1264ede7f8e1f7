"""A feed-forward part of many experts, of which a router chooses a few for each token.

`models.decoder` builds it in place of the plain one. All that it does is a sum over tokens: capacity counts
within a sample, and balance is measured on the update before, so no cut of a batch changes its numbers.
Expert weights are stacked, [experts, ...]. It never communicates: `parallel.expert` has another forward for
`Experts` where they lie on several ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sixfold.models.choices import Order
from sixfold.models.grouped import fed_forward
from sixfold.models.layers import FeedForward

UNIT = 1e-6
"""Nats. Entropy and penalties are tallied in whole units, so that sums do not depend on their order."""
NUM_FIGURES = 4
"""That a tally has besides the choices of each expert."""


@dataclass(frozen=True)
class ExpertsConfig:
    """How tokens are shared out.

    Args:
        num_experts: of each layer.
        num_choices: experts of each token.
        num_shared: further experts that every token takes, besides; they are one wider feed-forward part.
        capacity_factor: tokens of one sample that an expert takes, as a multiple of an equal share; those
            beyond go without it. None: all.
        balance: "loss" adds a penalty on the scores of experts that had more than their share in the update
            before, "bias" moves a bias on the choice against them after each update. None: neither.
        balance_rate: weight of that penalty, or how far a bias moves.
        z_weight: of a penalty on the squared log-sum-exp of a token's scores.

    Raises:
        ValueError: a number is out of range.
    """

    num_experts: int
    num_choices: int = 2
    num_shared: int = 0
    capacity_factor: float | None = None
    balance: Literal["loss", "bias"] | None = None
    balance_rate: float = 0.01
    z_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.num_choices <= self.num_experts:
            raise ValueError(
                f"num_choices {self.num_choices} must lie in 1 to num_experts {self.num_experts}"
            )


@dataclass(frozen=True)
class RoutingStatistics:
    """How the tokens of the last update were shared out in one layer.

    Args:
        load: part of all choices that fell on each expert.
        dropped: part of all choices that found no room.
        entropy: of a token's scores over experts, in nats, mean over tokens.
        penalty: what is minimised besides the loss because of it, in nats, mean over tokens.
    """

    load: tuple[float, ...]
    dropped: float
    entropy: float
    penalty: float = 0.0

    @property
    def imbalance(self) -> float:
        """Load of the busiest expert as a multiple of an equal share."""
        return max(self.load) * len(self.load)


class Penalised(Protocol):
    """What knows the gradient of what is minimised by summed penalties."""

    penalty_scale: Tensor | float


def tally_of(experts: Tensor, kept: Tensor, probabilities: Tensor, penalties: Tensor | None) -> Tensor:
    """Choices of each expert, choices without room, tokens, entropy and penalties in UNIT: integers.

    Args:
        experts: [tokens, choices].
        kept: which of them found room, likewise.
        probabilities: [tokens, experts].
        penalties: [tokens]; None: none.
    """
    entropy = torch.special.entr(probabilities).sum(-1)
    nats = torch.stack([entropy, torch.zeros_like(entropy) if penalties is None else penalties])
    counts = torch.stack([(~kept).sum(), kept.new_tensor(len(kept), dtype=torch.int64)])
    chosen = torch.bincount(experts.flatten(), minlength=probabilities.shape[1])
    return torch.cat([chosen, counts, (nats / UNIT).round().long().sum(1)])


def statistics_of(tally: Tensor) -> RoutingStatistics | None:
    """What a sum of `tally_of` says; None where there were no tokens."""
    *counts, dropped, num_tokens, entropy, penalty = tally.tolist()
    total = sum(counts)
    if total == 0:
        return None
    load = tuple(count / total for count in counts)
    entropy, penalty = (nats * UNIT / num_tokens for nats in (entropy, penalty))
    return RoutingStatistics(load, dropped / total, entropy, penalty)


class Router(nn.Module):
    """Chooses experts for tokens, and tallies its choices.

    Attributes:
        tally: sum of `tally_of` since the last update. Whoever trains on several ranks sums it over them.
        load: choices of each expert in the last update.
        bias_steps: moves of each expert's bias so far, up less down.
        penalty_scale: gradient of what is minimised by the model's summed loss; penalties are summed too.
    """

    tally: Tensor
    load: Tensor
    bias_steps: Tensor

    def __init__(self, width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        self.penalty_scale: Tensor | float = 1.0
        self.last: RoutingStatistics | None = None
        self.weight = nn.Parameter(torch.empty(config.num_experts, width))
        # Integers keep their numbers whatever type the model is cast to.
        counts = torch.zeros(config.num_experts, dtype=torch.int64)
        self.register_buffer("load", counts)
        self.register_buffer("bias_steps", counts.clone())
        self.register_buffer(
            "tally", torch.zeros(config.num_experts + NUM_FIGURES, dtype=torch.int64), persistent=False
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        for counts in (self.load, self.bias_steps, self.tally):
            nn.init.zeros_(counts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [batch, length, width] to (experts, weights), each [batch * length, num_choices].

        A choice without room is expert `num_experts`, with weight 0.
        """
        config = self.config
        wide = torch.promote_types(x.dtype, torch.float32)
        scores = F.linear(x.flatten(0, 1).to(wide), self.weight.to(wide))
        probabilities = scores.softmax(-1)
        preferred = probabilities.detach()
        if config.balance == "bias":
            preferred = preferred + config.balance_rate * self.bias_steps
        experts = preferred.topk(config.num_choices, dim=-1).indices
        weights = probabilities.gather(1, experts)
        if config.num_choices > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        kept = within_capacity(experts, x.shape[0], config)
        if self.training and torch.is_grad_enabled():
            penalties = self._penalties(scores, probabilities)
            told = None if penalties is None else penalties.detach()
            self.tally += tally_of(experts, kept, probabilities.detach(), told)
            weights = with_penalty(weights, penalties, self)
        return experts.masked_fill(~kept, config.num_experts), weights * kept

    def end_update(self, tally: Tensor) -> None:
        """Take in what was tallied in an update, on all ranks together, and begin a new tally."""
        summed = tally.clone()
        self.tally.zero_()  # which may be what was given
        self.last = statistics_of(summed)
        if self.last is None:
            return
        counts = summed[: self.config.num_experts]
        self.load.copy_(counts)
        # Towards an equal share: up where there is less, down where there is more.
        self.bias_steps += (counts.sum() - self.config.num_experts * counts).sign()

    def _penalties(self, scores: Tensor, probabilities: Tensor) -> Tensor | None:
        """Of each token, [tokens], so that a batch may be cut anywhere; None where nothing is penalised."""
        config = self.config
        penalties = None
        if config.balance == "loss":
            load = self.load.to(scores.dtype) / self.load.sum().clamp_min(1)
            penalties = config.balance_rate * config.num_experts * (probabilities @ load)
        if config.z_weight:
            spread = config.z_weight * scores.logsumexp(-1).square()
            penalties = spread if penalties is None else penalties + spread
        return penalties


class Experts(nn.Module):
    """Gated feed-forward parts of one shape; names and order of dims are those of common open models."""

    def __init__(self, width: int, ffn_width: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * ffn_width, width))
        self.down_proj = nn.Parameter(torch.empty(num_experts, width, ffn_width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.draw_output(1)
        nn.init.normal_(self.gate_up_proj, std=(2 * self.gate_up_proj.shape[2]) ** -0.5)

    def draw_output(self, num_branches: int) -> None:
        """As `FeedForward.draw_output`."""
        nn.init.normal_(self.down_proj, std=(2 * self.down_proj.shape[2] * num_branches) ** -0.5)

    # How many rows each expert has is known only as it runs.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        beside: Callable[[], object] | None = None,
    ) -> Tensor:
        """The weighted sum of what the chosen experts make of each token.

        Args:
            hidden_states: [tokens, width].
            top_k_index: [tokens, choices]; `num_experts` is none.
            top_k_weights: [tokens, choices].
            beside: is called once; tokens may be on their way meanwhile.
        """
        order = Order.by_expert(top_k_index, self.num_experts)
        if beside is not None:
            beside()
        return order.put_back(self.on_groups(order.take(hidden_states), order.counts), top_k_weights)

    def on_groups(self, rows: Tensor, counts: list[int]) -> Tensor:
        """What experts make of rows [rows, width] that are sorted by expert, counts[e] of each."""
        return fed_forward(rows, self.gate_up_proj, self.down_proj, counts)


class MixtureOfExperts(nn.Module):
    """Router, experts, and what every token takes besides."""

    def __init__(self, width: int, ffn_width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.gate = Router(width, config)
        self.experts = Experts(width, ffn_width, config.num_experts)
        shared = FeedForward(width, config.num_shared * ffn_width) if config.num_shared else None
        self.shared_experts = shared

    def draw_output(self, num_branches: int) -> None:
        """As `FeedForward.draw_output`."""
        self.experts.draw_output(num_branches)
        if self.shared_experts is not None:
            self.shared_experts.draw_output(num_branches)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, width] to the same."""
        experts, weights = self.gate(x)
        tokens, shared, made = x.flatten(0, 1), self.shared_experts, list[Tensor]()
        beside = None if shared is None else lambda: made.append(shared(tokens))
        out: Tensor = self.experts(tokens, experts, weights, beside)
        return sum(made, out).view(x.shape)


def within_capacity(experts: Tensor, num_samples: int, config: ExpertsConfig) -> Tensor:
    """Which choices [batch * length, choices] find room: the first ones of each expert in each sample.

    Earlier tokens come first, so that none depends on a later one.
    """
    kept = torch.ones_like(experts, dtype=torch.bool)
    if config.capacity_factor is None or not experts.numel():
        return kept
    choices = experts.view(num_samples, -1)
    room = -(-config.capacity_factor * choices.shape[1] // config.num_experts)
    samples = torch.arange(num_samples, device=experts.device)[:, None]
    queue = (samples * config.num_experts + choices).flatten()
    order = queue.argsort(stable=True)
    lengths = torch.bincount(queue, minlength=num_samples * config.num_experts)
    starts = lengths.cumsum(0) - lengths
    place = torch.arange(len(queue), device=experts.device) - starts[queue[order]]
    return kept.flatten().index_copy(0, order, place < room).view(experts.shape)


# What a graph finds in an attribute when it is made, it keeps for good.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def with_penalty(weights: Tensor, penalties: Tensor | None, router: Penalised) -> Tensor:
    """`weights`, whose backward goes through the sum of `penalties` as well."""
    if penalties is None:
        return weights
    out: Tensor = _Attached.apply(weights, penalties, router)  # type: ignore[no-untyped-call]
    return out


def telling(loss: Tensor, routers: Sequence[Router]) -> Tensor:
    """A summed loss, whose backward tells `routers` its gradient before it comes to them."""
    out: Tensor = _Telling.apply(loss, routers)  # type: ignore[no-untyped-call]
    return out


class _Attached(torch.autograd.Function):
    """Adds a penalty's gradient without handing its value on, so that it passes through any block, is
    recomputed with it, and stays with its stage of a pipeline."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, penalties: Tensor, router: Penalised) -> Tensor:
        ctx.router, ctx.penalties = router, penalties.detach()
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, torch.ones_like(ctx.penalties) * ctx.router.penalty_scale, None


class _Telling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, routers: Sequence[Router]) -> Tensor:
        ctx.routers = routers
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        for router in ctx.routers:
            router.penalty_scale = gradient
        return gradient, None
