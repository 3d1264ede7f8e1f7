"""Makes cut parameters whole where the model runs, and only there.

Every forward or backward of the model is a pass, and in a pass all ranks gather the same units in the same
order: the order of the first pass of its kind, which the ranks settle unit by unit. A rank that does not
reach a unit gathers it for the others, and one without a micro-batch serves the whole pass; so no rank
waits for one that took another way. Made by `ModelState`; it never changes a number.

Which hooks, and why these: a forward pre-hook and hooks on the outputs' gradients both run before a
recompute does. In backward a unit is dropped when an earlier block begins: autograd runs the nodes of the
later block first, so nothing of it is left by then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from zlib import crc32

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from sixfold.base.errors import StateError
from sixfold.mesh import NOTHING, Mesh
from sixfold.state.passes import (
    BACKWARD,
    EVALUATION,
    FORWARD,
    PASSES,
    Hooked,
    Order,
    Pass,
    disagreement,
    forward_kind,
    settle,
    tensors_in,
)
from sixfold.state.unit import Unit

_NOTHING = -1
_SERIALS = count()
"""One for each engine of a process; ranks make their engines in one order."""


class Gathering(Hooked):
    """Gathers and drops units of one module.

    Args:
        units: those whose parameters are cut, in module order; with none it does nothing.
        serve: called in place of a pass that this rank has no part in, with its kind.
        leave: called with each unit that a backward pass is through with; at the same place on every rank.
        prefetch_bytes: bound on what is gathered ahead; None for always one unit.
    """

    def __init__(
        self,
        module: nn.Module,
        units: Sequence[Unit],
        mesh: Mesh,
        serve: Callable[[str], None],
        leave: Callable[[Unit], None],
        prefetch_bytes: int | None,
    ) -> None:
        self._units, self.has_units = units, bool(units)
        self._serial = next(_SERIALS)
        self._name = f"{type(module).__name__} (engine {self._serial})"
        self._mesh = mesh
        self._serve = serve
        self._leave = leave
        self._prefetch_bytes = prefetch_bytes
        self._staying = [unit for unit in units if not unit.plan.blocks]
        self._users: dict[str, list[Unit]] = {}
        for unit in units:
            for block in unit.plan.blocks:
                self._users.setdefault(block, []).append(unit)
        self._present: set[Unit] = set()
        self._orders: dict[str, Order] = {}
        self._reached: set[Unit] = set()
        self._unreached: set[Unit] = set()
        self._holding: set[Unit] = set()
        self._pass: Pass | None = None
        self._is_explicit = False
        self._is_free = True
        self._is_held = False
        self._is_kept = False
        self._num_forwards = 0  # since the last backward
        self._depth = 0
        self._running: list[str] = []
        self._handles: list[RemovableHandle] = self._hook(module) if units else []

    def _hook(self, module: nn.Module) -> list[RemovableHandle]:
        handles = [
            # First of all: other hooks may compute with parameters, as torch's old weight norm does.
            module.register_forward_pre_hook(self._root_begins, prepend=True),
            module.register_forward_hook(self._root_ends, always_call=True),
        ]
        for name in self._users:
            block = module.get_submodule(name)
            handles += [
                block.register_forward_pre_hook(partial(self._block_begins, name), prepend=True),
                block.register_forward_hook(partial(self._block_ends, name), always_call=True),
            ]
        return handles

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    # Where ranks come together.

    def meet(self, what: str, number: float = 0.0) -> list[float]:
        """Everyone's `number`, once all ranks have come to `what`; those in a pass are served till then.

        Args:
            what: a pass, which only some need to have, or any other call, which all have in common.

        Raises:
            MeshError: ranks came to different calls; on every rank.
        """
        if not self._units:
            return [number]
        self.close()
        mine = PASSES.index(what) if what in PASSES else len(PASSES)
        while True:
            rows = self._mesh.everyones(mine, crc32(what.encode()), self._serial, number)
            first = min(int(row[0]) for row in rows)
            is_mixed = len({row[2] for row in rows}) > 1
            if is_mixed or (first == len(PASSES) and len({row[1] for row in rows}) > 1):
                raise disagreement(self._mesh, f"{what} of {self._name}" if is_mixed else what)
            if first == mine:
                return [row[3] for row in rows]
            self._serve(PASSES[first])

    @contextmanager
    def by_program(self) -> Iterator[None]:
        """Inside, passes come in an order that ranks have agreed on, and nobody asks for it."""
        was, self._is_free = self._is_free, False
        try:
            yield
        finally:
            self._is_free = was

    # Passes.

    def open(self, kind: str) -> None:
        """Begin a pass; one that an error or another model's backward left open is ended first."""
        self.close()
        if self._is_free:
            self.meet(kind)
        self._start(kind)
        self._need(self._staying)

    def serve(self, kind: str) -> None:
        """Take part in a pass without running anything."""
        self.close()
        self._start(kind)
        self.close()

    @contextmanager
    def held(self, units: Iterable[Unit]) -> Iterator[None]:
        """Whole inside the block, all at once; the model may be called there by any rank alone."""
        for unit in (asked := [unit for unit in units if unit in set(self._units)]):
            unit.gather().wait()
            unit.show()
            self._present.add(unit)
        was, self._is_held = self._is_held, len(asked) == len(self._units)
        try:
            yield
        finally:
            self._is_held = was
            self._drop_all_but(())

    def keep(self, is_kept: bool) -> None:
        """Have all units whole from now on, over several passes; or let passes gather and drop them again."""
        self.close()
        self._is_kept = is_kept
        if not is_kept:
            self._drop_all_but(())
        for unit in self._units if is_kept else ():
            if unit not in self._present:
                unit.gather().wait()
                unit.show()
                self._present.add(unit)

    @contextmanager
    def backward(self) -> Iterator[None]:
        """A backward pass inside the block."""
        if not self._units:
            yield
            return
        self.open(BACKWARD)
        self._is_explicit = True
        try:
            yield
            self.close()
        finally:
            self._is_explicit = False

    def _start(self, kind: str) -> None:
        order = self._orders.get(kind)
        if order is None and not self._is_kept:
            self._drop_all_but(self._staying)  # the order is found out from its beginning
        kept = {EVALUATION: self._present, FORWARD: {*self._staying, *self._tail()}, BACKWARD: set[Unit]()}[
            kind
        ]
        if self._is_kept:
            kept = set(self._units)
        units, lasting = (order.units, order.lasting) if order else ((), frozenset(self._staying))
        self._pass = Pass(
            kind,
            order,
            todo=[unit for unit in units if unit not in self._present],
            kept=frozenset(kept),
            stays={*kept, *lasting, *self._holding},
            leaving=[unit for unit in units if unit not in lasting] if kind == BACKWARD else [],
            is_plain=self._num_forwards == 1 and not self._has_detours(),
        )
        self._num_forwards = 0 if kind == BACKWARD else self._num_forwards + (kind == FORWARD)
        self._running.clear()

    def _has_detours(self) -> bool:
        """Whether the first forward wanted a block twice, or several orders of them."""
        order = self._orders.get(FORWARD)
        return order is None or any(unit.plan.blocks for unit in order.lasting)

    def _tail(self) -> list[Unit]:
        """Units of the block that runs last: backward begins with them."""
        order = self._orders.get(FORWARD)
        blocks = [block for unit in order.units for block in unit.plan.blocks[-1:]] if order else []
        return self._users[blocks[-1]] if blocks else []

    def close(self) -> None:
        """End the pass under way, if there is one: gather for others what this rank did not need."""
        current = self._pass
        if current is None:
            return
        if current.order is None:
            self._negotiate(current, None)
            self._orders[current.kind] = self._settled(current)
        else:
            self._advance(current, None)
        self._pass = None
        self._drop_all_but(current.kept)

    def refresh(self) -> None:
        """Drop everything: the numbers have changed."""
        self.close()
        self._drop_all_but(())

    def _drop_all_but(self, kept: Container[Unit]) -> None:
        for unit in self._units:
            if unit in self._present and unit not in kept:
                self._drop(unit)

    def _drop(self, unit: Unit) -> None:
        self._present.discard(unit)
        unit.drop()

    def _expected(self, kind: str) -> list[Unit]:
        """The order in which a pass will probably want units: that of forward, or of the module."""
        order = self._orders.get(FORWARD)
        units = [unit for unit in (order.units if order else self._units) if unit.plan.blocks]
        return [*self._staying, *(reversed(units) if kind == BACKWARD else units)]

    def _settled(self, found_in: Pass) -> Order:
        """The order for later passes; every rank takes part."""
        reached, left_out, holders = (
            {unit for unit, count in zip(self._units, counts, strict=True) if count}
            for counts in (
                map(
                    sum,
                    zip(*self._mesh.everyones(*(float(unit in noted) for unit in self._units)), strict=True),
                )
                for noted in (self._reached, self._unreached, self._holding)
            )
        )
        # Backward needs no block that has run, and whose outputs were never part of the graph.
        idle = left_out - reached if found_in.kind == BACKWARD else set[Unit]()
        return settle(found_in.found, self._expected(found_in.kind), idle, holders)

    # Units.

    def _need(self, units: Iterable[Unit]) -> None:
        """Have `units` whole."""
        has_advanced = False
        for unit in units:
            if unit in self._present:
                continue
            current = self._pass
            if current is None:
                raise StateError(
                    f"the block of {unit.plan.slots[0].name} runs by itself",
                    rule="with cut parameters (layout.zero = 3) the model is called as a whole, and its "
                    "numbers are gathered as it runs",
                    fix="call engine(...), or use the part inside `with engine.gathered():`",
                )
            if current.order is None:
                self._negotiate(current, unit)
            else:
                self._advance(current, unit)
                has_advanced = True
        if self._pass is not None and not has_advanced:
            self._look_ahead(self._pass)

    def _negotiate(self, current: Pass, wanted: Unit | None) -> None:
        """Gather what any rank wants until this one has what it wants, or nobody wants anything."""
        expected = self._expected(current.kind)
        mine = expected.index(wanted) if wanted is not None else _NOTHING
        while True:
            everyones = [int(row[0]) for row in self._mesh.everyones(mine)]
            chosen = min((place for place in everyones if place != _NOTHING), default=None)
            if chosen is None:
                return
            unit = expected[chosen]
            current.found.append(unit)
            if current.kind == BACKWARD and current.is_plain and unit.plan.blocks:
                current.leaving.append(unit)
                self._leave_all_before(current, unit)
            self._complete(current, unit, keep=unit is wanted)
            if unit is wanted:
                return

    def _advance(self, current: Pass, wanted: Unit | None) -> None:
        """Gather what comes next until this rank has what it wants, or to the end of the pass."""
        while current.place < len(current.todo):
            unit = current.todo[current.place]
            current.place += 1
            if unit in current.leaving:
                self._leave_all_before(current, unit)
            self._complete(current, unit, keep=unit is wanted)
            self._look_ahead(current)
            if unit is wanted:
                return
        if wanted is not None:
            raise StateError(
                f"the block of {wanted.plan.slots[0].name} runs at another place than in the first "
                f"{current.kind}",
                rule="with cut parameters all ranks gather blocks in one order, that of the first pass; "
                "blocks may be left out, but not change places",
                fix="set layout.zero = 2, or name a part that holds these blocks in layout.blocks",
            )

    def _leave_all_before(self, current: Pass, unit: Unit) -> None:
        """Backward has come to `unit`, one of those to leave: it is through with the blocks before."""
        while not set(current.leaving[0].plan.blocks) & set(unit.plan.blocks):
            left = current.leaving.pop(0)
            self._leave(left)
            if left in self._present and left not in current.stays:
                self._drop(left)

    def _complete(self, current: Pass, unit: Unit, *, keep: bool) -> None:
        was_present = unit in self._present
        pending = current.under_way.pop(unit, None) or unit.gather()
        if pending is not NOTHING:
            pending.wait()
        unit.show()
        self._present.add(unit)
        if not keep and not was_present and unit not in current.stays:
            self._drop(unit)

    def _look_ahead(self, current: Pass) -> None:
        """Start to gather what comes next."""
        ahead = 0
        for unit in current.todo[current.place :]:
            size = unit.working_bytes
            ahead += size
            if ahead > (size if self._prefetch_bytes is None else self._prefetch_bytes):
                break
            if unit not in current.under_way:
                current.under_way[unit] = unit.gather()

    # Hooks.

    def _root_begins(self, module: nn.Module, args: object) -> None:
        self._depth += 1
        if self._depth == 1 and not self._is_explicit and not self._is_held:
            self.open(forward_kind())

    def _root_ends(self, module: nn.Module, args: object, output: object) -> None:
        self._depth -= 1
        # After an error the pass is left open: ranks must not talk while one of them is on its way out. Who
        # goes on instead ends it with the next call.
        has_failed = output is None and sys.exc_info()[0] is not None
        if self._depth == 0 and not has_failed and self._pass is not None and self._pass.kind != BACKWARD:
            self.close()

    def _block_begins(self, name: str, block: nn.Module, args: object) -> None:
        if self._running and self._pass is not None:  # a block inside a block: the outer one goes on after it
            self._pass.stays.update(self._users[self._running[-1]])
            self._holding.update(self._users[self._running[-1]])
        self._running.append(name)
        if self._pass is not None and self._pass.kind == BACKWARD:
            self._backward_reaches(name)
        else:
            self._need(self._users[name])

    def _block_ends(self, name: str, block: nn.Module, args: object, output: object) -> None:
        if self._running:
            self._running.pop()
        current = self._pass
        is_in_graph = False
        for tensor in tensors_in(output):
            if tensor.requires_grad and tensor.grad_fn:
                is_in_graph = True
                tensor.register_hook(partial(self._gradient_reaches, name))  # type: ignore[no-untyped-call]
        if current is not None and current.kind == FORWARD:
            (self._reached if is_in_graph else self._unreached).update(self._users[name])
        if current is None or current.kind == BACKWARD:
            return  # recompute: the block's backward follows
        for unit in self._users[name]:
            if unit.plan.blocks[-1] == name and unit not in current.stays and unit in self._present:
                self._drop(unit)

    def _gradient_reaches(self, name: str, gradient: torch.Tensor) -> None:
        if torch.is_grad_enabled() and not self._is_held:
            raise StateError(
                f"a backward with create_graph=True through {name}",
                rule="with cut parameters (layout.zero = 3) a backward of a backward would need numbers that "
                "have been dropped",
                fix="set layout.zero = 2",
            )
        self._backward_reaches(name)

    def _backward_reaches(self, name: str) -> None:
        if self._is_held:
            return
        if self._pass is None or self._pass.kind != BACKWARD:
            self.open(BACKWARD)  # another model's loss goes through this one
        current = self._pass
        assert current is not None, "opened above"
        users = self._users[name]
        if not self._present.issuperset(users):
            for unit in current.behind.intersection(self._present).difference(users, current.stays):
                self._drop(unit)
        current.behind.update(users)
        self._need(users)
