"""What a run trains: which model, and how tokens become its inputs.

Used by the loop, by its evaluation and by `sixfold generate`. It starts nothing and reads no weights of a
run; an engine is made around the module elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from sixfold.base.plugins import load_plugin
from sixfold.config import Config
from sixfold.config.tree import ModelConfig
from sixfold.data.corpus import Corpus
from sixfold.data.stream import document_numbers, document_positions
from sixfold.models.attention import within_documents
from sixfold.models.chunks import Loss
from sixfold.models.decoder import Decoder, DecoderConfig, num_flops
from sixfold.models.moe import ExpertsConfig
from sixfold.train import adapters, hugging_face


def build_model(config: Config, vocab_size: int, device: str = "meta") -> nn.Module:
    """The model that the configuration describes; adapters, if any, on the CPU with their first numbers.

    Args:
        device: "meta" for one whose numbers come later, "cpu" for one that has some.

    Raises:
        ConfigError, ModelError, CheckpointError: it cannot be built so.
    """
    asked = config.model
    with torch.device(device):
        module = _decoder(config, vocab_size) if asked.hf is None else hugging_face.build(config, vocab_size)
    if adapters.is_asked(asked):
        adapters.adapt(module, asked, config.seed)
    return module


def weights_of(config: Config) -> Path | None:
    """Where a new run takes its weights from; None where they are drawn."""
    if config.model.weights is not None:
        return config.model.weights.expanduser()
    return hugging_face.own_weights(config.model.hf) if config.model.hf is not None else None


def _decoder(config: Config, vocab_size: int) -> Decoder:
    asked = config.model
    return Decoder(
        DecoderConfig.derive(
            vocab_size=vocab_size,
            context_length=config.data.sequence_length,
            width=asked.width,
            num_layers=asked.num_layers,
            num_heads=asked.num_heads,
            num_kv_heads=asked.num_kv_heads,
            ffn_width=asked.ffn_width,
            rope_base=asked.rope_base,
            tie_embeddings=asked.tie_embeddings,
            dropout=asked.dropout,
            experts=_experts(asked),
        )
    )


def _experts(asked: ModelConfig) -> ExpertsConfig | None:
    if asked.num_experts is None:
        return None
    given: dict[str, Any] = {
        "num_choices": asked.expert_choices,
        "num_shared": asked.shared_experts,
        "capacity_factor": asked.expert_capacity,
        "balance": asked.balance,
        "balance_rate": asked.balance_rate,
        "z_weight": asked.router_z,
    }
    return ExpertsConfig(asked.num_experts, **{key: each for key, each in given.items() if each is not None})


def fields_of(config: Config, corpus: Corpus, samples: npt.NDArray[np.int64]) -> dict[str, Any]:
    """What the model is given for samples [batch, length + 1] of tokens."""
    if config.model.hf is not None:
        # Its own loss leaves out the first label, so it predicts the same targets.
        tokens = torch.from_numpy(samples)
        fields = {"input_ids": tokens, "labels": tokens}
        if config.data.documents == "separate":
            fields["position_ids"] = torch.from_numpy(document_positions(samples, corpus.document_mark))
            documents = torch.from_numpy(document_numbers(samples, corpus.document_mark))
            # A mask of four dims is taken as it is, whatever kind of attention the model has.
            fields["attention_mask"] = torch.where(within_documents(documents), 0.0, float("-inf"))
        return fields
    fields = {"tokens": torch.from_numpy(samples)}
    if config.data.documents == "separate":
        fields["documents"] = torch.from_numpy(document_numbers(samples, corpus.document_mark))
    return fields


def loss_of(config: Config, module: nn.Module) -> Callable[[Any, Any], Any] | None:
    """Put the loss that `train.loss` names in the place of the model's own.

    Returns:
        What an engine needs to be told for it; None where the model computes it itself.
    """
    if config.train.loss is None:
        return None
    loss: Loss = load_plugin("loss", config.train.loss)
    if isinstance(module, Decoder):
        module.loss = loss
        return None

    def on_scores(output: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        targets = batch["labels"][:, 1:].flatten()
        return loss(output.logits[:, :-1].flatten(0, 1).float(), targets), targets.numel()

    return on_scores


def flops_per_token(module: nn.Module, length: int) -> float | None:
    """Operations per target, forward and backward; None where nobody counted them."""
    return num_flops(module.config, 1, length) / length if isinstance(module, Decoder) else None
