"""The balancing loss of Hugging Face models with experts, in a form that no cut of a batch changes.

Made by `initialize` for a model that would add one (`output_router_logits`). The model adds it once for each
micro-batch, from the load of that micro-batch alone; here it is left out of the model's loss, and its
gradient is added where routers choose, from the load of the whole update before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sixfold.base.errors import ModelError
from sixfold.models.moe import NUM_FIGURES, RoutingStatistics, statistics_of, tally_of, with_penalty
from sixfold.parallel.blocks import put_forward
from sixfold.parallel.facts import ROUTER_LOGITS
from sixfold.parallel.tensor.crossing import Axis, bounds


class ModelBalance:
    """The balance of all layers of a model together, as its own loss has it.

    Args:
        gates: its routers: forwards that return (scores, weights, experts).
        weight: of the loss beside that of the model.
        axis: ranks of which each may have its part of the sequence alone.

    Attributes:
        tally, penalty_scale, last: see `routing.Tallying`.
        load: choices of each expert in the last update, in all layers.
    """

    def __init__(self, model: nn.Module, gates: Mapping[str, nn.Module], weight: float, axis: Axis) -> None:
        num_experts = {int(gate.num_experts) for gate in gates.values()}  # type: ignore[arg-type]
        (self.num_experts,) = num_experts
        device = next(model.parameters()).device
        self.weight, self.num_layers, self._axis = weight, len(gates), axis
        self.tally = torch.zeros(self.num_experts + NUM_FIGURES, dtype=torch.int64, device=device)
        self.load = torch.zeros(self.num_experts, dtype=torch.int64, device=device)
        self.last: RoutingStatistics | None = None
        self.penalty_scale: Tensor | float = 0.0
        self._mask: Tensor | None = None
        undo = ExitStack()
        undo.callback(put_forward(model, self._around_model(model)))
        for gate in gates.values():
            undo.callback(put_forward(gate, self._around_gate(gate)))
        self.remove = undo.close
        """Give the model its own way back."""

    @classmethod
    def find(cls, model: nn.Module, axis: Axis) -> ModelBalance | None:
        """That of a model that adds such a loss; None of any other.

        Raises:
            ModelError: its routers are not known.
        """
        config = getattr(model, "config", None)
        weight = getattr(config, "router_aux_loss_coef", None)
        if not getattr(config, ROUTER_LOGITS, False) or not weight:
            return None
        kinds = [getattr(part, "_can_record_outputs", None) or {} for part in model.modules()]
        found = next((kind["router_logits"] for kind in kinds if "router_logits" in kind), None)
        kind = getattr(found, "target_class", None)
        gates = {name: part for name, part in model.named_modules() if kind and isinstance(part, kind)}
        if not gates or not all(hasattr(gate, "num_experts") for gate in gates.values()):
            raise ModelError(
                f"{type(model).__name__} with config.{ROUTER_LOGITS} = True and routers of an unknown kind",
                rule="a loss on the load of a micro-batch depends on how batches are cut, so it is replaced",
                fix=f"set config.{ROUTER_LOGITS} = False",
            )
        return cls(model, gates, float(weight), axis)

    def refuse_written_out(self) -> None:
        """Raise ModelError: how many tokens an update has is known when it is handed over as a whole."""
        raise ModelError(
            f"engine(...) with gradients, of a model with config.{ROUTER_LOGITS} = True",
            rule="its balancing loss is a mean over the tokens of the whole update, which a written-out loop "
            "does not know before its first forward",
            fix=f"call engine.train_step(batch), or set config.{ROUTER_LOGITS} = False",
        )

    def begin(self, scale: float, num_tokens: float) -> None:
        """An update begins.

        Args:
            scale: gradient of what is minimised by the model's loss.
            num_tokens: of the whole update.
        """
        total = num_tokens * self.num_layers
        self.penalty_scale = scale * self.weight * self.num_experts / total if total else 0.0

    def end_update(self, tally: Tensor) -> None:
        """See `routing.Tallying`."""
        summed = tally.clone()
        self.tally.zero_()
        self.last = statistics_of(summed)
        if self.last is not None:
            self.load.copy_(summed[: self.num_experts])

    def _around_model(self, model: nn.Module) -> Callable[..., Any]:
        own = model.forward

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            mask = kwargs.get("attention_mask")
            self._mask = mask > 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None
            return own(*args, **{ROUTER_LOGITS: False} | kwargs)

        return forward

    def _around_gate(self, gate: nn.Module) -> Callable[..., Any]:
        own = gate.forward

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            scores, weights, experts = own(*args, **kwargs)
            if not torch.is_grad_enabled() or not gate.training:
                return scores, weights, experts
            chosen, counted = experts, scores
            if self._mask is not None:
                counts = self._counting(len(scores))
                chosen, counted = experts[counts], scores[counts]
            probabilities = counted.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
            everyone = torch.ones_like(chosen, dtype=torch.bool)
            penalties = self._penalties(probabilities, experts)
            told = self.weight * self.num_experts * penalties.detach()
            self.tally += tally_of(chosen, everyone, probabilities.detach(), told)
            return scores, with_penalty(weights, penalties, self), experts

        return forward  # type: ignore[no-any-return]

    def _counting(self, num_tokens: int) -> Tensor:
        """Which of a gate's tokens, those of all samples one after the other, are no padding."""
        assert self._mask is not None, "asked where there is one"
        length = self._mask.shape[1]
        is_part = num_tokens < self._mask.numel()
        start, stop = bounds(length, self._axis.num_ranks, self._axis.place) if is_part else (0, length)
        return self._mask[:, start:stop].flatten()

    def _penalties(self, probabilities: Tensor, experts: Tensor) -> Tensor:
        # Of the choices that a token has in a layer, as the model's own loss counts them.
        load = self.load.to(probabilities.dtype) * experts.shape[1] / self.load.sum().clamp_min(1)
        return probabilities @ load


def num_tokens_of(batch: Any) -> float:
    """Tokens of a Hugging Face batch that are no padding."""
    if not isinstance(batch, Mapping):
        return 0.0
    mask, tokens = batch.get("attention_mask"), batch.get("input_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return float((mask > 0).sum())
    return float(tokens.numel()) if isinstance(tokens, Tensor) else 0.0
