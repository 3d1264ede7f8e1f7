"""Causal models of `transformers` as what a run trains: built from a folder or a config.json.

Called by `subject` where `model.hf` is set. It needs the extra `hf`, and never asks a network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from sixfold.base.errors import ConfigError, ModelError
from sixfold.config import Config


def build(config: Config, vocab_size: int) -> nn.Module:
    """The model, on the device of the moment.

    Raises:
        ConfigError: there is no model where `model.hf` points, or `transformers` is not installed.
        ModelError: it is too small for the vocabulary or for the length of samples.
    """
    path = config.model.hf
    assert path is not None, "asked before"
    path = path.expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            f"model.hf = {str(path)!r}: there is no file {file}",
            rule="model.hf is a folder with a config.json of a Hugging Face model, or such a file",
            fix="download the model first, for example: hf download ORGANISATION/NAME --local-dir FOLDER",
        )
    try:
        # Slow to load, and an extra.
        from transformers import AutoConfig, AutoModelForCausalLM

        causal: Any = AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError(
            f"model.hf = {str(path)!r}, and transformers is not installed",
            rule="Hugging Face models are built by transformers, which comes with the extra `hf`",
            fix="pip install 'sixfold[hf]'",
        ) from error
    try:
        described: Any = AutoConfig.from_pretrained(file, local_files_only=True)
        module: nn.Module = causal.from_config(described)
    except (ValueError, OSError, KeyError) as error:
        raise ConfigError(
            f"{file}: {str(error).partition(chr(10))[0]}",
            rule="the file describes a causal language model that the installed transformers knows",
            fix="upgrade transformers, or choose another model",
        ) from error
    _check_room(described, file, config, vocab_size)
    return module


def own_weights(path: Path) -> Path | None:
    """The folder itself where it holds weights."""
    folder = path.expanduser()
    return folder if folder.is_dir() and any(folder.glob("*.safetensors")) else None


def num_positions(described: Any) -> int | None:
    """How many tokens the model of a configuration reads at once; None where it has no limit."""
    text = described.get_text_config()
    limits = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((limit for limit in limits if limit is not None), None)


def _check_room(described: Any, file: Path, config: Config, vocab_size: int) -> None:
    entries, longest = described.get_text_config().vocab_size, num_positions(described)
    if entries < vocab_size:
        raise ModelError(
            f"{file} has a vocabulary of {entries}, the corpus one of {vocab_size}",
            rule="every token of the corpus has a row in the model's embedding",
            fix="set data.tokenizer to the model's own tokenizer, or data.vocab_size to that or less",
        )
    length = config.data.sequence_length
    if longest is not None and longest < length + 1:
        raise ModelError(
            f"{file} has {longest} positions; data.sequence_length = {length}",
            rule="a sample, and the token behind it, fit the model's positions",
            fix=f"set data.sequence_length = {longest - 1}",
        )
