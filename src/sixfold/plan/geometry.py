"""Geometry: how many ranks stand along each axis, and which rank is where.

Decided once from `layout` and the number of ranks; read by the mesh and the batch plan. It counts
ranks only and forms no process group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from sixfold.base.axes import CARDS
from sixfold.base.errors import PlanError
from sixfold.config import LayoutConfig

MESH_AXES = ("pipe", "data", "context", "tensor")
"""Slowest first: neighbours in rank differ in the axis that talks most. world = their product."""


@dataclass(frozen=True)
class Geometry:
    """Ranks along each mesh axis, slowest axis first.

    Args:
        degrees: one number per name in MESH_AXES.
        shard: ranks in one of the equal groups of neighbours that the data ranks are split into, over
            which model state may be cut. It never multiplies the world.
    """

    degrees: tuple[tuple[str, int], ...]
    shard: int = 1

    @cached_property
    def world_size(self) -> int:
        """Ranks in all."""
        return prod(degree for _, degree in self.degrees)

    def degree(self, axis: str) -> int:
        """Ranks along `axis`."""
        return dict(self.degrees)[axis]

    def num_parts(self, spread: Sequence[str]) -> int:
        """Equal parts that something cut over the axes of `spread` has."""
        parts = {"shard": self.shard, "data": self.degree("data") // self.shard}
        return prod(parts[axis] for axis in spread)

    def coordinate(self, rank: int, axis: str) -> int:
        """Where `rank` stands along `axis`, from 0."""
        below = 1
        for name, degree in reversed(self.degrees):
            if name == axis:
                return rank // below % degree
            below *= degree
        raise AssertionError(f"no axis {axis!r} in {self}")

    def first_rank(self, pipe_rank: int) -> int:
        """The first rank at a place of the pipelines."""
        return pipe_rank * (self.world_size // self.degree("pipe"))

    def __str__(self) -> str:
        return " x ".join(f"{name} {degree}" for name, degree in self.degrees if degree > 1) or "one rank"


def decide_geometry(layout: LayoutConfig, world_size: int) -> Geometry:
    """Place `world_size` ranks along the axes that `layout` asks for.

    Raises:
        PlanError: an axis without a card is asked for, or the product is not `world_size`.
    """
    for axis in ("tensor", "pipe", "context", "expert"):
        asked = getattr(layout, axis)
        if asked > 1 and axis not in CARDS:
            raise PlanError(
                f"layout.{axis} = {asked}",
                rule=f"this version divides over: {', '.join(CARDS)}; it has no {axis} axis",
                fix=f"set layout.{axis} = 1; the ranks then work along the data axis",
            )
    others = layout.pipe * layout.context * layout.tensor
    data = layout.data if layout.data is not None else max(1, world_size // others)
    if data * others != world_size:
        asked_text = f"pipe {layout.pipe} x data {data} x context {layout.context} x tensor {layout.tensor}"
        raise PlanError(
            f"layout: {asked_text} = {data * others} ranks, but {world_size} are running",
            rule="pipe x data x context x tensor is the number of ranks",
            fix=f"set layout.data = {world_size // others}, or leave it unset, or start {data * others} ranks"
            if world_size >= others
            else f"start {data * others} ranks, or make layout.pipe, context or tensor smaller",
        )
    if layout.shard is not None and data % layout.shard:
        raise PlanError(
            f"layout.shard = {layout.shard} with {data} data ranks",
            rule="shard cuts the data ranks into equal groups, so it divides their number",
            fix=f"set layout.shard = {data}, or leave it unset",
        )
    sizes = {"pipe": layout.pipe, "data": data, "context": layout.context, "tensor": layout.tensor}
    return Geometry(tuple((axis, sizes[axis]) for axis in MESH_AXES), layout.shard or data)
