"""Texts continued by the model of a run: while it trains, and afterwards from its newest checkpoint.

Called by the loop for its sample and by `sixfold generate`. It trains nothing and writes nothing.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sixfold.base.errors import CheckpointError
from sixfold.checkpoint import MODEL, Piece, open_checkpoint
from sixfold.checkpoint.weights import open_weights
from sixfold.config import load
from sixfold.config.resolved import CONFIG
from sixfold.data.tokenizer import Vocabulary
from sixfold.models.decoder import Decoder
from sixfold.models.generate import CachedDecoder, Reader, generate
from sixfold.parallel import DTYPES
from sixfold.train.folder import checkpoint_of
from sixfold.train.hugging_face import num_positions
from sixfold.train.subject import build_model, weights_of
from sixfold.train.vocabulary import vocabulary_of

_KEYS_AND_VALUES, _STATE = "past_key_values", "cache_params"
"""What models of `transformers` call their memory of what they have read."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 takes the likeliest, otherwise scores are divided by it and sampled from.
        top_k: sample among so many likeliest alone; None for all.
        seed: of the draws.
    """

    temperature: float = 0.7
    top_k: int | None = None
    seed: int = 0


def load_run(folder: Path, checkpoint: Path | None = None) -> tuple[nn.Module, Vocabulary]:
    """The model of a run in its compute type, and its vocabulary.

    Args:
        checkpoint: one of its checkpoints; None for the newest.

    Raises:
        CheckpointError: there is no run, no complete checkpoint in it, or not the one that was asked for.
    """
    newest = checkpoint_of(folder, checkpoint)
    vocabulary = vocabulary_of(folder)
    config = load(folder / CONFIG).config
    module = build_model(config, vocabulary.size, device="cpu")
    base = weights_of(config) if open_checkpoint(newest).manifest.only else None
    tensors = (_read(base) if base is not None else {}) | _read(newest)
    names = {name: id(each) for name, each in module.named_parameters(remove_duplicate=False)}
    there = {names[name] for name in tensors if name in names}
    missing = [n for n in module.state_dict() if n not in tensors and names.get(n) not in there]
    if missing:
        raise CheckpointError(
            f"{newest} and what the run started from lack {len(missing)} tensor(s), for example {missing[0]}",
            rule="the model of a run is what it started from, with what it trained in its place",
            fix="put back the folder of model.hf or model.weights as it was",
        )
    module.load_state_dict(tensors, strict=False, assign=True)
    tie: Any = getattr(module, "tie_weights", None)
    if tie is not None:
        tie()
    # Buffers keep their types, as in training: rotary frequencies lose too much in a narrow one.
    for parameter in module.parameters():
        parameter.data = parameter.data.to(DTYPES[config.precision.compute or "fp32"])
    return module.eval(), vocabulary


def _read(source: Path) -> dict[str, Tensor]:
    """Every tensor of the model part of a checkpoint, or of a folder of safetensors files."""
    weights = open_weights(source)
    tensors = {
        name: torch.empty(place.spec.shape, dtype=place.spec.dtype) for name, place in weights.places.items()
    }
    weights.fill(Piece(MODEL, name, 0, tensor) for name, tensor in tensors.items())
    return tensors


def continuations(
    module: nn.Module, vocabulary: Vocabulary, prompts: Sequence[str], num_tokens: int, how: Sampling
) -> Iterator[list[str]]:
    """Continue each prompt until its document ends, at most by `num_tokens`.

    Yields:
        What has come anew of each text, token by token; empty where a character is not whole yet, and once
        a text has ended.
    """
    ids = [[vocabulary.mark, *vocabulary.encode(prompt)] for prompt in prompts]
    generator = torch.Generator(next(module.parameters()).device).manual_seed(how.seed)
    writers = [_Writer(vocabulary) for _ in prompts]
    following = generate(
        reader_of(module),
        ids,
        num_tokens,
        temperature=how.temperature,
        top_k=how.top_k,
        generator=generator,
    )
    with closing(following):
        for tokens in following:
            yield [writer.add(token) for writer, token in zip(writers, tokens.tolist(), strict=True)]
            if all(writer.has_ended for writer in writers):
                return


def reader_of(module: nn.Module) -> Reader:
    """What reads tokens with a module, and remembers them."""
    return CachedDecoder(module) if isinstance(module, Decoder) else CachedTransformer(module)


class CachedTransformer:
    """Reads with a causal model of `transformers`, which keeps keys and values, or a state, itself.

    What does neither reads everything again for each token.
    """

    def __init__(self, module: nn.Module) -> None:
        # The class's own: an engine may have put another in its place.
        accepted = inspect.signature(type(module).forward).parameters
        self.module: Any = module
        self._takes_positions = "position_ids" in accepted
        self._cache_name = next((name for name in (_KEYS_AND_VALUES, _STATE) if name in accepted), None)
        self.context_length = num_positions(self.module.config) or sys.maxsize

    def start(self, tokens: Tensor, padding: Tensor) -> Tensor:
        self._tokens, self._padding, self._cache = tokens, padding, None
        return self._forward(tokens)

    def read(self, tokens: Tensor) -> Tensor:
        self._tokens = torch.cat((self._tokens, tokens[:, None]), 1)
        return self._forward(self._tokens if self._cache is None else tokens[:, None])

    def _forward(self, tokens: Tensor) -> Tensor:
        num_new = tokens.shape[1]
        places = torch.arange(self._tokens.shape[1], device=tokens.device) - self._padding[:, None]
        mask = (places >= 0).long()
        # Keys of what was read are looked at again; of a state, only what comes anew is let in.
        given: dict[str, Any] = {"attention_mask": mask[:, -num_new:] if self._cache_name == _STATE else mask}
        if self._takes_positions:
            given["position_ids"] = places.clamp(min=0)[:, -num_new:]
        if self._cache_name is not None:
            given |= {self._cache_name: self._cache, "use_cache": True}
        out = self.module(input_ids=tokens, **given)
        self._cache = getattr(out, self._cache_name) if self._cache_name is not None else None
        scores: Tensor = out.logits[:, -1]
        return scores


class _Writer:
    """Turns the tokens of one text into characters as soon as they are whole."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._before: list[int] = []
        self._pending: list[int] = []
        self.has_ended = False

    def add(self, token: int) -> str:
        self.has_ended |= token == self._vocabulary.mark
        if self.has_ended:
            return ""
        self._pending.append(token)
        # Some vocabularies write a token differently at the start of a text, so the one before comes along.
        known = self._vocabulary.decode(self._before)
        text = self._vocabulary.decode([*self._before, *self._pending])
        if text.endswith("\ufffd"):
            return ""
        self._before, self._pending = self._pending, []
        return text[len(known) :]
