"""How checksums are counted: one for every cell of 64 KiB of every file, cells of the first file first.

The manifest says by it how many there are; `sums` makes and `ranges` compares them. It opens no file.
"""

from __future__ import annotations

from dataclasses import dataclass

CELL_BYTES = 64 * 2**10
"""At most this much is read beyond each end of a wanted range, to verify it."""


@dataclass(frozen=True)
class Cells:
    """Which cells belong to which file.

    Args:
        sizes: bytes of each file, in the manifest's order.
    """

    sizes: tuple[int, ...]

    def first(self, file: int) -> int:
        """Number of a file's first cell."""
        return sum(num_cells(size) for size in self.sizes[:file])

    @property
    def num_cells(self) -> int:
        return self.first(len(self.sizes))


def num_cells(size: int) -> int:
    """Cells of a file of so many bytes."""
    return -(-size // CELL_BYTES)
