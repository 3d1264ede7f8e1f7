"""The player: performs a program's instructions on this rank.

The engine hands it a whole program, or the single instructions of a written-out loop: one code path
for both. It calls the verbs of the state engine in the order the program says and never chooses an
order itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

from sixfold.base.errors import ModelError, ProgramError
from sixfold.launch import current_session
from sixfold.mesh import Mesh
from sixfold.pipeline.clipping import clip_factors
from sixfold.pipeline.loss import Counts, Share
from sixfold.pipeline.passes import Passes
from sixfold.pipeline.scaling import LossScaler
from sixfold.pipeline.step import Step, StepResult, Work
from sixfold.program import Instruction, Op, Program
from sixfold.state import BoundOptimizer, ModelState


class Player:
    """Plays programs of one rank.

    Args:
        state: whose verbs are called.
        optimizer: what `step` runs.
        passes: perform all instructions but `step`.
        clip_norm: bound on the gradient norm of all groups that have none of their own; None for no bound.
        scaler: the factor on losses under fp16.

    Attributes:
        record: (instruction, start, stop) of all that is played, in seconds of the monotonic clock, while it
            is a list; a pass starts when what it has to wait for is there.
    """

    def __init__(
        self,
        state: ModelState,
        optimizer: BoundOptimizer,
        mesh: Mesh,
        passes: Passes,
        *,
        clip_norm: float | None,
        scaler: LossScaler,
    ) -> None:
        self._state = state
        self._optimizer = optimizer
        self._mesh = mesh
        self._clip_norm = clip_norm
        self._scaler = scaler
        self._passes = passes
        self.record: list[tuple[Instruction, float, float]] | None = None
        self._step: Step | None = None
        self._tells_loss = mesh.place("tensor") == 0  # ranks along the tensor axis have the same one
        self._perform = {**self._passes.perform, Op.STEP: self._update}

    def play(self, program: Program, work: Work) -> StepResult:
        """Play a whole program.

        A written-out step under way is left as it is, so that one may evaluate in its middle.

        Raises:
            ModelError: a micro-batch's loss is a mean over samples that have unequally many targets; every
                rank raises, those without a micro-batch too.
        """
        outer, self._step = self._step, Step(work, work.counts)
        try:
            self._perform_all(program)
            if self._step.result is None:
                self._state.finish_reduce()
                self._step.result, _ = self._totals(self._step)
            return replace(self._step.result, compute_s=self._step.compute_s)
        finally:
            if self._step.accumulates:
                self._state.end()
            self._step = outer

    def pass_through(self, program: Program, work: Work) -> None:
        """Play a program of forwards for what they compute, without counting anything."""
        outer, self._step = self._step, Step(work, work.counts)
        try:
            self._perform_all(program)
        finally:
            self._step = outer

    def _perform_all(self, program: Program) -> None:
        assert self._step is not None, "begun by the caller"
        instructions = program.instructions
        with self._state.by_program():
            for instruction, following in zip_longest(instructions, instructions[1:]):
                self._step.following = following
                self.perform(instruction)
            if self._passes.transfers is not None:
                self._passes.transfers.finish()

    def perform(self, instruction: Instruction) -> None:
        """Perform one instruction of the step under way; the first one starts a step."""
        step = self._step or self._begun()
        if instruction.op not in self._perform:
            raise ProgramError(
                f"{instruction} cannot be played here",
                rule="transfers are played in pipelines of several ranks, parts of backwards under "
                "zero-bubble schedules, and shifts not yet",
                fix="play sixfold.program.training for this layout; sixfold.simulate times the others",
            )
        dispatcher = self._mesh.dispatcher
        step.ready = began = time.monotonic()
        blocked = dispatcher.blocked_s
        self._perform[instruction.op](step, instruction)
        ended = time.monotonic()
        step.compute_s += ended - began - (dispatcher.blocked_s - blocked)
        if self.record is not None:
            self.record.append((instruction, step.ready, ended))

    def _begun(self) -> Step:
        if self._step is None:
            self._step = Step(Work(), Counts())
        return self._step

    def backward(self, micro: int, share: Share, *, retain_graph: bool) -> None:
        """Perform `backward` on a share that the caller made itself."""
        step = self._begun()
        step.count(share)
        step.shares[micro] = share
        if not step.accumulates:
            self._passes.begin(step)
        if self._state.reduces_with_backward:
            self._state.open_reduce()
        self._passes.backward(step, Instruction(Op.BACKWARD, 0, micro), retain_graph=retain_graph)
        if self._state.reduces_with_backward:
            # To its end here, where all ranks are: who has no further backward goes on to something else.
            self._state.finish_reduce()

    def update(self, counts: Counts, *, has_means: bool) -> StepResult:
        """Perform the end of a written-out step: `reduce 0 | step | publish 0`, less the reduction where
        every backward has had its own.

        Args:
            counts: samples and targets of this rank, which others along the tensor axis have too.
            has_means: whether a loss counts as a mean over samples.
        """
        try:
            step = self._begun()
            step.counts, step.has_means = counts if self._tells_loss else Counts(), has_means
            if not step.accumulates:
                self._passes.begin(step)
            reduce = "" if self._state.reduces_with_backward else "reduce 0 |"
            for instruction in Program.parse(f"{reduce} step | publish 0").instructions:
                self.perform(instruction)
            assert step.result is not None, "the instruction step leaves a result"
            return step.result
        finally:
            # An update that was refused is over too: the next one starts anew.
            self._step = None
            self._state.end()

    @property
    def is_idle(self) -> bool:
        """Whether no written-out step is under way."""
        return self._step is None

    def _update(self, step: Step, instruction: Instruction) -> None:
        self._state.finish_reduce()
        self._state.refresh()  # before anything changes, because it may refuse
        self._state.edits.absorb(in_update=True)
        self._state.sums.share()
        own_bounds = self._optimizer.clip_norms
        # Norms and losses are summed together, so that ranks meet once.
        totals, squares = self._totals(step, self._state.sums.squares(len(own_bounds)))
        if totals.weight == 0:
            raise ModelError(
                f"the global weight of this update is {totals.weight:g}: no rank had a sample or target, or "
                "called engine.backward since the last update",
                rule="an update averages over at least one sample",
                fix="call engine.backward(loss), not loss.backward(), before engine.step(); skip empty "
                "global batches; check the labels (-100 is left out)",
            )
        factor = step.work.scale / (totals.weight * self._scaler.scale)
        norms = tuple([math.sqrt(square) * abs(factor) for square in squares])
        grad_norm = math.hypot(*norms)
        step.result = replace(totals, grad_norm=grad_norm, group_norms=norms, loss_scale=self._scaler.scale)
        if not math.isfinite(grad_norm):
            if not self._scaler.back_off():
                raise self._state.sums.non_finite(grad_norm, step.result.loss_scale, current_session().step)
            step.result = replace(step.result, skipped=True)
            return
        self._scaler.passed()
        clips = clip_factors(norms, own_bounds, self._clip_norm)
        self._state.sums.scale([factor * clip for clip in clips])
        self._optimizer.step()

    def _totals(self, step: Step, squares: Sequence[float] = ()) -> tuple[StepResult, list[float]]:
        """Sums of what the ranks hold, judged, and of each rank's `squares`."""
        counted = step.counts.numbers()
        loss, weight, has_means, *numbers = self._mesh.total(
            sum(map(float, step.losses)) * self._tells_loss,
            sum(map(float, step.weights)) * self._tells_loss,
            float(step.has_means),
            *counted,
            *squares,
        )
        counts = Counts(*numbers[: len(counted)])
        if has_means:
            counts.refuse_ragged()
        mean = loss * step.work.scale / weight if weight else math.nan
        return StepResult(mean, weight, round(counts.samples)), numbers[len(counted) :]
