"""Where the ranks of a module with cut parameters come together, whatever each of them calls.

Some come to a forward or backward that others do not make, and these serve it; any other call all have in
common. Made by `ModelState`, one for all its stages, and asked before every call. It gathers nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from zlib import crc32

from torch import nn

from sixfold.base.errors import MeshError
from sixfold.mesh import Mesh
from sixfold.state.passes import PASSES

_MOST_LETTERS = 96
_SERIALS = count()
"""One for each engine of a process; ranks make them in one order."""


class Meeting:
    """The calls of one module's ranks.

    Args:
        serve: called in place of a pass that this rank has no part in, with its kind.
        is_needed: whether ranks depend on each other here; else they meet nobody.
    """

    def __init__(
        self, module: nn.Module, mesh: Mesh, serve: Callable[[str], None], *, is_needed: bool
    ) -> None:
        self._serial = next(_SERIALS)
        self._name = f"{type(module).__name__} (engine {self._serial})"
        self._mesh = mesh
        self._serve = serve
        self.is_needed = is_needed

    def meet(self, what: str, number: float = 0.0) -> list[float]:
        """Everyone's `number`, once all ranks have come to `what`; those in a pass are served till then.

        Args:
            what: a pass, which only some need to have, or any other call, which all have in common.

        Raises:
            MeshError: ranks came to different calls; on every rank.
        """
        if not self.is_needed:
            return [number]
        mine = PASSES.index(what) if what in PASSES else len(PASSES)
        while True:
            rows = self._mesh.everyones(mine, crc32(what.encode()), self._serial, number)
            places, calls, serials, numbers = zip(*rows, strict=True)
            first, is_mixed = min(places), len(set(serials)) > 1
            if is_mixed or (first == len(PASSES) and len(set(calls)) > 1):
                raise self._disagreement(f"{what} of {self._name}" if is_mixed else what)
            if first == mine:
                return list(numbers)
            self._serve(PASSES[int(first)])

    def _disagreement(self, call: str) -> MeshError:
        """A collective among ranks that came to different calls, this one to `call`."""
        letters = call.encode()[:_MOST_LETTERS].ljust(_MOST_LETTERS)
        rows = self._mesh.everyones(*letters)
        calls = [bytes(map(int, row)).decode(errors="replace").strip() for row in rows]
        return MeshError(
            "; ".join(f"rank {rank} came to {call}" for rank, call in enumerate(calls)),
            rule="with cut parameters all ranks make the same calls of the engine in the same order, and of "
            "several engines the same forwards and backwards as well",
            fix="call it on every rank, also where its result is not used; with several engines give every "
            "rank equally many micro-batches",
        )
