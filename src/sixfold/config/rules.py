"""Rules between options: which exclude each other, and which combinations are illegal.

The resolver checks each of `RULES` once all layers are merged. A new rule is one more function: here, in
`model_rules` or in `layout_rules`. Rules between an option and the machine belong to the plan, not here.
"""

from __future__ import annotations

from pathlib import Path

from sixfold.config.layout_rules import LAYOUT_RULES
from sixfold.config.model_rules import DECODER_KEYS, MODEL_RULES
from sixfold.config.ruling import Rules, Verdict

PARTNERS = {
    "batch.global": "batch.tokens",
    "batch.tokens": "batch.global",
    "train.steps": "train.minutes",
    "train.minutes": "train.steps",
    "data.path": "data.sources",
    "data.sources": "data.path",
    "layout.balance": "layout.cost",
    "layout.cost": "layout.balance",
    "model.lora_rank": "model.lora_from",
    "model.lora_from": "model.lora_rank",
}
"""Two ways to say one thing: at most one of them is set."""

_OPTIMIZER_KEYS = {
    "adamw": ("betas", "eps"),
    "sgd": ("momentum",),
    "adagrad": ("eps",),
    "muon": ("betas", "eps", "momentum"),
}
_BITS = {"fp64": 64, "fp32": 32, "bf16": 16, "fp16": 16}

_TRAINING_RULES = Rules()
_rule = _TRAINING_RULES.rule


def displaced_by(path: str, value: object) -> list[str]:
    """What lower layers said that loses its meaning when a higher layer sets `path` to `value`."""
    if value is None:
        return []
    if path == "optimizer.name":
        return [f"optimizer.{key}" for key in _foreign_keys(str(value))]
    if path == "lr_schedule.name" and value == "constant":
        return ["lr_schedule.final_ratio"]
    if path == "model.hf":
        return [f"model.{key}" for key in DECODER_KEYS]
    if path == "data.tokenizer" and value != "bpe":
        return ["data.vocab_size"]
    return [PARTNERS[path]] if path in PARTNERS else []


def _foreign_keys(name: str) -> list[str]:
    special = dict.fromkeys(key for keys in _OPTIMIZER_KEYS.values() for key in keys)
    if name not in _OPTIMIZER_KEYS:  # what lower layers said was meant for another optimizer
        return [*special, "weight_decay"]
    return [key for key in special if key not in _OPTIMIZER_KEYS[name]]


@_rule("data.vocab_size", "data.tokenizer")
def _vocabulary_of_bpe(size: int | None, tokenizer: str | None) -> Verdict:
    if size is None or tokenizer in (None, "bpe"):
        return None
    return (
        "data.vocab_size bounds the vocabulary that is trained; another tokenizer has its own",
        'leave data.vocab_size unset, or set data.tokenizer = "bpe"',
    )


@_rule("data.weights", "data.sources", "data.path")
def _a_weight_for_each_source(
    weights: tuple[float, ...] | None, sources: tuple[str, ...] | None, path: Path | None
) -> Verdict:
    # A corpus that is built already knows how many sources it has; it is asked when it is opened.
    if weights is None or len(weights) == len(sources or ()) or (sources is None and path is not None):
        return None
    return (
        f"data.weights has one number for each of data.sources, which names {len(sources or ())}",
        "leave data.weights unset" if not sources else f"set data.weights = {[1.0] * len(sources)}",
    )


@_rule("batch.tokens", "data.sequence_length")
def _whole_samples(tokens: int | None, length: int) -> Verdict:
    if tokens is None or tokens % length == 0:
        return None
    works = max(1, round(tokens / length)) * length
    return "batch.tokens is a multiple of data.sequence_length", f"set batch.tokens = {works}"


@_rule("batch.micro", "batch.global")
def _micro(micro: int | None, samples: int | None) -> Verdict:
    if micro is None or samples is None or micro <= samples:
        return None
    return (
        "a micro-batch is a part of the global batch, so batch.micro <= batch.global",
        f"set batch.micro = {samples} or less, or leave it unset",
    )


