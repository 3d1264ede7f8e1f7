"""The reference decoder: rotary positions, RMS norms, gated feed-forward, grouped-query attention.

`sixfold train` and the benchmarks build it; any other torch loop can. One forward pass returns the
pair (summed loss, number of targets), so that whoever divides a batch can normalise it once.
It never communicates, knows nothing of the rest of Sixfold, and holds no state besides its parameters, so
building it on the meta device and calling every `reset_parameters`, children first, is a full start.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sixfold.models.attention import attend, rotary_tables_at, rotate, within_documents
from sixfold.models.chunks import Loss, in_chunks, rows_at_once, summed_cross_entropy
from sixfold.models.layers import Embedding, FeedForward, Linear, RMSNorm
from sixfold.models.moe import ExpertsConfig, MixtureOfExperts, Router, telling

LOSS_ROWS = 256
"""Rows of logits that are upcast together: they fit the cache, a whole batch of them does not."""


TENSOR_RULES = {
    "model.embed_tokens": "embedding_rowwise",
    "model.layers.*.self_attn.q_proj": "colwise",
    "model.layers.*.self_attn.k_proj": "colwise",
    "model.layers.*.self_attn.v_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.mlp.gate_proj": "colwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
    "model.layers.*.mlp.shared_experts.gate_proj": "colwise",
    "model.layers.*.mlp.shared_experts.up_proj": "colwise",
    "model.layers.*.mlp.shared_experts.down_proj": "rowwise",
    "model.layers.*.mlp.experts": "moe_tp_experts",
    "model.layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "model.layers.*.mlp.experts.down_proj": "rowwise",
    "lm_head": "local_colwise",
    "head": "scores",
}
"""How several ranks share its layers: the styles of `parallel/tensor/styles.py`; "head" is the method."""


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder. `width / num_heads` is the size of one head and must be even.

    Raises:
        ValueError: when the sizes do not divide.
    """

    vocab_size: int
    context_length: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_width: int
    rope_base: float = 10_000.0
    tie_embeddings: bool = True
    dropout: float = 0.0
    experts: ExpertsConfig | None = None
    """In place of one feed-forward part several, each of `ffn_width`; see `models.moe`."""

    def __post_init__(self) -> None:
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width {self.width} must be a multiple of twice num_heads {self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} must divide num_heads {self.num_heads}")

    @property
    def ffn_rows(self) -> int:
        """Rows of `width` that a token is multiplied with in the feed-forward part of a block."""
        experts = self.experts
        if experts is None:
            return 3 * self.ffn_width
        return 3 * self.ffn_width * (experts.num_choices + experts.num_shared) + experts.num_experts

    @classmethod
    def derive(
        cls,
        *,
        width: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        ffn_width: int | None = None,
        **others: Any,
    ) -> DecoderConfig:
        """The config with what is left open decided: as many key heads as query heads, and a
        feed-forward of 8/3 of the width, rounded up to a multiple of 64."""
        return cls(
            width=width,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads or num_heads,
            ffn_width=ffn_width or -(-8 * width // (3 * 64)) * 64,
            **others,
        )


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_width = config.width // config.num_heads
        self.q_proj = Linear(config.width, config.num_heads * self.head_width)
        self.k_proj = Linear(config.width, config.num_kv_heads * self.head_width)
        self.v_proj = Linear(config.width, config.num_kv_heads * self.head_width)
        self.o_proj = Linear(config.num_heads * self.head_width, config.width)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of x [batch, length, width], each [batch, heads, length, head_width]."""

        def heads(projected: Tensor) -> Tensor:
            # Spelt out, because "-1" is ambiguous in an empty batch.
            num_heads = projected.shape[-1] // self.head_width
            return projected.view(*projected.shape[:2], num_heads, self.head_width).transpose(1, 2)

        query, key = (rotate(heads(proj(x)), cos, sin) for proj in (self.q_proj, self.k_proj))
        return query, key, heads(self.v_proj(x))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, allowed: Tensor | None = None) -> Tensor:
        mixed = attend(*self.project(x, cos, sin), allowed)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_layers, self.dropout = config.num_layers, config.dropout
        self.input_layernorm = RMSNorm(config.width)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width)
        self.mlp = self.feed_forward(config)
        self.reset_parameters()

    def feed_forward(self, config: DecoderConfig) -> FeedForward | MixtureOfExperts:
        """What stands between the second norm and the residual stream."""
        if config.experts is not None:
            return MixtureOfExperts(config.width, config.ffn_width, config.experts)
        return FeedForward(config.width, config.ffn_width)

    def reset_parameters(self) -> None:
        """Draw the two projections into the residual stream again, smaller: 2 * num_layers of them
        add up there, and the sum is to keep its scale."""
        self.self_attn.o_proj.draw(2 * self.num_layers)
        self.mlp.draw_output(2 * self.num_layers)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, allowed: Tensor | None = None) -> Tensor:
        branch = self.self_attn(self.input_layernorm(x), cos, sin, allowed)
        x = x + F.dropout(branch, self.dropout, self.training)
        branch = self.mlp(self.post_attention_layernorm(x))
        return x + F.dropout(branch, self.dropout, self.training)


class Backbone(nn.Module):
    """Tokens [batch, length] to hidden states [batch, length, width]."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width)

    def forward(
        self, inputs: Tensor, allowed: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        config = self.config
        x = self.embed_tokens(inputs)
        if positions is None:
            positions = torch.arange(inputs.shape[1], device=inputs.device)
        cos, sin = rotary_tables_at(positions, config.width // config.num_heads, config.rope_base, x)
        x = F.dropout(x, config.dropout, self.training)
        for layer in self.layers:
            x = layer(x, cos, sin, allowed)
        out: Tensor = self.norm(x)
        return out


class Decoder(nn.Module):
    """A causal language model; initialised on construction, or later from the meta device.

    Parameter names and the order of rotary pairs are those that the common open decoders use, so
    other libraries read its weights as they are. A tied head has no parameter of its own.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = None if config.tie_embeddings else Linear(config.width, config.vocab_size)
        self.loss: Loss = summed_cross_entropy
        self.loss_chunk: int | None = None
        """Tokens whose scores exist at once, 0 for all; None: as `models.chunks` decides by size."""
        head = "model.embed_tokens" if self.lm_head is None else "lm_head"
        self.pipeline_parts = ("model.embed_tokens", "model.layers", "model.norm", head)
        named = [name for name, _ in (*self.named_modules(), *self.named_parameters())]
        parts = {re.sub(r"\.\d+", ".*", name) for name in named} | {"head"}
        self.tensor_rules = {name: style for name, style in TENSOR_RULES.items() if name in parts}

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [batch, length, width] to scores of the next token [batch, length, vocab_size]."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(hidden, head.weight)

    def logits(
        self, inputs: Tensor, documents: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Tokens [batch, length] to the scores of the next token [batch, length, vocab_size]."""
        allowed = None if documents is None else within_documents(documents)
        return self.head(self.model(inputs, allowed, positions))

    def per_token(self, tokens: Tensor, documents: Tensor | None = None) -> dict[str, Tensor]:
        """What `forward` takes, with one entry a token in each field, [batch, length]: whoever cuts
        sequences cuts these."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        positions = torch.arange(inputs.shape[1], device=tokens.device).expand_as(inputs)
        fields = {"tokens": inputs, "targets": targets, "positions": positions}
        return fields if documents is None else {**fields, "documents": documents[:, :-1]}

    def forward(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens [batch, length + 1] to (summed loss, number of targets).

        The loss of a target is `self.loss`, cross-entropy in nats unless another one was put there. The sum
        is fp32 (fp64 for fp64), whatever the type of the parameters.

        Args:
            documents: the number of each token's document, [batch, length + 1]. Attention then stays within
                a document; the mark that opens the next one is its last target, the sign of its end.
            targets, positions: with them, all fields are [batch, length]; see `per_token`.
        """
        if targets is None:
            tokens, targets = tokens[:, :-1], tokens[:, 1:]
            documents = None if documents is None else documents[:, :-1]
        allowed = None if documents is None else within_documents(documents)
        hidden, targets = self.model(tokens, allowed, positions).flatten(0, 1), targets.flatten()
        loss = self._summed_loss(hidden, targets)
        if self.config.experts is not None:
            loss = telling(loss, [part for part in self.modules() if isinstance(part, Router)])
        return loss, torch.tensor(targets.numel(), device=tokens.device)

    def _summed_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        rows = rows_at_once(len(targets), self.config.vocab_size, self.loss_chunk)
        if self.loss is summed_cross_entropy:
            if rows < len(targets):
                return in_chunks(self.head, self.loss, hidden, targets, rows)
            return self.loss(self.head(hidden), targets)
        if rows < len(targets):
            return in_chunks(
                self.head, lambda rows, aims: self.loss(rows.to(wide), aims), hidden, targets, rows
            )
        num_pieces = max(1, -(-len(targets) // LOSS_ROWS))
        pieces = zip(self.head(hidden).chunk(num_pieces), targets.chunk(num_pieces), strict=True)
        return torch.stack([self.loss(rows.to(wide), aims) for rows, aims in pieces]).sum()


def num_flops(config: DecoderConfig, batch: int, length: int) -> int:
    """Operations in the matrix products of one forward and backward pass over [batch, length].

    A multiplication and its addition count as two, the backward pass as twice the forward pass.
    As is customary for utilisation figures, attention counts the whole square of positions,
    although a causal kernel may leave out half of it; recomputed work is not counted.
    """
    head_width = config.width // config.num_heads
    attention = 2 * config.width * (config.num_heads + config.num_kv_heads) * head_width
    block = attention + config.width * config.ffn_rows
    weights = config.num_layers * block + config.vocab_size * config.width
    scores_and_mix = config.num_layers * 2 * length * config.width
    return 6 * batch * length * (weights + scores_and_mix)
