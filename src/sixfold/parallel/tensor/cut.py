"""The tensor axis, decided: which piece of each parameter a rank has, and which layers cross the axis how.

Called by `axis.py` between facts and plan, on a model with or without weights, and by `verify.py` for a
tiny copy. It reads shapes and attributes only and changes nothing; forwards are changed by
`forwards.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import groupby
from math import gcd

from torch import nn

from sixfold.base.errors import ModelError, PlanError
from sixfold.parallel.tensor.crossing import bounds
from sixfold.parallel.tensor.styles import (
    GROUPS,
    HEAD_COUNTS,
    HEAD_WIDTHS,
    LEFT_WHOLE,
    SHARED,
    STACKED,
    STYLES,
    Share,
    Style,
    dim_of,
    dims_of,
)
from sixfold.plan.places import Place, Span

AXIS = "tensor"


@dataclass(frozen=True)
class Rules:
    """How a model is cut over the tensor axis.

    Args:
        styles: pattern of module names, * for a number, -> name of a style.
        divided: pattern of module names -> attributes that count what a rank has a part of.
        source: where they come from, for messages.
        is_exact: whether they are written for this very model, so that each fits something in it.
    """

    styles: Mapping[str, str]
    divided: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    source: str = "the model's own plan"
    is_exact: bool = False


@dataclass(frozen=True)
class Layer:
    """One module that is cut.

    Args:
        name: of the module; for a head that is a method of the model, of that.
        size: outputs (of a "rowwise" layer inputs) of the whole.
        spans: those that this rank has.
        heads: of keys or values this rank goes on with; None: no such choice.
        head_width: outputs that make a head.
        stacks: of experts, by parameter the dim that is cut and the spans of it.
        known_by: the parameter and the dim of it that have the size of `spans` where the layer is cut.
    """

    name: str
    style: Style
    size: int
    spans: tuple[Span, ...]
    heads: tuple[int, ...] | None = None
    head_width: int = 1
    stacks: Mapping[str, tuple[int, tuple[Span, ...]]] = field(default_factory=dict)
    known_by: tuple[str, int] = ("weight", 0)


@dataclass(frozen=True)
class TensorCut:
    """What the tensor axis makes of a model on one rank.

    Args:
        layers: modules whose forward crosses the axis.
        places: by first name of parameter; those without one are whole, with the whole gradient.
        attributes: (module, attribute, value) that differ on this rank.
        num_ranks: along the axis.
        source: where the rules come from.
    """

    layers: tuple[Layer, ...]
    places: Mapping[str, Place]
    attributes: tuple[tuple[str, str, int], ...]
    num_ranks: int
    source: str


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))


def _fits(pattern: str, name: str) -> bool:
    return _compiled(pattern).fullmatch(name) is not None


def matching(model: nn.Module, pattern: str) -> list[str]:
    """Names of the modules that a pattern fits; * stands for one part of a name."""
    return [name for name, _ in model.named_modules() if _fits(pattern, name)]


def decide_tensor(model: nn.Module, rules: Rules, num_ranks: int, place: int) -> TensorCut:
    """Decide the pieces of the rank at `place`.

    Raises:
        ModelError: a rule fits nothing, or a module that has no such style.
        PlanError: heads do not divide.
    """
    cutting = _Cutting(model, rules, num_ranks, place)
    styles = cutting.styles()
    layers = [layer for name, style in styles.items() for layer in cutting.layers(name, style, styles)]
    if not any(layer.spans for layer in layers):
        raise cutting.refused("its rules fit no layer of it", "something is cut over the tensor axis")
    return TensorCut(
        tuple(layers), cutting.places(layers), tuple(cutting.attributes(layers)), num_ranks, rules.source
    )


def in_lists(blocks: Sequence[str]) -> list[list[str]]:
    """Names of blocks, those of each list by themselves: layers of an encoder, then those of a decoder."""
    return [list(names) for _, names in groupby(blocks, lambda name: name.rpartition(".")[0])]


def in_sequence(cut: TensorCut, model: nn.Module, blocks: Sequence[str]) -> TensorCut:
    """The cut where each rank keeps its part of the sequence alone between `blocks`: what is whole in them
    works on a part, so its gradient is a summand."""
    places = dict(cut.places)
    for name, parameter in model.named_parameters():
        if any(name.startswith(block + ".") for block in blocks):
            places.setdefault(name, Place(tuple(parameter.shape), partial=(AXIS,)))
    return replace(cut, places=places)


@dataclass
class _Cutting:
    model: nn.Module
    rules: Rules
    num_ranks: int
    rank: int

    def styles(self) -> dict[str, Style]:
        """Module (or method) name -> style; a later rule has the last word."""
        found: dict[str, Style] = {}
        for pattern, style in self.rules.styles.items():
            if style in LEFT_WHOLE or (style in STACKED and self._is_of_parameters(pattern)):
                continue
            if style not in STYLES:
                raise self.refused(f"{pattern!r} has the style {style!r}", f"styles are {', '.join(STYLES)}")
            names = matching(self.model, pattern)
            if not names and style == "scores" and callable(getattr(self.model, pattern, None)):
                names = [pattern]
            if not names and self.rules.is_exact:
                raise self.refused(f"{pattern!r} fits no module", "rules name modules of the model")
            found |= dict.fromkeys(names, STYLES[style])
        return found

    def layers(self, name: str, style: Style, styles: Mapping[str, Style]) -> Iterator[Layer]:
        if not isinstance(_part(self.model, name), nn.Module):
            yield Layer(name, style, 0, ())
            return
        module = self.model.get_submodule(name)
        if style.role == "experts":
            yield from self._experts(name, module, style)
            return
        dims = dims_of(module)
        share = style.shares["weight"]
        if share == "partial":
            yield Layer(name, style, 0, ())
            return
        if dims is None:
            raise self.refused(
                f"{name} is a {type(module).__name__}", "only linear layers and embeddings are cut"
            )
        for option, rule in _WHOLE_ONLY.items() if style.role == "vocabulary" else ():
            if getattr(module, option, None) not in (None, False):
                raise self.refused(f"{name} has {option} = {getattr(module, option)}", rule)
        size = _weight(module).shape[dims[share]]
        width, most = self._head_width(name, size // style.parts), self._most_heads(name, styles)
        count = size // style.parts // width
        is_projection = style.role == "linear" and width > 1 and most > 0
        if is_projection and most % self.num_ranks:
            raise self._uneven(most)
        if is_projection and count % self.num_ranks and style.entering is not None and style.parts == 1:
            yield self._shared(name, size, width, count, most)
            return
        low, high = (each * width for each in bounds(count, self.num_ranks, self.rank))
        spans = _in_each_part((low, high), size, style.parts)
        yield Layer(name, style, size, spans, head_width=width, known_by=("weight", dims[share]))

    def _is_of_parameters(self, pattern: str) -> bool:
        return any(_fits(pattern, name) for name, _ in self.model.named_parameters())

    def _experts(self, name: str, module: nn.Module, style: Style) -> Iterator[Layer]:
        """Experts whose inner width is divided, if there is a rule for each of their parameters."""
        stacks: dict[str, tuple[int, tuple[Span, ...]]] = {}
        for key, parameter in module.named_parameters():
            styles = [each for pattern, each in self.rules.styles.items() if _fits(pattern, f"{name}.{key}")]
            if parameter.dim() != 3 or not styles or styles[-1] not in STACKED:
                return
            dim, parts = STACKED[styles[-1]]
            size = parameter.shape[dim]
            if size // parts < self.num_ranks:
                raise self.refused(
                    f"{name}.{key} is {size // parts} wide", "each rank has a part of the width of experts"
                )
            part = bounds(size // parts, self.num_ranks, self.rank)
            stacks[key] = dim, _in_each_part(part, size, parts)
        if stacks:
            first, (dim, spans) = next(iter(stacks.items()))
            yield Layer(name, style, 0, spans, stacks=stacks, known_by=(first, dim))

    def _shared(self, name: str, size: int, width: int, count: int, most: int) -> Layer:
        """Fewer heads of keys and values than ranks: each takes those that its query heads need."""
        wanted = [query * count // most for query in range(*bounds(most, self.num_ranks, self.rank))]
        once = sorted(set(wanted))
        is_even = len({wanted.count(head) for head in once}) == 1
        heads = tuple(once if is_even else wanted)
        return Layer(name, SHARED, size, (), heads, width)

    def _head_width(self, name: str, size: int) -> int:
        """Columns that stay together: those of a head, in an attention module."""
        parent = self.model.get_submodule(name.rpartition(".")[0])
        for attribute in HEAD_WIDTHS:
            width = getattr(parent, attribute, None)
            if isinstance(width, int) and width > 0 and size % width == 0:
                return width
        for attribute in HEAD_COUNTS:
            count = getattr(parent, attribute, None)
            if isinstance(count, int) and count > 0 and size % count == 0:
                return size // count
        return 1

    def _most_heads(self, name: str, styles: Mapping[str, Style]) -> int:
        """Query heads of the attention module that a projection belongs to."""
        parent_name = name.rpartition(".")[0]
        parent = self.model.get_submodule(parent_name)
        counts = []
        for child_name, child in parent.named_children():
            style, dims = styles.get(f"{parent_name}.{child_name}"), dims_of(child)
            if style is None or dims is None or style.entering is None or style.shares["weight"] != "out":
                continue
            run = _weight(child).shape[dims["out"]] // style.parts
            width = self._head_width(f"{parent_name}.{child_name}", run)
            counts += [run // width] if width > 1 else []
        return max(counts, default=0)

    def places(self, layers: list[Layer]) -> dict[str, Place]:
        first = {parameter: name for name, parameter in self.model.named_parameters()}
        found: dict[str, Place] = {}
        for layer in layers:
            module = _part(self.model, layer.name)
            if not isinstance(module, nn.Module):
                continue
            for key, (dim, spans) in layer.stacks.items():
                parameter = module.get_parameter(key)
                found[first[parameter]] = _cut_in(tuple(parameter.shape), dim, spans)
            for key, parameter in module.named_parameters() if not layer.stacks else ():
                share: Share | None = layer.style.shares.get(key)
                if share is None and layer.style.shares["weight"] == "partial":
                    share = "partial"
                if share is None:
                    raise self.refused(f"{layer.name}.{key} is a parameter of a layer that is cut", _KNOWN)
                made = self._place(layer, share, dim_of(share, key, module), tuple(parameter.shape))
                name = first[parameter]
                if made is not None and found.setdefault(name, made) != made:
                    raise self.refused(
                        f"{layer.name}.{key} is {name}, cut otherwise", "a tied weight is cut once"
                    )
        return found

    def _place(self, layer: Layer, share: Share, dim: int | None, shape: tuple[int, ...]) -> Place | None:
        if share == "whole":
            return None
        if dim is None:
            return Place(shape, partial=(AXIS,))
        return _cut_in(shape, dim, layer.spans)

    def attributes(self, layers: list[Layer]) -> Iterator[tuple[str, str, int]]:
        for pattern, names in self.rules.divided.items():
            for name in matching(self.model, pattern):
                for attribute in names:
                    value = getattr(self.model.get_submodule(name), attribute, None)
                    if isinstance(value, int) and value % self.num_ranks == 0:
                        yield name, attribute, value // self.num_ranks
        seen = set()
        for layer in layers:
            parent_name = layer.name.rpartition(".")[0]
            if layer.heads is None or parent_name in seen:
                continue
            seen.add(parent_name)
            parent = self.model.get_submodule(parent_name)
            for attribute in GROUPS:
                groups = getattr(parent, attribute, None)
                if isinstance(groups, int):
                    heads = groups * layer.size // layer.head_width // self.num_ranks
                    yield parent_name, attribute, heads // len(layer.heads)

    @property
    def _kind(self) -> str:
        return type(self.model).__name__

    def _uneven(self, heads: int) -> PlanError:
        counts = [self._most_heads(name, self.styles()) for name in self.styles() if "." in name]
        shared = gcd(*(count for count in counts if count))
        legal = [degree for degree in range(1, shared + 1) if shared % degree == 0]
        return PlanError(
            f"layout.tensor = {self.num_ranks} with {self._kind}, whose attention has {heads} heads",
            rule="heads are divided over the tensor axis, each on one rank",
            fix=f"set layout.tensor to one of {', '.join(map(str, legal))}",
        )

    def refused(self, given: str, rule: str) -> ModelError:
        """The error for a model that cannot be cut so."""
        return ModelError(
            f"layout.tensor = {self.num_ranks} with {self._kind}: {given} ({self.rules.source})",
            rule=rule,
            fix='name what is cut, for example layout.tensor_rules = ["layers.*.fc1 = colwise", '
            '"layers.*.fc2 = rowwise"], or set layout.tensor = 1',
        )


def _weight(module: nn.Module) -> nn.Parameter:
    return module.get_parameter("weight")


def _in_each_part(span: Span, size: int, parts: int) -> tuple[Span, ...]:
    """A span of each of the equal parts that `size` indices are packed from."""
    run, (low, high) = size // parts, span
    return tuple((part * run + low, part * run + high) for part in range(parts))


def _cut_in(shape: tuple[int, ...], dim: int, spans: tuple[Span, ...]) -> Place:
    cut = dim % len(shape)
    return Place(shape, tuple(spans if each == cut else () for each in range(len(shape))), (AXIS,))


_WHOLE_ONLY = {
    "max_norm": "an embedding that is cut leaves its rows as they are",
    "scale_grad_by_freq": "a rank that has some entries counts no others",
    "sparse": "gradients of an embedding that is cut are dense",
}
"""Options of an embedding that it cannot have where it is cut, and why."""


_KNOWN = "weight and bias of linear layers are known, and low-rank adapters beside them"


def _part(model: nn.Module, name: str) -> object:
    """A module by its name, or else a method of the model."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return getattr(model, name)