@_rule("batch.micro", "batch.tokens", "data.sequence_length")
def _micro_of_tokens(micro: int | None, tokens: int | None, length: int) -> Verdict:
    if micro is None or tokens is None or tokens % length or micro <= tokens // length:
        return None
    return (
        f"a micro-batch is a part of the global batch, here {tokens // length} samples "
        f"(batch.tokens / data.sequence_length)",
        f"set batch.micro = {tokens // length} or less, or leave it unset",
    )


def _only_for(key: str) -> None:
    owners = [name for name, keys in _OPTIMIZER_KEYS.items() if key in keys]

    @_rule(f"optimizer.{key}", "optimizer.name")
    def check(value: object, name: str) -> Verdict:
        if value is None or name in owners or name not in _OPTIMIZER_KEYS:
            return None
        return (
            f"optimizer.{key} belongs to {' and '.join(owners)}; {name} has no such setting",
            f'leave optimizer.{key} unset, or set optimizer.name = "{owners[0]}"',
        )


for _key in ("betas", "eps", "momentum"):
    _only_for(_key)


@_rule("lr_schedule.name", "train.steps", "train.minutes")
def _schedule_needs_an_end(name: str, steps: int | None, minutes: float | None) -> Verdict:
    if name == "constant" or steps is not None or minutes is not None:
        return None
    return (
        f"a {name} schedule ends with the run, so the length of the run must be known",
        'set train.steps = 1000 (or train.minutes = 3), or lr_schedule.name = "constant"',
    )


@_rule("lr_schedule.final_ratio", "lr_schedule.name")
def _final_ratio(final_ratio: float, name: str) -> Verdict:
    if name != "constant" or final_ratio == 0.0:
        return None
    return (
        "a constant schedule has no end to descend to, so lr_schedule.final_ratio would do nothing",
        'leave lr_schedule.final_ratio unset, or set lr_schedule.name = "cosine"',
    )


def _whole_under_fp64(key: str) -> None:
    @_rule(f"precision.{key}", "precision.compute")
    def check(value: str | None, compute: str | None) -> Verdict:
        if compute != "fp64" or value in (None, "fp64"):
            return None
        return (
            f'under precision.compute = "fp64" every type is fp64; precision.{key} would throw digits away',
            f'leave precision.{key} unset, or set it to "fp64"',
        )


for _key in ("storage", "grad", "reduce", "master"):
    _whole_under_fp64(_key)


@_rule("precision.master", "precision.compute")
def _master(master: str | None, compute: str | None) -> Verdict:
    if master is None or compute in (None, "fp64") or _BITS[master] >= _BITS[compute]:
        return None
    return (
        "the weights that the optimizer updates are not narrower than those of forward and backward",
        f'leave precision.master unset, or set it to "{compute}"',
    )


def _belongs_to_fp16(key: str) -> None:
    @_rule(f"precision.{key}", "precision.compute", "precision.grad", "precision.reduce")
    def check(value: float | None, compute: str | None, grad: str | None, reduce: str | None) -> Verdict:
        # Unset, compute may be fp16 by the model's own type; the plan knows.
        if value is None or compute is None or "fp16" in (compute, grad, reduce):
            return None
        return (
            f"losses are scaled under fp16 alone; under {compute} precision.{key} would do nothing",
            f'leave precision.{key} unset, or set precision.compute = "fp16"',
        )


def _scale_is_found(key: str) -> None:
    @_rule(f"precision.{key}", "precision.loss_scale")
    def check(value: float | None, fixed: float | None) -> Verdict:
        if value is None or fixed is None:
            return None
        return (
            f"a loss scale is fixed (precision.loss_scale) or found while training (precision.{key})",
            "leave precision.loss_scale unset",
        )


for _key in ("loss_scale", "initial_scale", "growth_steps"):
    _belongs_to_fp16(_key)
for _key in ("initial_scale", "growth_steps"):
    _scale_is_found(_key)


RULES = (*MODEL_RULES, *_TRAINING_RULES, *LAYOUT_RULES)
"""All rules, in the order in which broken ones are told."""
