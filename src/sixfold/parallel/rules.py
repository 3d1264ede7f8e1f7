"""Where the rules come from by which a model is cut over the tensor axis.

Asked by `tensor_axis.py`: those of the user, those that the model declares (`model.tensor_rules`, or the plan
of a Hugging Face model), or else those that its structure allows. It decides no pieces.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sixfold.base.errors import ConfigError, ModelError
from sixfold.config import LayoutConfig
from sixfold.parallel.styles import STYLES
from sixfold.parallel.tensor import Rules

DECLARED = "tensor_rules"
"""Attribute of a model that says how it is cut: pattern -> style."""


def find_rules(model: nn.Module, layout: LayoutConfig) -> Rules:
    """The rules for `model`.

    Raises:
        ConfigError: a rule of the user's that cannot be read.
        ModelError: no way to cut it is known, with the reason.
    """
    if layout.tensor_rules is not None:
        return Rules(dict(map(_parsed, layout.tensor_rules)), source="layout.tensor_rules")
    declared: Mapping[str, str] | None = getattr(model, DECLARED, None)
    if declared:
        return Rules(dict(declared))
    plan: Any = getattr(model, "tp_plan", None)
    if isinstance(plan, Mapping) and plan:
        return Rules(_with_head(model, plan))
    raise ModelError(
        f"layout.tensor = {layout.tensor} with {type(model).__name__}, which declares no way to be cut",
        rule="the tensor axis cuts models that say how, or whose structure says it",
        fix=f'name what is cut, for example layout.tensor_rules = ["layers.*.fc1 = colwise", '
        f'"layers.*.fc2 = rowwise"] or model.{DECLARED}, or set layout.tensor = 1',
    )


def _parsed(rule: str) -> tuple[str, str]:
    pattern, separator, style = (part.strip() for part in rule.partition("="))
    if not separator or not pattern or style not in STYLES:
        raise ConfigError(
            f"layout.tensor_rules: {rule!r}",
            rule=f'a rule is "pattern = style", with one of {", ".join(STYLES)}',
            fix='for example layout.tensor_rules = ["layers.*.fc1 = colwise", "layers.*.fc2 = rowwise"]',
        )
    return pattern, style


def _with_head(model: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """The plan of a Hugging Face model, with its head known for one: scores stay cut where the loss allows
    it."""
    get: Any = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    names = {name for name, module in model.named_modules() if module is head}
    return {
        pattern: "scores" if pattern in names and style.startswith("colwise") else style
        for pattern, style in plan.items()
    }
