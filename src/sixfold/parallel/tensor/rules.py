"""Where the rules come from by which a model is cut over the tensor axis, and whether they hold.

Asked by `axis.py` and by `tests/architectures.py`: those of the user, those that the model declares
(`model.tensor_rules`, or the plan of a Hugging Face model), or else those that its structure allows. All but
`model.tensor_rules` are tried on a small copy first. It decides no pieces.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sixfold.base.errors import ConfigError, ModelError, SixfoldError
from sixfold.config import LayoutConfig
from sixfold.parallel.facts import block_names
from sixfold.parallel.tensor.cut import Rules
from sixfold.parallel.tensor.structure import pattern_of, rules_from_structure
from sixfold.parallel.tensor.styles import STACKED, STYLES
from sixfold.parallel.tensor.verify import difference
from sixfold.parallel.tiny import CannotTry, tiny_of

DECLARED = "tensor_rules"
"""Attribute of a model that says how it is cut: pattern -> style."""
USER = "layout.tensor_rules"
EXPERTS = "moe_tp_experts"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """What is known of a model.

    Args:
        rules: that hold, None where there are none.
        why: what was tried and does not hold, or why nothing was.
        fix: what helps where nothing could be tried.
        is_tried: whether a small copy that is cut has given the numbers of a whole one.
    """

    rules: Rules | None
    why: str = ""
    fix: str = ""
    is_tried: bool = False


_ANSWERS: dict[tuple[object, ...], Answer] = {}
"""For Hugging Face models, which their configuration and modules describe."""


def find_rules(model: nn.Module, layout: LayoutConfig) -> Rules:
    """The rules for `model`.

    Raises:
        ConfigError: a rule of the user's that cannot be read.
        ModelError: no way to cut it is known, with the reason.
    """
    answer = answer_for(model, layout)
    if answer.rules is not None:
        return answer.rules
    named = (
        'name what is cut, for example layout.tensor_rules = ["layers.*.fc1 = colwise", '
        f'"layers.*.fc2 = rowwise"], declare it in model.{DECLARED}'
    )
    raise ModelError(
        f"layout.tensor = {layout.tensor} with {type(model).__name__}: {answer.why}",
        rule="a cut that the model does not declare itself is tried on a small copy of it before the run, "
        "and gives the numbers of the whole model",
        fix=("leave layout.sequence_parallel unset, or " if layout.sequence_parallel else "")
        + f"{answer.fix or named}, or set layout.tensor = 1 and let those ranks share the data",
    )


def answer_for(model: nn.Module, layout: LayoutConfig) -> Answer:
    """What is known of `model`; of a Hugging Face one asked again, the same is answered at once."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        return _answer(model, layout)
    asked = (layout.tensor, layout.tensor_rules, layout.sequence_parallel, layout.blocks)
    key = (type(model), config.to_json_string(), frozenset(_kinds(model).items()), *asked)
    if key not in _ANSWERS:
        _ANSWERS[key] = _answer(model, layout)
    return _ANSWERS[key]


def _answer(model: nn.Module, layout: LayoutConfig) -> Answer:
    declared: Mapping[str, str] | None = getattr(model, DECLARED, None)
    plan: Any = getattr(model, "tp_plan", None)
    if layout.tensor_rules is not None:
        return _tried(
            model, Rules(dict(map(_parsed, layout.tensor_rules)), source=USER, is_exact=True), layout
        )
    if declared:
        return Answer(Rules(dict(declared), source=f"model.{DECLARED}", is_exact=True))
    planned = Answer(None)
    if isinstance(plan, Mapping) and plan:
        named = _with_head(model, plan)
        planned = _tried(model, Rules(named), layout)
        if planned.rules is None and EXPERTS in named.values():
            rest = {pattern: style for pattern, style in named.items() if style != EXPERTS}
            without = _tried(model, Rules(rest), layout)
            if without.rules is not None:
                _log.warning(
                    "layout.tensor: every rank has the experts of the %s whole, whose plan cuts them: %s",
                    *(type(model).__name__, planned.why),
                )
                return without
        if planned.rules is not None:
            return planned
    found = _from_structure(model, layout)
    if found.rules is None and planned.why:
        why = f"its own plan does not hold: {planned.why}; from its structure: {found.why}"
        return Answer(None, why, found.fix)
    return found


