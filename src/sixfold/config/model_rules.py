"""Rules between the options of the model: its sizes, its experts, adapters beside it.

`rules` has them in its table, before the others. What a size has to do with the machine is decided elsewhere.
"""

from __future__ import annotations

from pathlib import Path

from sixfold.config.ruling import Rules, Verdict, divisor_below
from sixfold.config.tree import ModelConfig

DECODER_KEYS = (
    "width",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "ffn_width",
    "rope_base",
    "tie_embeddings",
    "dropout",
    "num_experts",
)
"""Sizes of the reference decoder, which another model brings along."""

EXPERT_KEYS = ("expert_choices", "shared_experts", "expert_capacity", "balance", "router_z")
"""How tokens are shared out over the experts of the reference decoder."""

MODEL_RULES = Rules()
_rule = MODEL_RULES.rule


@_rule("model.width", "model.num_heads")
def _heads(width: int, num_heads: int) -> Verdict:
    step = 2 * num_heads
    if width % step == 0:
        return None
    works = max(1, round(width / step)) * step
    return (
        f"model.width is an even multiple of model.num_heads (rotary positions turn pairs); "
        f"{width} / {num_heads} = {width / num_heads:g}",
        f"set model.width = {works}",
    )


@_rule("model.num_heads", "model.num_kv_heads")
def _kv_heads(num_heads: int, num_kv_heads: int | None) -> Verdict:
    if num_kv_heads is None or num_heads % num_kv_heads == 0:
        return None
    works = divisor_below(num_heads, num_kv_heads)
    return "model.num_kv_heads divides model.num_heads", f"set model.num_kv_heads = {works}"


_NEEDED = {
    **dict.fromkeys(("lora_alpha", "lora_targets"), ("lora_rank", "8")),
    **dict.fromkeys(EXPERT_KEYS, ("num_experts", "8")),
    "balance_rate": ("balance", '"bias"'),
}
"""Settings of the model that say more of another one, and a value of that."""


def _says_more(key: str, other: str, value: str) -> None:
    @_rule(f"model.{key}", f"model.{other}")
    def check(more: object, first: object) -> Verdict:
        if more is None or first is not None:
            return None
        return (
            f"model.{key} says more of model.{other}, which is unset",
            f"leave model.{key} unset, or set model.{other} = {value}",
        )


for _key, (_other, _value) in _NEEDED.items():
    _says_more(_key, _other, _value)


@_rule("model.expert_choices", "model.num_experts")
def _choices(choices: int | None, num_experts: int | None) -> Verdict:
    if num_experts is None or (choices or 2) <= num_experts:
        return None
    return (
        f"a token chooses {choices or 2} experts, and there are {num_experts}",
        f"set model.expert_choices = {num_experts}",
    )


@_rule("model.expert_capacity", "layout.context", "layout.sequence_parallel")
def _capacity_sees_samples(capacity: float | None, context: int, sequence_parallel: bool) -> Verdict:
    if capacity is None or (context == 1 and not sequence_parallel):
        return None
    option = "layout.context" if context > 1 else "layout.sequence_parallel"
    return (
        f"model.expert_capacity counts the tokens of one sample, of which no rank has all under {option}",
        f"leave model.expert_capacity unset, or {option}",
    )


@_rule("model.hf", *(f"model.{key}" for key in DECODER_KEYS))
def _sizes_of_the_decoder(other: Path | None, *sizes: object) -> Verdict:
    defaults = {key: ModelConfig.model_fields[key].default for key in DECODER_KEYS}
    given = [key for key, size in zip(DECODER_KEYS, sizes, strict=True) if size != defaults[key]]
    if other is None or not given:
        return None
    names = ", ".join(f"model.{key}" for key in given)
    return (
        f"{names} {'is a size' if len(given) == 1 else 'are sizes'} of the reference decoder; the model of "
        "model.hf has its own",
        f"leave {names} unset, or model.hf",
    )
