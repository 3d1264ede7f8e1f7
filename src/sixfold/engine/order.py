"""In which order calls of an engine may come.

The engine asks before each call; an `Order` answers or raises with the call that would work. It keeps two
facts, whether the engine is closed and in which block the weights are lent, and changes nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sixfold.base.errors import StateError
from sixfold.pipeline import Player, WrittenOut
from sixfold.plan import Geometry
from sixfold.state import Average

_LENT = {
    "ema": (
        "averaged weights are lent for evaluation; training and saving go by the trained ones",
        ", or engine.ema_state_dict() for the averages",
    ),
    "gathered": ("weights are lent to be read and edited, and edits are everyone's when the block ends", ""),
}
"""Blocks in which weights are lent: the rule, and what works inside besides."""


class Order:
    """What has been called and not ended yet.

    Args:
        player: knows whether an update was begun.
        written_out: knows by how many backwards.
        average: the one that is kept, if any.
        geometry: over which axes a model or its sequences are cut.
    """

    def __init__(
        self, player: Player, written_out: WrittenOut, average: Average | None, geometry: Geometry
    ) -> None:
        self._player = player
        self._written_out = written_out
        self._average = average
        self._geometry = geometry
        self._lent: str | None = None
        self.is_closed = False

    @contextmanager
    def lent(self, block: str) -> Iterator[None]:
        """Inside, weights are lent: "ema" or "gathered"."""
        self._lent = block
        try:
            yield
        finally:
            self._lent = None

    def check_trained(self, what: str) -> None:
        """Raise StateError unless the trained weights are in place."""
        if self._lent == "ema":
            self._check_unlent(what)

    def _check_unlent(self, what: str) -> None:
        if self._lent is not None:
            rule, besides = _LENT[self._lent]
            raise StateError(
                f"engine.{what} inside `with engine.{self._lent}():`",
                rule=rule,
                fix=f"call engine.{what} after the block{besides}",
            )

    def check_open(self, what: str) -> None:
        """Raise StateError while weights are lent, and after `close`."""
        self._check_unlent(what)
        if self.is_closed:
            raise StateError(
                f"engine.{what} after engine.close()",
                rule="a closed engine no longer reduces gradients",
                fix="close the engine last, or initialize a module anew",
            )

    def check_idle(self, what: str) -> None:
        """`check_open`, and raise StateError where an update was begun and not ended."""
        if self._lent is not None or self.is_closed:
            self.check_open(what)
        self.check_ended(what)

    def check_ended(self, what: str) -> None:
        """Raise StateError where an update was begun and not ended."""
        if not self._player.is_idle:
            raise StateError(
                f"engine.{what} after {self._written_out.num_backwards} backward(s) without engine.step()",
                rule="an update that was begun is ended before another one, a save or an edit",
                fix=f"call engine.step() before engine.{what}",
            )

    def check_whole(self, what: str) -> None:
        """Raise StateError where no rank has the whole model, or whole sequences."""
        for axis in ("pipe", "context"):
            if self._geometry.degree(axis) == 1:
                continue
            raise StateError(
                f"{what} with layout.{axis} = {self._geometry.degree(axis)}",
                rule="in a pipeline a schedule decides which rank runs which stage when, and sequences are "
                "cut between batch and model, so a whole batch is handed over at once",
                fix="call engine.train_step(batch), and engine.eval_step(batch) to evaluate; set batch.micro "
                "for the micro-batches",
            )

    def average(self, what: str) -> Average:
        """The average of the weights; StateError where none is kept."""
        if self._average is None:
            raise StateError(
                f"engine.{what} with optimizer.ema_decay = None",
                rule="averaged weights are there where an average is kept from the start",
                fix="set optimizer.ema_decay = 0.999",
            )
        return self._average