def _tried(model: nn.Module, rules: Rules, layout: LayoutConfig) -> Answer:
    try:
        tiny, inputs = tiny_of(model, layout.tensor if layout.sequence_parallel else 1)
        blocks = block_names(tiny, layout.blocks) if layout.sequence_parallel else ()
    except (CannotTry, SixfoldError) as error:
        if rules.source != USER and layout.sequence_parallel:
            return _untried(model, error)
        _log.warning(
            "layout.tensor: a %s is cut by %s without a trial: %s", type(model).__name__, rules.source, error
        )
        return Answer(rules, f"it cannot be tried: {error}")
    why = difference(tiny, inputs, rules, layout.tensor, blocks)
    if why is not None:
        return Answer(None, why)
    tried = _kinds(tiny)
    absent = [name for name, kinds in _kinds(model).items() if tried.get(name) != kinds]
    if absent:
        _log.warning(
            "layout.tensor: the small copy on which the cut was tried is built from the configuration of the "
            "%s, and is without %d of its modules, first %s",
            *(type(model).__name__, len(absent), absent[0]),
        )
    return Answer(rules, is_tried=True)


def _kinds(model: nn.Module) -> dict[str, frozenset[type]]:
    """Classes of modules by the pattern of their names."""
    found: dict[str, set[type]] = {}
    for name, part in model.named_modules():
        found.setdefault(pattern_of(name), set()).add(type(part))
    return {name: frozenset(kinds) for name, kinds in found.items()}


def _untried(model: nn.Module, error: Exception) -> Answer:
    inputs = "give model.dummy_inputs (keyword arguments of a forward), or "
    fix = f"declare model.{DECLARED}, which is not tried"
    given = hasattr(model, "dummy_inputs")
    return Answer(None, f"it cannot be tried: {error}", fix if given else inputs + fix)


def _from_structure(model: nn.Module, layout: LayoutConfig) -> Answer:
    try:
        tiny, inputs = tiny_of(model)
    except CannotTry as error:
        return _untried(model, error)
    try:
        found = rules_from_structure(tiny, inputs, layout.tensor)
    except Exception as error:  # of the model's own code, on inputs that were made up
        return Answer(None, f"its small copy does not run: {type(error).__name__}: {str(error)[:120]}")
    why = "; ".join(f"{names}: {reason}" for names, reason in found.dropped[:2])
    if not found.styles:
        return Answer(None, why or "no linear layer feeds another one alone")
    if not layout.sequence_parallel:
        return Answer(found.rules(), why, is_tried=True)
    return _tried(model, found.rules(), layout)


def _parsed(rule: str) -> tuple[str, str]:
    pattern, separator, style = (part.strip() for part in rule.partition("="))
    if not separator or not pattern or style not in {*STYLES, *STACKED}:
        raise ConfigError(
            f"layout.tensor_rules: {rule!r}",
            rule=f'a rule is "pattern = style", with one of {", ".join(dict.fromkeys((*STYLES, *STACKED)))}',
            fix='for example layout.tensor_rules = ["layers.*.fc1 = colwise", "layers.*.fc2 = rowwise"]',
        )
    return pattern, style


def _with_head(model: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """The plan of a Hugging Face model, with its head known for one: its scores stay cut where the loss
    allows it."""
    get: Any = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    names = {name for name, module in model.named_modules() if module is head}
    return {
        pattern: "scores" if pattern in names and style.startswith("colwise") else style
        for pattern, style in plan.items()
    }
