"""Makes cut parameters whole where the model runs, and only there.

Every forward or backward of the model is a pass, and in a pass all ranks gather the same units in the same
order: the order of the first pass of its kind, which the ranks settle unit by unit (`Finding`), and which
later ones follow on a prepared route (`Following`). A rank that does not reach a unit gathers it for the
others, and one without a micro-batch serves the whole pass; so no rank waits for one that took another way.
Made by `ModelState`; it never changes a number.

Which hooks, and why these: a forward pre-hook and hooks on the outputs' gradients both run before a
recompute does. In backward a unit is dropped when an earlier block begins: autograd runs the nodes of the
later block first, so nothing of it is left by then.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from sixfold.base.errors import StateError
from sixfold.mesh import Mesh
from sixfold.state.finding import Finding
from sixfold.state.following import Following
from sixfold.state.meeting import Meeting
from sixfold.state.passes import (
    BACKWARD,
    EVALUATION,
    FORWARD,
    UNREDUCED,
    Order,
    Route,
    Whole,
    forward_kind,
    route,
    settle,
    tensors_in,
)
from sixfold.state.unit import Unit
from sixfold.state.windows import ReduceWindow


class Gathering:
    """Gathers and drops units of one module.

    Args:
        units: those whose parameters are cut, in module order; with none it does nothing.
        meeting: where ranks come together before they pass.
        window: what reduces units that a backward pass has left.
        prefetch_bytes: bound on what is gathered ahead; None for always one unit.

    Attributes:
        is_free: whether nobody has agreed on the order of passes, so that ranks ask for it.
        current: the pass under way.
    """

    def __init__(
        self,
        module: nn.Module,
        units: Sequence[Unit],
        mesh: Mesh,
        meeting: Meeting,
        window: ReduceWindow,
        prefetch_bytes: int | None,
    ) -> None:
        self._units, self.has_units = units, bool(units)
        self._mesh = mesh
        self._window = window
        self._prefetch_bytes = prefetch_bytes
        self._meeting = meeting
        self.is_free = True
        self._staying = [unit for unit in units if not unit.plan.blocks]
        self._users: dict[str, list[Unit]] = {}
        for unit in units:
            for block in unit.plan.blocks:
                self._users.setdefault(block, []).append(unit)
        self._whole = Whole()
        self._orders: dict[str, Order] = {}
        self._routes: dict[tuple[str, bool, frozenset[Unit]], Route] = {}
        self.current: Following | Finding | None = None
        self._is_explicit = False
        self._is_held = False
        self._is_kept = False
        self._num_forwards = 0  # since the last backward
        self._reached: set[Unit] = set()
        self._unreached: set[Unit] = set()
        self._depth = 0
        self._running: list[str] = []
        self._handles: list[RemovableHandle] = self._hook(module) if units else []

    def __deepcopy__(self, memo: object) -> Self:
        return self  # its methods are hooks: a copy of the module keeps to the one there is

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
        """Take the hooks off, and drop what a pass has left whole."""
        for handle in self._handles:
            handle.remove()
        for unit in self._whole.units:
            unit.forget_edits()
        self._drop_all_but(())

    # Passes.

    def open(self, kind: str) -> None:
        """Begin a pass; one that an error or another model's backward left open is ended first."""
        if self.current is not None:
            self.close()
        if self.is_free:
            self._meeting.meet(kind)
        self._start(kind).go(self._staying)

    def serve(self, kind: str) -> None:
        """Take part in a pass without running anything."""
        self.close()
        self._start(kind)
        self.close()

    def close(self) -> None:
        """End the pass under way, if there is one: gather for others what this rank did not need."""
        current = self.current
        if current is None:
            return
        self.leave()
        current.go((), to_end=True)
        if isinstance(current, Finding):
            self._orders[current.kind] = self._settled(current)
            self._routes.clear()
        if self._is_explicit:  # as who serves does, and while parameters have their own classes
            self._window.flush()
        self.current = None
        self._drop_all_but(current.kept)

    def leave(self) -> None:
        """No forward is under way, whether or not one was seen to end: after a KeyboardInterrupt torch calls
        no hook."""
        self._depth = 0

    def refresh(self) -> None:
        """Drop everything: the numbers have changed."""
        if self.current is not None:
            self.close()
        if self._whole.units:
            self._drop_all_but(())

    @contextmanager
    def backward(self) -> Iterator[None]:
        """A backward pass inside the block; at its end all units are on their way."""
        if self._units:
            self.open(BACKWARD)
        self._is_explicit = True
        try:
            yield
            if self._units:
                self.close()
            else:
                self._window.flush()
        finally:
            self._is_explicit = False

    def _start(self, kind: str) -> Following | Finding:
        window = self._window if kind == BACKWARD else None
        kind = BACKWARD if kind == UNREDUCED else kind  # both go one way
        order = self._orders.get(kind)
        if order is None:
            current: Following | Finding = self._finding(kind, window)
        else:
            begun_with = kind, self._is_kept, frozenset(self._whole.units)
            if begun_with not in self._routes:
                self._routes[begun_with] = route(
                    order,
                    self._whole.units,
                    self._kept(kind),
                    self._users,
                    self._prefetch_bytes,
                    is_backward=kind == BACKWARD,
                )
            current = Following(kind, self._routes[begun_with], self._whole, window)
        self._num_forwards = 0 if kind == BACKWARD else self._num_forwards + (kind == FORWARD)
        self._running.clear()
        self.current = current
        return current

    def _finding(self, kind: str, window: ReduceWindow | None) -> Finding:
        if not self._is_kept:
            self._drop_all_but(self._staying)  # the order is found out from its beginning
        first = self._orders.get(FORWARD)
        # Whether the one forward before wanted no block twice, nor several orders of them.
        is_plain = first is not None and not any(unit.plan.blocks for unit in first.lasting)
        return Finding(
            kind,
            self._expected(kind),
            self._kept(kind),
            self._staying,
            self._users,
            self._whole,
            window,
            self._mesh,
            is_plain=is_plain and self._num_forwards == 1,
        )

    def _expected(self, kind: str) -> list[Unit]:
        """The order in which a pass will probably want units: that of forward, or of the module."""
        order = self._orders.get(FORWARD)
        units = [unit for unit in (order.units if order else self._units) if unit.plan.blocks]
        return [*self._staying, *(reversed(units) if kind == BACKWARD else units)]

    def _kept(self, kind: str) -> frozenset[Unit]:
        """What is whole after a pass that begins now."""
        if self._is_kept:
            return frozenset(self._units)
        if kind == EVALUATION:
            return frozenset(self._whole.units)
        return frozenset((*self._staying, *self._tail()) if kind == FORWARD else ())

    def _tail(self) -> list[Unit]:
        """Units of the block that runs last: backward begins with them."""
        order = self._orders.get(FORWARD)
        blocks = [block for unit in order.units for block in unit.plan.blocks[-1:]] if order else []
        return self._users[blocks[-1]] if blocks else []

    def _settled(self, found_in: Finding) -> Order:
        """The order for later passes; every rank takes part."""
        reached, left_out, holders = (
            {unit for unit, count in zip(self._units, counts, strict=True) if count}
            for counts in (
                map(
                    sum,
                    zip(*self._mesh.everyones(*(float(unit in noted) for unit in self._units)), strict=True),
                )
                for noted in (self._reached, self._unreached, self._whole.holding)
            )
        )
        # Backward needs no block that has run, and whose outputs were never part of the graph.
        idle = left_out - reached if found_in.kind == BACKWARD else set[Unit]()
        return settle(found_in.found, self._expected(found_in.kind), idle, holders)

    def _drop_all_but(self, kept: Collection[Unit]) -> None:
        """Raise StateError where one of them was edited, once all are dropped: ranks go on from one state."""
        # They are dropped from the last to the first, whose error is so the one that is raised.
        with ExitStack() as drops:
            for unit in self._units:
                if unit in self._whole.units and unit not in kept:
                    drops.callback(self._whole.drop, unit)

    # Whole for longer than a pass.

    @contextmanager
    def held(self, units: Iterable[Unit]) -> Iterator[None]:
        """Whole inside the block, all at once, in memory of their own; the model may be called there by any
        rank alone."""
        self.refresh()
        asked = set(units).intersection(self._units)
        for unit in self._units:
            if unit in asked:
                unit.lend()
                self._whole.units.add(unit)
        self._is_held = len(asked) == len(self._units)
        try:
            yield
        finally:
            self._is_held = False
            self.leave()
            for unit in asked:
                unit.take_back()
                self._whole.units.add(unit)
            self._drop_all_but(())

    def keep(self, is_kept: bool) -> None:
        """Have all units whole from now on, over several passes; or let passes gather and drop them again."""
        self.close()
        self._is_kept = is_kept
        if not is_kept:
            self._drop_all_but(())
        for unit in self._units if is_kept else ():
            if unit not in self._whole.units:
                self._whole.gather(unit)

    # Hooks.

    def _root_begins(self, module: nn.Module, args: object) -> None:
        if self._depth == 0 and not self._is_explicit and not self._is_held:
            self.open(forward_kind())
        self._depth += 1

    def _root_ends(self, module: nn.Module, args: object, output: object) -> None:
        self._depth = max(self._depth - 1, 0)
        # After an error the pass is left open: ranks must not talk while one of them is on its way out. Who
        # goes on instead ends it with the next call.
        has_failed = output is None and sys.exc_info()[0] is not None
        if self._depth == 0 and not has_failed and self.current is not None and self.current.kind != BACKWARD:
            self.close()

    def _block_begins(self, name: str, block: nn.Module, args: object) -> None:
        if self._running and self.current is not None:
            # A block inside a block: the outer one goes on after it.
            self._whole.holding.update(self._users[self._running[-1]])
        self._running.append(name)
        if self.current is not None:
            self.current.go(self._users[name])
        elif not self._whole.units.issuperset(self._users[name]):
            raise StateError(
                f"the block of {self._users[name][0].plan.slots[0].name} runs by itself",
                rule="with cut parameters (layout.zero = 3) the model is called as a whole, and its "
                "numbers are gathered as it runs",
                fix="call engine(...), or use the part inside `with engine.gathered():`",
            )

    def _block_ends(self, name: str, block: nn.Module, args: object, output: object) -> None:
        if self._running:
            self._running.pop()
        is_in_graph = False
        for tensor in (output,) if isinstance(output, torch.Tensor) else tensors_in(output):
            if tensor.requires_grad and tensor.grad_fn:
                is_in_graph = True
                tensor.register_hook(partial(self._gradient_reaches, name))  # type: ignore[no-untyped-call]
        current, whole = self.current, self._whole
        if current is None or current.kind == BACKWARD:
            return  # recompute: the block's backward follows
        if current.kind == FORWARD:
            (self._reached if is_in_graph else self._unreached).update(self._users[name])
        for unit in current.drops[name]:
            if unit in whole.units and unit not in whole.holding:
                whole.units.discard(unit)
                unit.presence.drop()

    def _gradient_reaches(self, name: str, gradient: torch.Tensor) -> None:
        if self._is_held:
            return
        if torch.is_grad_enabled():
            raise StateError(
                f"a backward with create_graph=True through {name}",
                rule="with cut parameters (layout.zero = 3) a backward of a backward would need numbers that "
                "have been dropped",
                fix="set layout.zero = 2",
            )
        if self.current is None or self.current.kind != BACKWARD:
            self.open(UNREDUCED)
        assert self.current is not None, "opened above"
        self.current.go(self._users[name])
