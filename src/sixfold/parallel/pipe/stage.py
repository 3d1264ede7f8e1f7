"""One stage of a model: its parts, run by the model's own forward.

Made by `cut.py`, run by the pipeline room. A stage is a view of the model: the same modules under the same
names, in containers of its own, with stand-ins for the parts that other stages run. Those before it give what
was received, whatever they are called with; the first one behind it ends the forward with what it is called
with. So no forward is rewritten, and none is understood. It sends nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from sixfold.base.errors import ModelError
from sixfold.parallel.blocks import own_forward

PARTS = "pipeline_parts"
"""Attribute by which a model may say itself what it runs in which order."""
_OWN_DICTS = tuple(
    name for name, value in vars(nn.Module()).items() if isinstance(value, dict) and name != "_buffers"
)
"""What a view has for itself: submodules, parameters and hooks."""


def children_of(module: nn.Module) -> dict[str, nn.Module]:
    """Children by name, also those that stand there twice."""
    children: Mapping[str, nn.Module | None] = vars(module)["_modules"]
    return {name: child for name, child in children.items() if child is not None}


@dataclass(frozen=True)
class Stage:
    """One stage of a model on this rank.

    Args:
        number: among all stages.
        module: what is called; the model itself where it is not cut.
        parameters: its own, by their first name in the model.
        border: where it takes up what the stage before sent; None at the first one.
        mirrors: containers of the view, each with the one of the model that it stands for.
        is_last: whether its output is the model's.
        order: sees that its blocks run as they are expected to.
    """

    number: int
    module: nn.Module
    parameters: Mapping[str, nn.Parameter]
    border: Border | None = None
    mirrors: Sequence[tuple[nn.Module, nn.Module]] = ()
    is_last: bool = True
    order: BlockOrder | None = None

    @classmethod
    def whole(cls, model: nn.Module) -> Stage:
        """A pipeline of one stage."""
        return cls(0, model, dict(model.named_parameters()))

    def __call__(self, received: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the stage.

        Args:
            received: the output of the stage before, None at the first one.
            args, kwargs: the model's own arguments.

        Returns:
            What the next stage takes up, or the model's output.
        """
        for mirror, original in self.mirrors:
            mirror.training = original.training
        if self.order is None:
            return self.module(*args, **kwargs)
        self.order.ran.clear()
        if self.border is not None:
            self.border.give(received)
        output = self.module(*args, **kwargs)
        if self.border is not None:
            self.border.check_taken(self.number)
        self.order.check(self.number)
        return output

    def remove(self) -> None:
        """Take the hooks off its blocks."""
        if self.order is not None:
            self.order.remove()


@dataclass
class Border:
    """Where a stage takes up what was received."""

    received: Any = None
    is_taken: bool = False

    def give(self, received: Any) -> None:
        """Let the parts before the stage return `received`."""
        self.received, self.is_taken = received, False

    def check_taken(self, stage: int) -> None:
        """Raise ModelError unless they did."""
        self.received = None
        if not self.is_taken:
            raise ModelError(
                f"stage {stage} ran without what stage {stage - 1} had sent",
                rule="the parts of a model run in the order of its pipeline plan",
                fix=f"name them in their order in model.{PARTS}, or set layout.pipe = 1",
            )


