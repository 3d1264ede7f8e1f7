"""Rules of the tensor axis from the structure of a model: which linear layer feeds which.

Asked by `rules.py` where a model declares nothing. One forward of a small copy is watched: a layer whose
input comes from other layers alone may be cut by its inputs, and those by their outputs. Each such proposal
is tried, and kept where the cut model gives the numbers of the whole one; so what is proposed need not be
right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sixfold.parallel.tensor.cut import Rules
from sixfold.parallel.tensor.styles import HEAD_COUNTS, KEY_COUNTS, WIDTHS, dims_of
from sixfold.parallel.tensor.verify import Inputs, difference

SOURCE = "its structure"
MOST_FEEDERS = 4
_FIRST = ("colwise", "packed3_colwise", "packed_colwise")
_COUNTS: tuple[tuple[str, ...], ...] = ((), (*HEAD_COUNTS, *KEY_COUNTS), (*HEAD_COUNTS, *KEY_COUNTS, *WIDTHS))
"""Attributes that may have to count what a rank has: none, heads, or columns too."""


@dataclass
class Found:
    """What a structure allows.

    Args:
        styles, divided: see `Rules`.
        dropped: what was proposed and does not hold: (layers, why).
    """

    styles: dict[str, str] = field(default_factory=dict)
    divided: dict[str, tuple[str, ...]] = field(default_factory=dict)
    dropped: list[tuple[str, str]] = field(default_factory=list)

    def rules(self) -> Rules:
        """As rules."""
        return Rules(self.styles, self.divided, SOURCE)


def pattern_of(name: str) -> str:
    """A name with * for each number in it: alike for layers that stand for each other in repeated blocks."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def rules_from_structure(tiny: nn.Module, inputs: Inputs, num_ranks: int) -> Found:
    """The rules that hold for a small model.

    Args:
        inputs: keyword arguments of its forward.
    """
    found = Found()
    for second, firsts in _feeders(tiny, inputs).items():
        if any(name in found.styles for name in (second, *firsts)):
            continue
        _try_pair(tiny, inputs, num_ranks, second, firsts, found)
    if found.styles:
        for ends in _ends(tiny):
            trial = {**found.styles, **ends}
            why = difference(tiny, inputs, Rules(trial, found.divided, SOURCE), num_ranks)
            if why is None:
                found.styles = trial
            else:
                found.dropped.append((" + ".join(ends), why))
    # What came through the residual stream was proposed as well: a layer that is cut needs no second reason.
    found.dropped = [each for each in found.dropped if not set(each[0].split(" + ")) & set(found.styles)]
    return found


def _try_pair(
    tiny: nn.Module, inputs: Inputs, num_ranks: int, second: str, firsts: Sequence[str], found: Found
) -> None:
    why = first_why = ""
    for style in _FIRST if len(firsts) == 1 else _FIRST[:1]:
        pair = {**dict.fromkeys(firsts, style), second: "rowwise"}
        parents = {name.rpartition(".")[0] for name in firsts}
        tried: list[dict[str, tuple[str, ...]]] = []
        for counts in _COUNTS:
            divided = {parent: each for parent in parents if (each := _those_of(tiny, parent, counts))}
            if divided in tried:
                continue
            tried.append(divided)
            why = difference(tiny, inputs, Rules(pair, divided, SOURCE), num_ranks) or ""
            if not why:
                found.styles |= pair
                found.divided |= divided
                return
            first_why = first_why or why
    found.dropped.append((" + ".join((*firsts, second)), first_why))


def _those_of(tiny: nn.Module, pattern: str, counts: Sequence[str]) -> tuple[str, ...]:
    """Which of the attributes the modules of a pattern have."""
    modules = [part for name, part in tiny.named_modules() if pattern_of(name) == pattern]
    return tuple(name for name in counts if any(isinstance(vars(part).get(name), int) for part in modules))


def _ends(tiny: nn.Module) -> Iterator[dict[str, str]]:
    """The head and the embedding of a causal language model; together where their weight is one."""
    model: Any = tiny
    if getattr(getattr(model, "loss_function", None), "__name__", "") != "ForCausalLMLoss":
        return
    pairs = (("get_output_embeddings", "scores"), ("get_input_embeddings", "embedding_rowwise"))
    ends = {style: getattr(model, get)() for get, style in pairs if hasattr(model, get)}
    weights = {id(getattr(part, "weight", None)) for part in ends.values()}
    names = {id(part): name for name, part in tiny.named_modules()}
    found = {names[id(part)]: style for style, part in ends.items() if id(part) in names}
    yield from [found] if len(weights) == 1 else [{name: style} for name, style in found.items()]


def _feeders(tiny: nn.Module, inputs: Inputs) -> dict[str, tuple[str, ...]]:
    """Patterns of layers -> patterns of those that their inputs come from, where these are few."""
    made: dict[Any, str] = {}
    seen: list[tuple[str, Any]] = []
    handles = []
    for name, part in tiny.named_modules():
        if dims_of(part) is not None and not isinstance(part, nn.Embedding):
            handles.append(part.register_forward_hook(_noting(name, made, seen)))
    was_training = tiny.training
    tiny.eval()
    try:
        with torch.enable_grad():
            tiny(**inputs)
    finally:
        tiny.train(was_training)
        for handle in handles:
            handle.remove()
    pairs: dict[str, set[str]] = {}
    for name, node in seen:
        firsts = _walk(node, made)
        if firsts:
            pairs.setdefault(pattern_of(name), set()).update(pattern_of(first) for first in firsts)
    return {
        second: tuple(sorted(firsts, key=list(map(pattern_of, made.values())).index))
        for second, firsts in pairs.items()
        if len(firsts) <= MOST_FEEDERS and second not in firsts and _is_near(second, firsts)
    }


def _noting(name: str, made: dict[Any, str], seen: list[tuple[str, Any]]) -> Any:
    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            seen.append((name, args[0].grad_fn))
            if output.grad_fn is not None:
                made[output.grad_fn] = name

    return note


def _walk(node: Any, made: Mapping[Any, str]) -> set[str]:
    """Layers whose outputs a tensor is computed from, without other layers in between."""
    found: set[str] = set()
    passed, todo = set(), [node]
    while todo:
        each = todo.pop()
        if each is None or each in passed:
            continue
        passed.add(each)
        if each in made:
            found.add(made[each])
            continue
        todo += [before for before, _ in each.next_functions]
    return found


def _is_near(second: str, firsts: set[str]) -> bool:
    """Whether layers stand in one block: the first number in their names is counted by the same list, or
    none is."""
    return len({name.partition("*")[0] if "*" in name else "" for name in (second, *firsts)}) == 1
