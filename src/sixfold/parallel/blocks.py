"""The training forward of repeated blocks: recompute and `torch.compile`, in the place of their own.

Called by `initialize` once weights stand. A block's instance gets another `forward`; whatever is hooked on
the module's call (gathers, the user's own hooks) stays outside of what is recomputed and compiled. It never
touches parameters, and `undo` leaves the module as it was handed over.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from types import MethodType
from typing import Any

import torch
from torch import nn

from sixfold.base.errors import ConfigError, ModelError
from sixfold.parallel.recompute import Forward, Recompute, recomputed


def blocks_to_change(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the blocks `names` that have a forward of several operations.

    A list inside a list has no forward; a single torch layer would be run twice and nothing saved.
    """
    return [name for name in names if has_operations(model.get_submodule(name))]


def has_operations(module: nn.Module) -> bool:
    """Whether it has a forward of several operations: no list of others, no single layer of torch."""
    is_layer = type(module).__module__.startswith("torch.nn.") and not any(True for _ in module.children())
    return type(module).forward is not nn.Module.forward and not is_layer


def change_forwards(
    model: nn.Module, names: Iterable[str], recompute: Recompute | None, backend: str | None
) -> Callable[[], None]:
    """Give the blocks `names` another forward for training; returns what puts their own back.

    Without gradients (evaluation, generation) their own forward runs.

    Args:
        recompute: what backward computes again; None: nothing.
        backend: of `torch.compile`; one compiled graph serves all blocks of a class. None: not compiled.
    """
    if recompute is None and backend is None:
        return lambda: None
    blocks = [model.get_submodule(name) for name in blocks_to_change(model, names)]
    made: dict[Forward, Forward] = {}
    undo = ExitStack()
    for block in blocks:
        own = own_forward(block)
        if own not in made:
            made[own] = _for_training(own, recompute, backend)
        undo.callback(put_forward(block, MethodType(made[own], block)))
    return undo.close


def put_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Give one instance another forward; returns what puts back the one that it had.

    Args:
        forward: takes what the module takes. A method bound to the module is bound to its copies
            (`copy.deepcopy`) by them.
    """
    given = vars(module).get("forward")
    module.forward = forward

    def undo() -> None:
        if given is None:
            del module.forward
        else:
            module.forward = given

    return undo


def own_forward(block: nn.Module) -> Forward:
    """The forward of an instance, as a function that takes the module too."""
    given = vars(block).get("forward")
    if given is None:
        return type(block).forward
    if getattr(given, "__self__", None) is block:
        function: Forward = given.__func__
        return function
    return lambda _self, *args, **kwargs: given(*args, **kwargs)


def _for_training(own: Forward, recompute: Recompute | None, backend: str | None) -> Forward:
    path = own if recompute is None else recomputed(own, recompute)
    if backend is not None:
        path = torch.compile(path, backend=backend)

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return own(self, *args, **kwargs)
        return path(
            self,
            *(_without_cache(value) for value in args),
            **{name: _without_cache(value) for name, value in kwargs.items()},
        )

    return forward


def _without_cache(value: Any) -> Any:
    """None for an empty cache of keys and values, which Hugging Face models make even for training.

    A second run would append to it again, and a compiled graph would be one of this layer alone.

    Raises:
        ModelError: the cache holds something.
    """
    kind = getattr(sys.modules.get("transformers"), "Cache", None)
    if kind is None or not isinstance(value, kind):
        return value
    if value.get_seq_length() > 0:
        raise ModelError(
            f"a cache of {value.get_seq_length()} keys and values in a forward with gradients",
            rule="blocks that are recomputed or compiled take no cache while they learn",
            fix="leave past_key_values out, or run that forward under torch.no_grad(), or leave "
            "layout.recompute and layout.compile unset",
        )
    return None


def check_blocks(model: nn.Module, names: Iterable[str], recompute: Recompute | None) -> None:
    """Raise ModelError where no block can be changed, or blocks would be recomputed twice."""
    if not blocks_to_change(model, names):
        raise ModelError(
            f"layout.recompute or layout.compile with a {type(model).__name__} that has no repeated blocks",
            rule="both work on blocks with a forward of several operations: those in layout.blocks, or else "
            "modules of one class in a ModuleList or Sequential",
            fix='name them, for example layout.blocks = ["encoder.layer.*"], or leave layout.recompute and '
            "layout.compile unset",
        )
    itself = any(getattr(part, "gradient_checkpointing", False) is True for part in model.modules())
    if recompute is not None and itself:
        raise ModelError(
            f'layout.recompute = "{recompute}" with a model whose gradient checkpointing is on',
            rule="both would recompute the same blocks, so one of them does",
            fix="call model.gradient_checkpointing_disable() before sixfold.initialize, or leave "
            "layout.recompute unset",
        )


def check_backend(backend: str, device: torch.device) -> None:
    """Compile one addition, so that a missing compiler is found before training.

    Raises:
        ConfigError: with what torch said.
    """
    try:
        torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(2, device=device))
    except Exception as error:
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        known = ", ".join(torch.compiler.list_backends())
        raise ConfigError(
            f'layout.compile = "{backend}", and torch.compile fails on this machine: {said}'[:400],
            rule="the backend is known to torch and can compile here",
            fix="install what is missing (on CPUs inductor needs a C++ compiler: apt-get install g++), "
            f"choose another of {known}, or leave layout.compile unset",
        ) from error