class BlockOrder:
    """Sees that each block of a stage runs once, in order, and returns a tensor.

    Args:
        blocks: those of the stage, in order.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.ran: list[int] = []
        """Places of the blocks that have run."""
        self._num_blocks = len(blocks)
        self._handles = [
            block.register_forward_hook(partial(self._note, place)) for place, block in enumerate(blocks)
        ]

    def _note(self, place: int, block: nn.Module, args: object, output: object) -> None:
        self.ran.append(place)
        if not isinstance(output, torch.Tensor):
            raise ModelError(
                f"layout.pipe with {type(block).__name__}, which returns a {type(output).__name__}",
                rule="blocks of a model that is cut into stages return one tensor each, because others stand "
                "in for them",
                fix="let the block return its hidden states alone, or set layout.pipe = 1",
            )

    def check(self, stage: int) -> None:
        """Raise ModelError unless all blocks have run in order."""
        if self.ran != list(range(self._num_blocks)):
            raise ModelError(
                f"stage {stage} ran its {self._num_blocks} block(s) in the order {self.ran}",
                rule="blocks of a model that is cut into stages run one after the other, each once",
                fix=f"name them in their order in model.{PARTS}, or set layout.pipe = 1",
            )

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


class _Left(Exception):
    """The forward has come to a part that the next stage runs."""

    def __init__(self, value: Any) -> None:
        super().__init__("the forward of a stage ends here")
        self.value = value


class Elsewhere(nn.Module):
    """Stands where a part was that another stage runs; other attributes are those of that part.

    Args:
        original: the part; not registered, so that its parameters are not this module's.
        border: what it returns comes from there; None ends the forward with its first argument.
        copies: by id, of parameters that the stage has a copy of.
    """

    def __init__(
        self, original: nn.Module, border: Border | None, copies: Mapping[int, nn.Parameter]
    ) -> None:
        super().__init__()
        for key, parameter in original.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in copies:
                self.register_parameter(key, copies[id(parameter)])
        self.__dict__["_border"] = border
        self.__dict__["_original"] = original  # last: from here on every attribute of it is found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._border is None:
            raise _Left(args[0] if args else next(iter(kwargs.values())))
        self._border.is_taken = True
        return self._border.received

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_original" not in self.__dict__:
                raise
            return getattr(self.__dict__["_original"], name)


def view_of(
    model: nn.Module, elsewhere: Mapping[str, Border | None], copies: Mapping[int, nn.Parameter]
) -> tuple[nn.Module, tuple[tuple[nn.Module, nn.Module], ...]]:
    """A view of `model` that runs one stage.

    Args:
        elsewhere: parts that other stages run, and where they lead; see `Elsewhere`.
        copies: by id, of parameters that the stage has a copy of.

    Returns:
        The view, and its containers with those that they stand for.
    """
    stand_ins = {
        name: Elsewhere(model.get_submodule(name), leads, copies) for name, leads in elsewhere.items()
    }
    view = _View(stand_ins, copies)
    module = view.of(model)
    _end_early(module, model)
    return module, tuple(view.mirrors)


@dataclass
class _View:
    """A view under construction.

    Args:
        parts: name -> what stands there instead.
        copies: id of a parameter -> the stage's own copy of it.
    """

    parts: Mapping[str, nn.Module]
    copies: Mapping[int, nn.Parameter]
    mirrors: list[tuple[nn.Module, nn.Module]] = field(default_factory=list)

    def of(self, module: nn.Module, name: str = "") -> nn.Module:
        """`module`, or where anything in it is replaced, a copy that shares the rest."""
        if name in self.parts:
            return self.parts[name]
        prefix = f"{name}." if name else ""
        children = children_of(module)
        seen = {key: self.of(child, prefix + key) for key, child in children.items()}
        changed = {key: child for key, child in seen.items() if child is not children[key]}
        own = {
            key: self.copies[id(parameter)]
            for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
            if id(parameter) in self.copies
        }
        if not changed and not own and name:
            return module
        mirror = copy.copy(module)
        for key in _OWN_DICTS:
            vars(mirror)[key] = vars(module)[key].copy()
        for key, part in {**changed, **own}.items():
            setattr(mirror, key, part)
        for key, method in vars(module).items():
            if (
                getattr(method, "__self__", None) is module
            ):  # given to the instance, such as a changed forward
                vars(mirror)[key] = MethodType(method.__func__, mirror)
        self.mirrors.append((mirror, module))
        return mirror


def _end_early(view: nn.Module, model: nn.Module) -> None:
    own = own_forward(model)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return own(self, *args, **kwargs)
        except _Left as left:
            return left.value

    view.forward = MethodType(forward, view)
