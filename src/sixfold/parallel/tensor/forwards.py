"""The tensor axis, applied: forwards of layers that are cut, with their crossings around them.

Called by `axis.py` after `cut.py` has decided, and by `verify.py` on a tiny copy. Instances get another
`forward`; parameters stay the objects they are, and hold this rank's pieces by the time a forward runs.
`remove` leaves the module as it was handed over.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from sixfold.base.errors import ModelError
from sixfold.mesh import Branch
from sixfold.models.chunks import check_entries
from sixfold.parallel.blocks import own_forward, put_forward
from sixfold.parallel.change import Remove
from sixfold.parallel.tensor.crossing import (
    CLOSED,
    COPIED,
    GATHERED,
    IN_SEQUENCE,
    OPENED,
    PARTED,
    SUMMED,
    Axis,
    Crossing,
    cross,
)
from sixfold.parallel.tensor.cut import Layer, TensorCut
from sixfold.parallel.tensor.heads import Head
from sixfold.parallel.tensor.styles import OUTPUTS, dims_of
from sixfold.parallel.tensor.vocabulary import entries_here

Own = Callable[..., Any]
Run = Sequence[str]
SEQUENCE = 1
"""The dim of activations [batch, sequence, width] that sequence parallelism cuts."""


class TensorForwards:
    """The changed forwards of one model.

    Args:
        cut: what was decided for this rank.
        axis: the ranks of the tensor axis.
        runs: names of blocks that follow each other on one rank; in them each rank keeps its part of the
            sequence alone.
        owns_loss: whether the model computes its loss by itself, so that nobody else reads its scores.
        device: where random numbers are drawn besides the CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        cut: TensorCut,
        axis: Axis,
        runs: Sequence[Run] = (),
        *,
        owns_loss: bool = True,
        device: str | torch.device = "cpu",
    ) -> None:
        # What a rank drops of its columns, and between blocks of its part of the sequence, is its own.
        self._columns, self._rows = (Branch(axis.place, torch.device(device)) for _ in range(2))
        self._model = model
        self._axis = axis
        self._cut = cut
        self._runs = runs
        self._blocks = {name for run in runs for name in run}
        self._crossed: list[dict[tuple[int, Crossing], tuple[Tensor, Tensor]]] = []
        self._undo: list[Remove] = []
        self._head = Head.find(model, cut, axis)
        for layer in cut.layers:
            self._change(layer)
        if self._head is not None:
            self._undo += self._head.attach(owns_loss)
        for name in sorted(self._parents()):
            self._wrap(name, self._parent(name))
        for run in runs:
            self._wrap(run[0], self._first)
            self._wrap(run[-1], self._last)

    def remove(self) -> None:
        """Give modules their own forwards again."""
        while self._undo:
            self._undo.pop()()

    def _wrap(self, name: str, make: Callable[[Own], Own]) -> None:
        module, is_cut = self._model.get_submodule(name), self._probe(name)
        own = own_forward(module)
        changed = make(own)

        @functools.wraps(own)
        def forward(self_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (changed if is_cut() else own)(self_, *args, **kwargs)

        self._undo.append(put_forward(module, MethodType(forward, module)))

    def _probe(self, name: str) -> Callable[[], bool]:
        """Whether a module has pieces at the moment. While somebody reads or edits the whole model it has
        whole parameters, and runs as it did uncut."""
        layers = [each for each in self._cut.layers if each.spans]
        run = next((run for run in self._runs if name in run), ())

        def distance(layer: Layer) -> int:
            if _is_beside(layer.name, name):
                return 0
            return 1 if any(layer.name.startswith(block + ".") for block in run) else 2

        first = min(layers, key=distance)
        layer, (key, dim) = self._model.get_submodule(first.name), first.known_by
        size = sum(stop - start for start, stop in first.spans)

        def is_cut() -> bool:
            return bool(layer.get_parameter(key).shape[dim] == size)

        return is_cut

    # Layers.

    def _change(self, layer: Layer) -> None:
        role = layer.style.role
        if role == "none" or (role == "scores" and self._head is not None and self._head.is_method):
            return
        make = {"vocabulary": self._embedding, "experts": self._experts}.get(role, self._linear)
        self._wrap(layer.name, make(layer))

    def _linear(self, layer: Layer) -> Callable[[Own], Own]:
        style, is_row = layer.style, layer.style.shares["weight"] == "in"
        entering, leaving = style.entering, style.leaving
        outputs = sum(stop - start for start, stop in layer.spans)
        counts = dict.fromkeys(OUTPUTS, outputs) if style.shares["weight"] == "out" else {}
        parent, inputs = layer.name.rpartition(".")[0], outputs
        if not is_row:
            inputs = _inputs_of(self._model.get_submodule(layer.name))
        if self._is_inside(layer.name):
            opened = entering == COPIED and self._opens(parent)
            entering, leaving = (
                crossing and IN_SEQUENCE.get(crossing, crossing)
                for crossing in (None if opened else entering, leaving)
            )

        def make(own: Own) -> Own:
            def take(x: Tensor) -> Tensor:
                x = self._enter(x, entering)
                if x.shape[-1] != inputs:
                    raise self._misfit(layer, x.shape[-1], inputs)
                return x

            def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                args, kwargs = _with_first(args, kwargs, take)
                if is_row and module.bias is not None:
                    with _without_bias(module) as bias:
                        y = own(module, *args, **kwargs)
                    return self._leave(module, y, leaving, layer.size) + bias
                with _put(module, {name: count for name, count in counts.items() if hasattr(module, name)}):
                    y = own(module, *args, **kwargs)
                if layer.heads is not None:
                    y = _heads_of(y, layer.heads, layer.head_width)
                if style.role == "scores" and self._head is not None:
                    return self._head.leave(y)
                return self._leave(module, y, leaving, layer.size)

            return forward

        return make

    def _misfit(self, layer: Layer, given: int, wanted: int) -> ModelError:
        what = "its part of the columns" if layer.style.shares["weight"] == "in" else "all columns"
        return ModelError(
            f"{layer.name} takes {what} on each rank of the tensor axis, {wanted}, and is given {given}",
            rule='a layer that gives its columns cut ("colwise") feeds one that takes them cut ("rowwise"), '
            "and nothing else does",
            fix=f"change the rules of {layer.name} or of what feeds it, for example to "
            '"colwise_gather_output" or "rowwise_split_input", or set layout.tensor = 1',
        )

    def _embedding(self, layer: Layer) -> Callable[[Own], Own]:
        ((start, stop),) = layer.spans

        def make(own: Own) -> Own:
            def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                ids = next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
                check_entries(ids, layer.size, f"ids of {layer.name}")
                is_here, places = entries_here(ids, (start, stop), layer.size)
                padding: Any = module.padding_idx
                local = padding - start if padding is not None and start <= padding < stop else None
                with _put(module, {"padding_idx": local}):
                    args, kwargs = _with_first(args, kwargs, lambda _ids: places)
                    rows = own(module, *args, **kwargs)
                return self._leave(module, rows.masked_fill(~is_here[..., None], 0), SUMMED, 0)

            return forward

        return make

    def _experts(self, layer: Layer) -> Callable[[Own], Own]:
        """Every rank has a part of each expert's width. What is said of tokens crosses with them; between
        blocks each has its part of the tokens, which experts take one by one, in any order."""
        is_inside = self._is_inside(layer.name)
        entering, leaving = (OPENED, CLOSED) if is_inside else (COPIED, SUMMED)

        def enter(given: Any) -> Any:
            if not isinstance(given, Tensor) or not (is_inside or given.is_floating_point()):
                return given
            return cross(given, entering, self._axis, 0)

        def make(own: Own) -> Own:
            def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                named = {name: enter(given) for name, given in kwargs.items()}
                return cross(own(module, *map(enter, args), **named), leaving, self._axis, 0)

            return forward

        return make

    def _enter(self, x: Tensor, crossing: Crossing | None) -> Tensor:
        """`x` beyond the border of a layer; what several layers of a module are given crosses once."""
        if crossing is None:
            return x
        dim = _sequence_dim(x) if crossing == OPENED else -1
        if not self._crossed:
            return cross(x, crossing, self._axis, dim)
        known, key = self._crossed[-1], (id(x), crossing)
        # Kept with what it was made from, so that the number of no other tensor can be the same.
        if key not in known:
            known[key] = x, cross(x, crossing, self._axis, dim)
        return known[key][1]

    def _leave(self, module: nn.Module, y: Tensor, crossing: Crossing | None, total: int) -> Tensor:
        if crossing is None:
            if module.training:
                self._columns.enter()
            return y
        if crossing in (SUMMED, CLOSED):
            self._columns.leave()
        if crossing == CLOSED:
            self._check_length(y.shape[_sequence_dim(y)])
            return cross(y, crossing, self._axis, _sequence_dim(y))
        return cross(y, crossing, self._axis, -1, total or None)

    # Around modules that hold layers, and around the blocks.

    def _is_inside(self, name: str) -> bool:
        return any(name.startswith(block + ".") for block in self._blocks)

    def _opens(self, parent: str) -> bool:
        """Whether a module gathers the sequence for all layers in it, which see its whole length."""
        return parent not in self._blocks and self._is_inside(parent)

    def _parents(self) -> set[str]:
        entered = [
            layer.name.rpartition(".")[0] for layer in self._cut.layers if layer.style.entering == COPIED
        ]
        return {name for name in (*entered, *(name for name, _, _ in self._cut.attributes)) if name}

    def _parent(self, name: str) -> Callable[[Own], Own]:
        opens = self._opens(name)
        attributes = {attribute: value for of, attribute, value in self._cut.attributes if of == name}

        def make(own: Own) -> Own:
            def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                self._crossed.append({})
                try:
                    if opens:
                        args, kwargs = _with_first(args, kwargs, self._open)
                    with _put(module, attributes):
                        return own(module, *args, **kwargs)
                finally:
                    self._crossed.pop()

            return forward

        return make

    def _open(self, x: Tensor) -> Tensor:
        return cross(x, OPENED, self._axis, _sequence_dim(x))

    def _first(self, own: Own) -> Own:
        def part(x: Tensor) -> Tensor:
            self._check_length(x.shape[SEQUENCE])
            return cross(x, PARTED, self._axis, SEQUENCE)

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = _with_first(args, kwargs, part)
            if module.training:
                self._rows.enter()
            return own(module, *args, **kwargs)

        return forward

    def _last(self, own: Own) -> Own:
        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output = own(module, *args, **kwargs)
            self._rows.leave()
            if isinstance(output, Tensor):
                return cross(output, GATHERED, self._axis, SEQUENCE)
            return (cross(output[0], GATHERED, self._axis, SEQUENCE), *output[1:])

        return forward

    def _check_length(self, length: int) -> None:
        if length % self._axis.num_ranks:
            raise ModelError(
                f"sequences of {length} with layout.sequence_parallel on {self._axis.num_ranks} tensor ranks",
                rule="each rank keeps an equal part of the sequence between blocks",
                fix=f"pad sequences to a multiple of {self._axis.num_ranks}, or leave "
                "layout.sequence_parallel unset",
            )


def _inputs_of(module: nn.Module) -> int:
    dims = dims_of(module)
    assert dims is not None, "only layers with dims are cut"
    return int(module.get_parameter("weight").shape[dims["in"]])


def _sequence_dim(x: Tensor) -> int:
    """The dim of activations that is cut between blocks. Where a block has put the tokens of all samples in a
    row, [tokens, width], to work on them one by one, it is that one: their order does not matter there."""
    return SEQUENCE if x.dim() > 2 else 0


def _heads_of(y: Tensor, heads: Sequence[int], width: int) -> Tensor:
    """Some heads of keys or values [..., all heads * width]."""
    split = y.view(*y.shape[:-1], -1, width)
    return torch.stack([split[..., head, :] for head in heads], -2).flatten(-2)


def _is_beside(layer: str, name: str) -> bool:
    """Whether a layer is the module `name`, lies in it, or beside it."""
    parent = name.rpartition(".")[0]
    return layer == name or layer.startswith(name + ".") or layer.rpartition(".")[0] == parent


@contextmanager
def _put(module: nn.Module, attributes: Mapping[str, Any]) -> Iterator[None]:
    """Inside, attributes have the values that fit this rank's pieces."""
    before = {name: getattr(module, name) for name in attributes}
    for name, value in attributes.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


@contextmanager
def _without_bias(module: nn.Module) -> Iterator[Tensor]:
    """Inside, the layer adds zeros for its bias, which is added once, to the sum."""
    bias = module._parameters["bias"]
    assert bias is not None, "asked for only where there is one"
    vars(module)["_parameters"]["bias"] = torch.zeros_like(bias, requires_grad=False)
    try:
        yield bias
    finally:
        module._parameters["bias"] = bias


def _with_first(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with the first tensor, which is the stream of activations, changed."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return args, {**kwargs, name: change(kwargs[name])}
