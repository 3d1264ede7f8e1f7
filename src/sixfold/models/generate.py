"""Continue texts with a causal model, greedily or by sampling, token after token as they come.

The command line uses it for `sixfold generate` and for the sample of a run. Keys and values of what was
read are kept, so a new token costs one position, not the whole context. It trains nothing.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from sixfold.models.attention import attend, rotary_tables
from sixfold.models.decoder import Block, Decoder
from sixfold.models.evaluation import evaluating


class Reader(Protocol):
    """A model that reads tokens and remembers them.

    Attributes:
        context_length: how many it can remember.
    """

    context_length: int

    @property
    def module(self) -> nn.Module:
        """What it reads with."""

    def start(self, tokens: Tensor, padding: Tensor) -> Tensor:
        """Forget everything and read tokens [batch, length], the first `padding` [batch] of each row not.

        Returns:
            Scores of what follows, [batch, vocab_size].
        """

    def read(self, tokens: Tensor) -> Tensor:
        """Read one more token of each row, [batch]; returns as `start`."""


def generate(
    reader: Reader,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Generator[Tensor, None, None]:
    """Continue each of `prompts`, which may differ in length, by `num_tokens`.

    When the context is full, the newer half of it is read again and the older one forgotten. The model is in
    evaluation mode meanwhile.

    Args:
        temperature: 0 takes the likeliest token, otherwise scores are divided by it and sampled from.
        top_k: sample among so many likeliest tokens alone; None for all.

    Yields:
        The next token of every prompt, [batch].
    """
    device = next(reader.module.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    tokens = torch.tensor(rows, device=device)
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    kept = min(longest, reader.context_length)
    with evaluating(reader.module), torch.no_grad():
        scores = reader.start(tokens[:, -kept:], (padding - (longest - kept)).clamp(min=0))
        for number in range(num_tokens):
            following = choose(scores.float(), temperature, top_k, generator)
            yield following
            tokens = torch.cat((tokens, following[:, None]), 1)
            if number + 1 == num_tokens:
                return
            if kept == reader.context_length:
                kept = max(1, kept // 2)
                gone = tokens.shape[1] - kept
                scores = reader.start(tokens[:, gone:], (padding - gone).clamp(min=0))
            else:
                kept += 1
                scores = reader.read(following)


def choose(
    scores: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """One token for each row of scores [batch, vocab_size], [batch]."""
    if temperature <= 0:
        return scores.argmax(-1)
    if top_k is not None and top_k < scores.shape[-1]:
        least = scores.topk(top_k, -1).values[:, -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    return torch.multinomial((scores / temperature).softmax(-1), 1, generator=generator)[:, 0]


class CachedDecoder:
    """Reads with a decoder; keeps the keys and values of every layer.

    Rotary positions count only by their differences, so rows that are padded on the left need no positions
    of their own: padding is never looked at.
    """

    def __init__(self, model: Decoder) -> None:
        self.module = model
        self.context_length = model.config.context_length

    def start(self, tokens: Tensor, padding: Tensor) -> Tensor:
        config, weight = self.module.config, self.module.model.embed_tokens.weight
        head_width = config.width // config.num_heads
        shape = (len(tokens), config.num_kv_heads, self.context_length, head_width)
        self._keys = [weight.new_empty(shape) for _ in range(config.num_layers)]
        self._values = [weight.new_empty(shape) for _ in range(config.num_layers)]
        self._tables = rotary_tables(self.context_length, head_width, config.rope_base, weight)
        self._padding, self._length = padding, 0
        return self._forward(tokens)

    def read(self, tokens: Tensor) -> Tensor:
        return self._forward(tokens[:, None])

    def _forward(self, tokens: Tensor) -> Tensor:
        begin, end = self._length, self._length + tokens.shape[1]
        cos, sin = (table[:, begin:end] for table in self._tables)
        allowed = self._allowed(begin, end)
        x = self.module.model.embed_tokens(tokens)
        for layer, keys, values in zip(self.module.model.layers, self._keys, self._values, strict=True):
            assert isinstance(layer, Block), "a decoder is made of blocks"
            attention = layer.self_attn
            query, keys[:, :, begin:end], values[:, :, begin:end] = attention.project(
                layer.input_layernorm(x), cos, sin
            )
            mixed = attend(query, keys[:, :, :end], values[:, :, :end], allowed)
            x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        self._length = end
        scores: Tensor = self.module.head(self.module.model.norm(x[:, -1:]))[:, 0]
        return scores

    def _allowed(self, begin: int, end: int) -> Tensor:
        queries = torch.arange(begin, end, device=self._padding.device)[:, None]
        keys = torch.arange(end, device=self._padding.device)[None]
        # Padding sees itself: a row of nothing would be nan, and spread.
        seen = (keys <= queries) & ((keys >= self._padding[:, None, None]) | (keys == queries))
        return seen[:, None]
