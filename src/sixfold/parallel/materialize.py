"""Give a module that stands on the meta device its storage and its initial weights.

Called by the engine before state exists. Every module is initialised by its own rule, under a
generator keyed by (seed, module name), on whole shapes and on the CPU: the same weights for every rank
count, layout and device. One rank draws, since all take over its numbers; the others' memory stays
untouched, which on a CPU means that it is never taken. Tensors whose numbers come from a file afterwards
take no memory anywhere. A model that comes with weights is never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from sixfold.base.errors import ModelError
from sixfold.mesh import Mesh, Streams


def materialize(module: nn.Module, seed: int, mesh: Mesh, given: Collection[str] = ()) -> None:
    """Allocate `module` on the CPU and, on rank 0, initialise it by its own rules.

    Plain modules need `reset_parameters`; children go before parents, since parents may rewrite
    what their children drew. Models with `initialize_weights` (Hugging Face) bring their rules in
    `_init_weights`. Ties hold afterwards as they did before.

    Args:
        given: parameters and buffers whose numbers come later, by all of their names. A module that holds
            nothing else does not draw, and its parameters take no memory.

    Raises:
        ModelError: a tensor was left without an initial value; all of them are named. On every rank.
    """
    failure: Exception | None = None
    try:
        _materialize(module, Streams(seed, torch.device("cpu")), given, draws=mesh.rank == 0)
    except Exception as error:  # also out of the model's own rules
        failure = error
    told = mesh.share_text(str(failure) if failure is not None else "")
    if failure is not None:
        raise failure
    if told:
        raise ModelError(
            f"rank 0 could not initialise {type(module).__name__}: {told}",
            rule="rank 0 draws the initial weights and all ranks take them over",
            fix="see the error of rank 0",
        )


def _materialize(module: nn.Module, streams: Streams, given: Collection[str], *, draws: bool) -> None:
    ties = _ties(module)
    # What has storage already keeps its numbers, whatever a rule makes of them.
    kept = {name: tensor.detach().clone() for name, tensor in _tensors(module).items() if not tensor.is_meta}
    settled = {name for name, part in module.named_modules() if _is_settled(name, part, given)}
    for name, part in module.named_modules():
        _allocate(part, streams.device, is_settled=name in settled)
    _tie_again(module, ties)
    if not draws:
        return
    unset = _Unset(module, {*given, *kept})
    if _method(module, "initialize_weights"):
        _by_model_rules(module, streams, settled)
    else:
        _by_module_rules(module, streams, settled)
    _put_back(module, kept)
    unset.refuse()


def _allocate(part: nn.Module, device: torch.device, *, is_settled: bool) -> None:
    """Storage for what a module holds itself and has none."""
    for key, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
        if parameter.is_meta:
            shown = torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)
            memory = shown if is_settled else torch.empty_like(parameter, device=device)
            setattr(part, key, nn.Parameter(memory, parameter.requires_grad))
    for key, buffer in part.named_buffers(recurse=False, remove_duplicate=False):
        if buffer.is_meta:
            setattr(part, key, torch.empty_like(buffer, device=device))


def _is_settled(name: str, part: nn.Module, given: Collection[str]) -> bool:
    """Whether all that a module holds itself is given. Of one that only holds others, whose rule may draw
    theirs anew: whether all of theirs is, but for what has numbers already."""
    own = _named(part, recurse=False)
    held = own or _named(part, recurse=True)
    names = {key: f"{name}.{key}" if name else key for key in held}
    found = [names[key] in given for key in held]
    return any(found) and all(
        is_given or (not own and not tensor.is_meta)
        for is_given, tensor in zip(found, held.values(), strict=True)
    )


def _named(part: nn.Module, *, recurse: bool) -> dict[str, torch.Tensor]:
    return {
        **dict(part.named_parameters(recurse=recurse, remove_duplicate=False)),
        **dict(part.named_buffers(recurse=recurse, remove_duplicate=False)),
    }


def _put_back(module: nn.Module, kept: Mapping[str, torch.Tensor]) -> None:
    current = _tensors(module)
    with torch.no_grad():
        for name, numbers in kept.items():
            current[name].copy_(numbers)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _by_module_rules(module: nn.Module, streams: Streams, settled: Collection[str]) -> None:
    for name, part in _children_first(module):
        if name in settled:
            continue
        # torch's own attention and transformer hide theirs behind an underscore.
        reset = _method(part, "reset_parameters") or _method(part, "_reset_parameters")
        if reset is not None:
            with streams.keyed("init", name):
                reset()


def _by_model_rules(module: nn.Module, streams: Streams, settled: Collection[str]) -> None:
    tie, initialize = _method(module, "tie_weights"), _method(module, "initialize_weights")
    assert initialize is not None, "chosen because it has this rule"
    if tie is not None:
        tie()
    names = {part: name for name, part in module.named_modules()}

    def keyed(rule: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
        def apply(part: nn.Module) -> None:
            if names[part] in settled:
                return
            with streams.keyed("init", names[part]):
                rule(part)

        return apply

    wrapped: list[Any] = [part for part in module.modules() if callable(getattr(part, "_init_weights", None))]
    for part in wrapped:
        part._init_weights = keyed(part._init_weights)
    try:
        initialize()
    finally:
        for part in wrapped:
            del part._init_weights


def _method(module: nn.Module, name: str) -> Callable[[], None] | None:
    found = getattr(module, name, None)
    return found if callable(found) else None


def _children_first(module: nn.Module, name: str = "") -> Iterable[tuple[str, nn.Module]]:
    for child_name, child in module.named_children():
        yield from _children_first(child, f"{name}.{child_name}" if name else child_name)
    yield name, module


def _ties(module: nn.Module) -> list[list[str]]:
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _tie_again(module: nn.Module, ties: list[list[str]]) -> None:
    for first, *others in ties:
        shared = module.get_parameter(first)
        for other in others:
            owner, _, attribute = other.rpartition(".")
            setattr(module.get_submodule(owner), attribute, shared)


class _Unset:
    """Marks every tensor before initialisation and names those that still carry the mark after.

    `to_empty` leaves whatever the memory held; a tensor that no rule writes would train on garbage.
    """

    def __init__(self, module: nn.Module, settled: Collection[str]) -> None:
        self._tensors = [
            (name, tensor)
            for name, tensor in _tensors(module).items()
            if tensor.numel() and tensor.dtype != torch.bool and name not in settled
        ]
        with torch.no_grad():
            for _, tensor in self._tensors:
                tensor.fill_(_mark(tensor))
        self._module = module

    def refuse(self) -> None:
        current = _tensors(self._module)
        left = [name for name, _ in self._tensors if _is_marked(current.get(name))]
        if left:
            raise ModelError(
                f"{len(left)} tensor(s) of {type(self._module).__name__} on the meta device have no "
                f"initial value: {', '.join(left[:8])}{', ...' if len(left) > 8 else ''}",
                rule="a module on meta is initialised by the reset_parameters of each of its parts",
                fix="give the owning module a reset_parameters() that writes them, or build the model "
                "on the CPU with its weights",
            )


def _mark(tensor: torch.Tensor) -> float | int:
    return (
        float("nan") if tensor.is_floating_point() or tensor.is_complex() else torch.iinfo(tensor.dtype).max
    )


def _is_marked(tensor: torch.Tensor | None) -> bool:
    if tensor is None:
        return False
    if tensor.is_floating_point() or tensor.is_complex():
        return bool(tensor.isnan().any())
    # Whole numbers have no value that cannot occur, so only a tensor full of the mark counts.
    return bool((tensor == _mark(tensor)).all())
