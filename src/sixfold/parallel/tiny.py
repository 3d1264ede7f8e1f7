"""A small copy of a model, and inputs for it: what a cut is tried on before the model itself is cut.

Asked for rules of the tensor axis and for the loss of causal models. Of a Hugging Face model another one is
built from its configuration, with few layers and, where it is large, narrow ones; any other model is copied
as it is, if that is not large. Weights are drawn, and moved off any special values, so that no mistake hides
behind zeros. The model itself is only looked at.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sixfold.parallel.facts import ROUTER_LOGITS

LARGE = 2_000_000
"""Parameters up to which a model is tried as it is."""
TOO_LARGE = 40_000_000
"""And from which on a copy is not worth its time."""
BATCH, LENGTH = 2, 8

_LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"),
    *("num_decoder_layers", "encoder_num_layers", "decoder_num_layers"),
)
_WIDTHS = (
    *("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "d_ff"),
    *("ffn_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size"),
)
_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads", "n_heads")
HEAD, FEW_LAYERS, WIDTH, ENTRIES = 16, 2, 96, 96


class CannotTry(Exception):
    """Why there is no small copy of a model."""


def tiny_of(model: nn.Module, multiple: int = 1) -> tuple[nn.Module, dict[str, Any]]:
    """(copy, keyword arguments of its forward).

    Args:
        multiple: of it are the lengths of sequences, where they are made up here.

    Raises:
        CannotTry: with the reason.
    """
    config = getattr(model, "config", None)
    own: Any = getattr(model, "dummy_inputs", None)
    if hasattr(config, "to_diff_dict") and hasattr(model, "main_input_name"):
        made = _built(model, config)
        return made, inputs_of(made, multiple)
    if not isinstance(own, Mapping):
        raise CannotTry("model.dummy_inputs, keyword arguments for a forward to try it with, is missing")
    if _numel(model) > LARGE or any(each.is_meta for each in model.parameters()):
        raise CannotTry(f"{_numel(model):,} parameters, or such on meta, are not copied")
    return _moved(copy.deepcopy(model).cpu().float()), dict(own)


def _built(model: nn.Module, config: Any) -> nn.Module:
    kind: Callable[[Any], nn.Module] = type(model)
    # By its configuration alone, so that ranks whose parameters are cut already find the same.
    shrinks = {_same: LARGE, _narrow: TOO_LARGE, _shallow: TOO_LARGE}
    reason = "no smaller configuration of it can be built"
    for shrink, most in shrinks.items():
        small = copy.deepcopy(config)
        for each in _parts(small):
            shrink(each)
            if hasattr(each, ROUTER_LOGITS):  # of whose loss `expert/balance.py` makes another one
                setattr(each, ROUTER_LOGITS, False)
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                size = _numel(kind(small))
            if size > most:
                reason = f"its smallest copy has {size:,} parameters"
                continue
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                return _moved(kind(small).float())
        except Exception as error:
            reason = f"a smaller one cannot be built: {type(error).__name__}: {str(error)[:100]}"
    raise CannotTry(reason)


def _numel(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _parts(config: Any) -> Iterator[Any]:
    """A configuration and those inside it."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_diff_dict"):
            yield from _parts(value)


def _same(config: Any) -> None:
    return None


def _shallow(config: Any) -> None:
    for name in _LAYERS:
        count = getattr(config, name, None)
        if isinstance(count, int) and count > FEW_LAYERS:
            setattr(config, name, FEW_LAYERS)
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list):
        config.layer_types = kinds[:FEW_LAYERS]
    if isinstance(getattr(config, "vocab_size", None), int):
        config.vocab_size = min(config.vocab_size, ENTRIES)
        for name, value in list(vars(config).items()):
            if name.endswith("_token_id") and isinstance(value, int) and value >= config.vocab_size:
                setattr(config, name, 0)


def _narrow(config: Any) -> None:
    _shallow(config)
    counts = (getattr(config, name, None) for name in _HEADS)
    heads = next((count for count in counts if isinstance(count, int)), 0)
    for name in _HIDDEN:
        if heads and isinstance(getattr(config, name, None), int):
            setattr(config, name, heads * HEAD)
    if isinstance(getattr(config, "head_dim", None), int):
        config.head_dim = HEAD
    for name in _WIDTHS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, WIDTH)


def _moved(model: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype))
    return model


def inputs_of(model: Any, multiple: int = 1) -> dict[str, Any]:
    """Keyword arguments for a Hugging Face model, by what it says it takes.

    Args:
        multiple: see `tiny_of`.

    Raises:
        CannotTry: it takes something else.
    """
    config, draw = model.config, torch.Generator().manual_seed(1)
    make = _INPUTS.get(model.main_input_name)
    if make is None:
        raise CannotTry(f"it takes {model.main_input_name}")
    length = -(-LENGTH // multiple) * multiple
    given = {model.main_input_name: make(config, draw, length)}
    if getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = _ids(config, draw, length)
    function = getattr(model, "loss_function", None)
    is_causal = getattr(function, "__name__", "") == "ForCausalLMLoss" and type(model).__name__.endswith(
        ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    )
    if is_causal:
        given["labels"] = _ids(config, draw, length)
    return given


def _ids(config: Any, draw: torch.Generator, length: int) -> Tensor:
    text = config.get_text_config()
    return torch.randint(3, min(text.vocab_size, ENTRIES), (BATCH, length), generator=draw)


def _pixels(config: Any, draw: torch.Generator, length: int) -> Tensor:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 32) or 32
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.randn(BATCH, getattr(vision, "num_channels", 3), height, width, generator=draw)


def _sound(config: Any, draw: torch.Generator, length: int) -> Tensor:
    return torch.randn(BATCH, 1600, generator=draw)


def _features(config: Any, draw: torch.Generator, length: int) -> Tensor:
    num_frames = 2 * getattr(config, "max_source_positions", 16)
    return torch.randn(BATCH, getattr(config, "num_mel_bins", 80), num_frames, generator=draw)


_INPUTS: dict[str, Callable[[Any, torch.Generator, int], Tensor]] = {
    "input_ids": _ids,
    "pixel_values": _pixels,
    "input_values": _sound,
    "input_features": _features,
}
