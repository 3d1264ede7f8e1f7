"""Geometry: how many ranks stand along each axis, and which rank is where.

Decided once from `layout` and the number of ranks; read by the mesh and the batch plan. It counts
ranks only and forms no process group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd, prod

from sixfold.base.errors import PlanError
from sixfold.config import LayoutConfig

MESH_AXES = ("pipe", "data", "context", "tensor")
"""Slowest first: neighbours in rank differ in the axis that talks most. world = their product."""


@dataclass(frozen=True)
class Geometry:
    """Ranks along each mesh axis, slowest axis first.

    Args:
        degrees: one number per name in MESH_AXES.
        shard: ranks in one of the equal groups of neighbours that the replicas are split into, over
            which model state may be cut. It never multiplies the world.
        expert: groups that the replicas are dealt out to in turn, each with other experts. It never
            multiplies the world.

    *Replicas* are the ranks along data and context: they hold the same parameters and sum their gradients.
    Of what is cut along the expert axis, only those at the same place of it do.
    """

    degrees: tuple[tuple[str, int], ...]
    shard: int = 1
    expert: int = 1

    @cached_property
    def world_size(self) -> int:
        """Ranks in all."""
        return prod(degree for _, degree in self.degrees)

    def degree(self, axis: str) -> int:
        """Ranks along `axis`."""
        return self.expert if axis == "expert" else dict(self.degrees).get(axis, 1)

    @property
    def cuts_model(self) -> bool:
        """Whether a rank has less than the whole model even where no model state is cut."""
        return any(self.degree(axis) > 1 for axis in ("pipe", "tensor", "expert"))

    def num_replicas(self, cut: Sequence[str] = ()) -> int:
        """Ranks that sum their gradients of a parameter which is cut along the axes `cut`."""
        everyone = self.degree("data") * self.degree("context")
        return everyone // self.expert if "expert" in cut else everyone

    def shard_of(self, cut: Sequence[str] = ()) -> int:
        """Those of them in one group of neighbours."""
        return max(1, self.shard // self.expert) if "expert" in cut else self.shard

    def num_parts(self, spread: Sequence[str], cut: Sequence[str] = ()) -> int:
        """Equal parts that state of a parameter has, cut over the axes of `spread`.

        Args:
            cut: axes along which the parameter itself is cut.
        """
        shard = self.shard_of(cut)
        parts = {"shard": shard, "data": self.num_replicas(cut) // shard}
        return prod(parts[axis] for axis in spread)

    def num_holders(self, spread: Sequence[str], cut: Sequence[str] = ()) -> int:
        """Ranks at one place of the pipeline that hold the same part of it."""
        alike = 1 if "tensor" in cut else self.degree("tensor")
        return alike * self.num_replicas(cut) // self.num_parts(spread, cut)

    def replica(self, rank: int) -> int:
        """Where `rank` stands among the replicas."""
        return self.coordinate(rank, "data") * self.degree("context") + self.coordinate(rank, "context")

    def coordinate(self, rank: int, axis: str) -> int:
        """Where `rank` stands along `axis`, from 0."""
        if axis == "expert":
            return self.replica(rank) % self.expert
        below = 1
        for name, degree in reversed(self.degrees):
            if name == axis:
                return rank // below % degree
            below *= degree
        return 0

    def first_rank(self, pipe_rank: int) -> int:
        """The first rank at a place of the pipelines."""
        return pipe_rank * (self.world_size // self.degree("pipe"))

    def __str__(self) -> str:
        text = " x ".join(f"{name} {degree}" for name, degree in self.degrees if degree > 1) or "one rank"
        return f"{text} (expert {self.expert})" if self.expert > 1 else text


def decide_geometry(layout: LayoutConfig, world_size: int) -> Geometry:
    """Place `world_size` ranks along the axes that `layout` asks for.

    Raises:
        PlanError: the product is not `world_size`, or groups do not divide it.
    """
    others = layout.pipe * layout.context * layout.tensor
    data = layout.data if layout.data is not None else max(1, world_size // others)
    if data * others != world_size:
        asked_text = f"pipe {layout.pipe} x data {data} x context {layout.context} x tensor {layout.tensor}"
        raise PlanError(
            f"layout: {asked_text} = {data * others} ranks, but {world_size} are running",
            rule="pipe x data x context x tensor is the number of ranks",
            fix=f"set layout.data = {world_size // others}, or leave it unset, or start {data * others} ranks"
            if world_size >= others
            else f"start {data * others} ranks (launch.ranks, or as the launcher has it), or make "
            "layout.pipe, context or tensor smaller",
        )
    replicas = data * layout.context
    along = f"{data} data ranks" + (f" x {layout.context} context ranks" if layout.context > 1 else "")
    shard = layout.shard or replicas
    if replicas % shard:
        raise PlanError(
            f"layout.shard = {layout.shard} with {along}",
            rule="shard cuts the ranks along data and context into equal groups, so it divides their number",
            fix=f"set layout.shard = {replicas}, or leave it unset",
        )
    if replicas % layout.expert or (shard % layout.expert and layout.expert % shard):
        raise PlanError(
            f"layout.expert = {layout.expert} with {along} in groups of {shard}",
            rule="experts are dealt out to the ranks along data and context, so their groups divide that "
            "number, and one of layout.shard and layout.expert divides the other",
            fix=f"set layout.expert = {gcd(replicas, shard, layout.expert)}",
        )
    sizes = {"pipe": layout.pipe, "data": data, "context": layout.context, "tensor": layout.tensor}
    return Geometry(tuple((axis, sizes[axis]) for axis in MESH_AXES), shard, layout.expert)
