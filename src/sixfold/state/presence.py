"""Whether the parameters of a unit have their numbers: they come, are used, and go.

One for each `Unit`, driven by `Gathering` and by the passes it opens. It never decides when numbers are
needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from torch import nn

from sixfold.base.errors import StateError
from sixfold.mesh.cut import Cut
from sixfold.state.absent import CLOSED, absent_class

_version = attrgetter("_version")


class Presence:
    """The numbers of some parameters, as far as they are here.

    Args:
        parameters: of the unit.
        names: theirs.
        cut: where their numbers lie; parameters are views of its whole.

    Attributes:
        is_dropped: whether they have none. Whoever looks at such parameters for what needs no numbers gives
            them their own classes for that moment.
        own, absent: each parameter and its class with numbers and without.
        is_copy: whether gathering copies.
        gather: starts to make them whole; they can be used after `show`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], names: Sequence[str], cut: Cut) -> None:
        by_id = {id(parameter): name for parameter, name in zip(parameters, names, strict=True)}
        self.own = [(parameter, type(parameter)) for parameter in parameters]
        self.absent = [(parameter, absent_class(parameter, by_id)) for parameter in parameters]
        self.is_dropped = False
        self.is_copy, self.gather, self._forget = cut.is_copy, cut.gather, cut.forget
        self._parameters = parameters
        self._names = names
        self._storage = cut.whole.untyped_storage()
        self.note_edits()

    def show(self) -> None:
        """Let them be used: they are whole."""
        self.is_dropped = False
        for parameter, kind in self.own:
            parameter.__class__ = kind

    def drop(self) -> None:
        """Give their memory back; whoever touches them from now on gets an error.

        Raises:
            StateError: a parameter was edited since `show`, which is lost.
        """
        edited = None
        if list(map(_version, self._parameters)) != self._versions:
            edited = self._edited()
        self.is_dropped = True
        for parameter, kind in self.absent:
            parameter.__class__ = kind
        if self.is_copy:
            self._storage.resize_(0)
        if edited is not None:
            self._forget()  # told once, and undone
            self.note_edits()
            raise edited

    def free(self) -> None:
        """Give their memory back, while they are views of other memory."""
        if self.is_copy:
            self._storage.resize_(0)

    def end(self) -> None:
        """They do not come any more."""
        for _, kind in self.absent:
            kind.why = CLOSED

    def note_edits(self) -> None:
        """Edits up to now are known."""
        self._versions = list(map(_version, self._parameters))

    def has_edits(self) -> bool:
        """Whether there were some since then, of those that torch counts."""
        return list(map(_version, self._parameters)) != self._versions

    def _edited(self) -> StateError:
        versions = zip(self._names, map(_version, self._parameters), self._versions, strict=True)
        edited = [name for name, now, then in versions if now != then]
        return StateError(
            f"{', '.join(edited[:4])} changed in place during a forward or backward",
            rule="with cut parameters (layout.zero = 3) a gathered copy lives until its block has run, "
            "so an edit of it would be lost",
            fix="edit inside `with engine.gathered():`, or set layout.zero = 2",
        )
