"""Before an update: the module is still made of what its units were made of, and old gradients go.

Made by `ModelState` and run by it at the beginning of each update. It exchanges nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from sixfold.base.errors import StateError
from sixfold.plan import Slot
from sixfold.state.unit import Unit


class Readiness:
    """A module and its units, looked at once an update.

    Args:
        units: of this rank.
        known: by `id`, all parameters of the module.
    """

    def __init__(self, module: nn.Module, units: Sequence[Unit], known: Collection[int]) -> None:
        self._module = module
        self._units = units
        self._gradients = [unit.gradients for unit in units if unit.gradients is not None]
        self._known = known

    def restore(self) -> None:
        """Let a new accumulation begin.

        Raises:
            StateError: a parameter was added, frozen, unfrozen, or moved out of its unit by the user. It
                would be trained past: its gradients would go nowhere.
        """
        strangers = []
        for name, parameter in self._module.named_parameters():
            if id(parameter) not in self._known:
                strangers.append(name)
        if strangers:
            raise _added(strangers)
        dropped = []
        for unit in self._units:
            if unit.presence.is_dropped:
                dropped.append(unit.presence)
                for parameter, kind in unit.presence.own:
                    parameter.__class__ = kind
        try:
            self._clear()
        finally:
            for presence in dropped:
                for parameter, kind in presence.absent:
                    parameter.__class__ = kind

    def _clear(self) -> None:
        for unit in self._units:
            trainable, size = unit.plan.trainable, unit.working.element_size()
            # Without numbers there is nothing that could have been replaced.
            start = None if unit.presence.is_dropped else unit.working.data_ptr()
            for slot, parameter in zip(unit.plan.slots, unit.parameters, strict=True):
                if parameter.requires_grad is not trainable:
                    raise _changed(slot, parameter)
                if start is not None and slot.numel and parameter.data_ptr() != start + slot.offset * size:
                    raise replaced(slot, parameter)
                if trainable:
                    parameter.grad = None
        for gradients in self._gradients:
            gradients.has_sum = False
            if gradients.local is not None or len(gradients.awaited) < len(gradients.plan.slots):
                gradients.reclaim()


def _added(names: Sequence[str]) -> StateError:
    return StateError(
        f"{len(names)} parameter(s) came into the module after initialize: {', '.join(names[:4])}",
        rule="what is trained is decided once, when units and optimizer are made",
        fix="change the module before sixfold.initialize, or initialize it anew",
    )


def _changed(slot: Slot, parameter: nn.Parameter) -> StateError:
    return StateError(
        f"{slot.name}.requires_grad became {parameter.requires_grad} after initialize",
        rule="what is trained is decided once, when units and optimizer are made",
        fix="set requires_grad before sixfold.initialize, or save, initialize anew and load",
    )


def replaced(slot: Slot, parameter: nn.Parameter) -> StateError:
    """The error for a parameter that is no view of its unit any more."""
    return StateError(
        f"{slot.name} no longer lies in its unit: its data was replaced after initialize "
        f"(now {parameter.dtype} on {parameter.device})",
        rule="parameters are views of the engine's buffers; type and device are set by the plan",
        fix="change values in place (parameter.copy_(...)), types with precision.compute, and "
        "devices with sixfold.initialize(device=...)",
    )
