"""What users write into working parameters, and how it comes into the state.

Made by `ModelState`. Parameters that are whole may be edited at any time; `lent` makes all of them whole for
a while, to be read and edited. It makes no edits of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from sixfold.base.errors import StateError
from sixfold.mesh import Mesh
from sixfold.parallel import share_buffers
from sixfold.state.foreign import Foreign
from sixfold.state.gathering import Gathering
from sixfold.state.readiness import replaced
from sixfold.state.unit import Unit

SEARCHED_UPDATES = 4
"""Updates at the start in which edits are looked for that torch does not count. Each costs a pass over
masters and working copies; who edits so does it from the start, and is looked after for good then."""


class Edits:
    """Edits of one module on all ranks.

    Args:
        units: this rank's.
        foreign: what it has not.
        known: ids of all parameters.
        gathering: what makes cut parameters whole.
    """

    def __init__(
        self,
        module: nn.Module,
        units: Sequence[Unit],
        foreign: Foreign,
        known: Collection[int],
        gathering: Sequence[Gathering],
        mesh: Mesh,
    ) -> None:
        self._module = module
        self._units = units
        self._foreign = foreign
        self._known = known
        self._gathering = gathering
        self._mesh = mesh
        # Elsewhere an edit of a working parameter is one of its master, or is refused.
        self._apart = [unit for unit in units if unit.plan.trainable and unit.rounds and not _is_cut(unit)]
        self._num_searches = SEARCHED_UPDATES
        self._is_lent = False

    def absorb(self, *, in_update: bool = False) -> None:
        """Take over what was written into whole working parameters beside wider masters.

        Args:
            in_update: called in every update, so edits that torch does not count are looked for in the first
                ones, and in all where some were found; else always.
        """
        if self._is_lent:  # what is written now may yet be undone
            return
        compares = not in_update or self._num_searches > 0
        if in_update:
            self._num_searches -= 1
        found = [unit.absorb(compares=compares) for unit in self._apart]
        if any(found):
            self._num_searches = sys.maxsize

    @contextmanager
    def lent(self, parameters: Iterable[nn.Parameter] | None = None) -> Iterator[None]:
        """Working parameters of the units of `parameters` whole; edits that rank 0 makes of them and of
        buffers are everyone's afterwards. Where the block raises, those of parameters are undone. A
        collective.

        Args:
            parameters: those asked for, the same on every rank; None for the whole model.

        Raises:
            StateError: a tensor is none of the model's parameters; or data were replaced inside the block.
        """
        asked = None if parameters is None else {id(parameter) for parameter in parameters}
        self._check_known(asked or ())
        units = [
            unit
            for unit in self._units
            if asked is None or any(id(parameter) in asked for parameter in unit.parameters)
        ]
        self.absorb()
        # Whole parameters are there twice for that time; cut ones still have their part.
        kept = {unit: unit.part.clone() for unit in units if not _is_cut(unit)}
        with torch.no_grad(), ExitStack() as stack:
            for gathering in self._gathering:
                stack.enter_context(gathering.held(units))
            everyones = self._module.named_parameters()
            names = None if asked is None else {name for name, each in everyones if id(each) in asked}
            stack.enter_context(self._foreign.lent(names))
            self._is_lent = True
            try:
                try:
                    yield
                    self._check_places(units)
                except BaseException:
                    # Without an exchange: the error may not have come to every rank.
                    for unit, part in kept.items():
                        unit.part.copy_(part)
                        unit.point()
                    raise
                self._share(units)
            finally:
                self._is_lent = False
                for unit in units:
                    unit.forget_edits()

    def _check_known(self, asked: Collection[int]) -> None:
        strangers = set(asked).difference(self._known)
        if strangers:
            raise StateError(
                f"{len(strangers)} of {len(asked)} tensor(s) to be gathered are not parameters of the model",
                rule="what is asked for are parameters that the module had when it was initialized",
                fix="pass some of engine.module.parameters(), or nothing for all of them",
            )

    def _check_places(self, units: Sequence[Unit]) -> None:
        for unit in units:
            for slot, view, parameter in zip(unit.plan.slots, unit.views, unit.parameters, strict=True):
                is_away = slot.numel and parameter.data_ptr() != view.data_ptr()
                if is_away and not self._foreign.lends(slot.name):
                    raise replaced(slot, parameter)

    def _share(self, units: Sequence[Unit]) -> None:
        self._foreign.share_edits()
        for pending in [unit.align_edits() for unit in units]:
            pending.wait()
        self._mesh.barrier()  # a slower rank may still read what is written now, where memory is common
        for unit in units:
            unit.absorb_edits()
        share_buffers(self._module, self._mesh)


def _is_cut(unit: Unit) -> bool:
    return bool(unit.residency.parameters)
