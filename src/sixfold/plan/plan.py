"""The plan: everything that is decided about a run, frozen, printed as one screen.

`decide` is called once by the engine; the rooms below it receive the plan and decide nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from sixfold.base.units import bytes_text, count_text, item_bytes
from sixfold.config import Config
from sixfold.plan.batch import BatchPlan, decide_batch
from sixfold.plan.geometry import Geometry, decide_geometry
from sixfold.plan.precision import (
    FLOATING,
    LossScaling,
    PrecisionPlan,
    decide_loss_scaling,
    decide_precision,
)
from sixfold.plan.residency import ALL, Residency, decide_residency
from sixfold.plan.stages import StagePlan
from sixfold.plan.units import ParameterFacts, UnitPlan, cut_units

REPLICAS = "data x context"
"""Along what replicas stand, as a key of `Plan.summands`."""


@dataclass(frozen=True)
class Plan:
    """What is decided.

    Args:
        geometry: ranks along each axis.
        residency: where each kind of state lives.
        precision: number types, one entry per working type that occurs among floating parameters.
        units: what travels together, in module order.
        loss_scaling: the factor on the loss under fp16.
        has_average: whether an average of the weights is kept beside them.
        stages: where the model is cut; None in a pipeline of one stage.
    """

    geometry: Geometry
    residency: Residency
    precision: tuple[PrecisionPlan, ...]
    units: tuple[UnitPlan, ...]
    loss_scaling: LossScaling = field(default_factory=LossScaling)
    has_average: bool = False
    stages: StagePlan | None = None

    def precision_of(self, unit: UnitPlan) -> PrecisionPlan | None:
        """The number types of `unit`; None where its numbers are not floating."""
        return next((types for types in self.precision if types.compute == unit.dtype), None)

    def summands(self, unit: UnitPlan) -> dict[str, int]:
        """Of how many ranks each has a summand of the gradients of `unit`, by what these ranks stand along:
        they are summed over all of them before an update."""
        found = {REPLICAS: self.geometry.num_replicas(unit.cut)}
        found |= {axis: self.geometry.degree(axis) for axis in unit.partial}
        if unit.tied and self.stages is not None:
            found["pipe"] = len({self.stages.rank_of(stage) for stage in unit.tied})
        return found

    def _windows_text(self) -> str:
        sizes = [(unit.blocks, unit.numel * item_bytes(unit.dtype)) for unit in self.units]
        coming = [size for blocks, size in sizes if blocks]
        staying = sum(size for blocks, size in sizes if not blocks)
        return (
            f"windows     {bytes_text(staying)} whole during a pass, and of {len(coming)} unit(s) of blocks "
            f"those in use, the largest {bytes_text(max(coming, default=0))}"
        )

    def __str__(self) -> str:
        trainable = sum(slot.numel for unit in self.units if unit.trainable for slot in unit.slots)
        frozen = sum(slot.numel for unit in self.units if not unit.trainable for slot in unit.slots)
        working = sum(unit.numel * item_bytes(unit.dtype) for unit in self.units)
        groups = f" (shard: groups of {self.geometry.shard} ranks)" if self.residency.is_cut else ""
        scaling = self.loss_scaling
        stages = (f"stages      {self.stages}",) if self.stages else ()
        windows = (self._windows_text(),) if self.residency.parameters else ()
        return "\n".join(
            (
                f"ranks       {self.geometry.world_size}: {self.geometry}",
                *stages,
                f"parameters  {count_text(trainable)} trained, {count_text(frozen)} frozen, "
                f"{bytes_text(working)} in {len(self.units)} unit(s)",
                f"residency   {self.residency}{groups}",
                *windows,
                *(f"precision   {types}" for types in self.precision),
                *([f"loss scale  {scaling}"] if scaling != LossScaling() else []),
            )
        )


def decide_ranks(config: Config, world_size: int) -> tuple[Geometry, Residency, BatchPlan]:
    """What does not hang on the model: how ranks stand, what they have of its state, and of each batch.

    Raises:
        PlanError: it cannot be carried out with `world_size` ranks.
    """
    geometry, residency = decide_geometry(config.layout, world_size), decide_residency(config.layout)
    batch = decide_batch(
        config.batch, data_ranks=geometry.degree("data"), sequence_length=config.data.sequence_length
    )
    return geometry, residency, batch


def decide(
    config: Config,
    parameters: Sequence[ParameterFacts],
    world_size: int,
    stages: StagePlan | None = None,
) -> Plan:
    """Decide geometry, residency, precision and units.

    Args:
        parameters: facts of the module's parameters in module order, with their own types; in a pipeline of
            those of a rank's stages, one stage after the other; of pieces where an axis cuts them.
        stages: where the model is cut.

    Raises:
        PlanError: the layout cannot be carried out with `world_size` ranks.
    """
    floating = [facts for facts in parameters if facts.dtype in FLOATING]
    types = {facts.dtype: decide_precision(config.precision, facts.dtype) for facts in floating}
    working = [
        replace(facts, dtype=types[facts.dtype].compute if facts.dtype in types else facts.dtype)
        for facts in parameters
    ]
    trained = {facts.dtype for facts in floating if facts.trainable}
    geometry, residency = decide_geometry(config.layout, world_size), decide_residency(config.layout)
    return Plan(
        geometry=geometry,
        residency=residency,
        precision=tuple(dict.fromkeys(types.values())),
        units=cut_units(
            working,
            num_slices=geometry.num_parts(residency.optimizer),
            num_pieces=geometry.num_parts(ALL) if residency.is_cut else 1,
            cut_apart={
                cut: (
                    geometry.num_parts(residency.optimizer, cut),
                    geometry.num_parts(ALL, cut) if residency.is_cut else 1,
                )
                for cut in {facts.place.axes for facts in working if facts.place}
            },
            by_block=bool(residency.parameters),
        ),
        loss_scaling=decide_loss_scaling(config.precision, [types[dtype] for dtype in trained]),
        has_average=config.optimizer.ema_decay is not None,
        stages=stages,
    )
