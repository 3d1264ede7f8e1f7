"""Numbers of which each rank keeps a part, and which are whole on every rank for a while: copied together.

Handed out by `Mesh.cut`, which gives ranks of one host a `Common` of the same interface instead. Used by the
state engine for working parameters. It never decides when they are whole.
"""

from __future__ import annotations

from typing import Protocol

import torch

from sixfold.mesh.dispatch import Pending


class Cut(Protocol):
    """What a rank has of a flat tensor that is cut over ranks.

    Attributes:
        whole: [numel]. To be read when it was gathered. What is written into it, this rank alone sees; it
            is lost with the next `gather` where the whole is a copy, else when a part is published.
        part: this rank's part, which it keeps. Written only while nobody gathers or reads.
        is_copy: whether the whole is this rank's own: then it is filled by `gather`, and until then its
            storage may be resized to nothing. Else `gather` does nothing.
    """

    @property
    def whole(self) -> torch.Tensor: ...

    @property
    def part(self) -> torch.Tensor: ...

    @property
    def is_copy(self) -> bool: ...

    def gather(self) -> Pending:
        """Start to make `whole` whole, at the address it had before: what autograd saved of it is valid
        again."""

    def forget(self) -> None:
        """What this rank has written into `whole` is not there after the next `gather`."""


class Copied:
    """A whole of its own on each rank, filled by exchanges.

    Args:
        whole: [numel].
        part: [size]; the same memory as `whole` where nothing is cut.
        place: where the part lies in the whole.
        filling: fills the whole, in which this rank's part is in its place.
    """

    is_copy = True

    def __init__(
        self,
        whole: torch.Tensor,
        part: torch.Tensor,
        place: slice,
        filling: Pending,
    ) -> None:
        self.whole = whole
        self.part = part
        self._place = place
        self._num_bytes = whole.untyped_storage().nbytes()
        self._filling = filling

    def gather(self) -> Pending:
        """See `Cut`."""
        storage = self.whole.untyped_storage()
        if not storage.nbytes():
            storage.resize_(self._num_bytes)
        self.whole[self._place].copy_(self.part)
        return self._filling.start()

    def forget(self) -> None:
        """See `Cut`."""
