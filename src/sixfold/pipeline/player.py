"""The player: performs a program's instructions on this rank.

The engine hands it a whole program, or the single instructions of a written-out loop: one code path
for both. It calls the verbs of the state engine in the order the program says and never chooses an
order itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from time import perf_counter

import torch

from sixfold.base.errors import ModelError, ProgramError
from sixfold.launch import current_session
from sixfold.mesh import Mesh
from sixfold.pipeline.clipping import clip_factors
from sixfold.pipeline.loss import Counts, Share
from sixfold.pipeline.scaling import LossScaler
from sixfold.program import Instruction, Op, Program
from sixfold.state import BoundOptimizer, ModelState


@dataclass(frozen=True)
class StepResult:
    """What one program came to, the same on every rank.

    Args:
        loss: mean loss over the global batch.
        weight: what it is a mean over: samples, or targets where the loss says so.
        samples: in the global batch.
        grad_norm: 2-norm of the gradient of that mean, before clipping; None without an update.
        group_norms: the same of each parameter group, in the optimizer's order.
        loss_scale: the factor on losses in backward, taken off the gradients again.
        skipped: whether the update was left out, on every rank, because gradients overflowed in fp16.
        compute_s: seconds that this rank alone spent in the instructions of a whole program, less those in
            which it stood still for exchanges; None for a written-out step.
    """

    loss: float
    weight: float
    samples: int
    grad_norm: float | None = None
    group_norms: tuple[float, ...] = ()
    loss_scale: float = 1.0
    skipped: bool = False
    compute_s: float | None = field(default=None, compare=False)


@dataclass
class _Step:
    """The step under way: shares whose backward is still to come, and the sums so far."""

    scale: float
    counts: Counts = field(default_factory=Counts)
    forwards: Mapping[int, Callable[[], Share]] = field(default_factory=dict)
    shares: dict[int, Share] = field(default_factory=dict)
    losses: list[torch.Tensor] = field(default_factory=list)
    weights: list[torch.Tensor | float] = field(default_factory=list)
    has_means: bool = False
    accumulates: bool = False
    compute_s: float = 0.0
    result: StepResult | None = None


class Player:
    """Plays programs of one stage.

    Args:
        state: whose verbs are called.
        optimizer: what `step` runs.
        clip_norm: bound on the gradient norm of all groups that have none of their own; None for no bound.
        scaler: the factor on losses under fp16.
    """

    def __init__(
        self,
        state: ModelState,
        optimizer: BoundOptimizer,
        mesh: Mesh,
        *,
        clip_norm: float | None,
        scaler: LossScaler,
    ) -> None:
        self._state = state
        self._optimizer = optimizer
        self._mesh = mesh
        self._clip_norm = clip_norm
        self._scaler = scaler
        self._step: _Step | None = None
        self._perform: dict[Op, Callable[[_Step, Instruction], None]] = {
            Op.FORWARD: self._forward,
            Op.BACKWARD: self._backward,
            Op.SERVE_FORWARD: lambda step, instruction: self._state.serve_forward(),
            Op.SERVE_BACKWARD: self._serve_backward,
            Op.REDUCE: self._reduce,
            Op.STEP: self._update,
            Op.PUBLISH: lambda step, instruction: self._state.publish(),
        }

    def play(
        self, program: Program, forwards: Mapping[int, Callable[[], Share]], scale: float, counts: Counts
    ) -> StepResult:
        """Play a whole program.

        A written-out step under way is left as it is, so that one may evaluate in its middle.

        Args:
            forwards: runs the stage on one micro-batch, by its number.
            scale: P, by which the shares are divided already.
            counts: this rank's samples and targets.

        Raises:
            ModelError: a micro-batch's loss is a mean over samples that have unequally many targets;
                every rank raises, those without a micro-batch too.
        """
        outer, self._step = self._step, _Step(scale, counts, forwards)
        try:
            with self._state.by_program():
                for instruction in program.instructions:
                    self.perform(instruction)
            if self._step.result is None:
                self._state.finish_reduce()
                self._step.result = self._start_totals(self._step)()
            return replace(self._step.result, compute_s=self._step.compute_s)
        finally:
            if self._step.accumulates:
                self._state.end()
            self._step = outer

    def perform(self, instruction: Instruction) -> None:
        """Perform one instruction of the step under way; the first one starts a step."""
        if self._step is None:
            self._step = _Step(scale=1.0)
        if instruction.op not in self._perform:
            raise ProgramError(
                f"{instruction} cannot be played yet",
                rule="a program of one stage, whole on its rank, is played",
                fix="play sixfold.program.accumulation or forward_only; sixfold.simulate times the others",
            )
        dispatcher = self._mesh.dispatcher
        began, blocked = perf_counter(), dispatcher.blocked_s
        self._perform[instruction.op](self._step, instruction)
        self._step.compute_s += perf_counter() - began - (dispatcher.blocked_s - blocked)

    def backward(self, micro: int, share: Share, *, retain_graph: bool) -> None:
        """Perform `backward` on a share that the caller made itself."""
        if self._step is None:
            self._step = _Step(scale=1.0)
        self._count(self._step, share)
        self._step.shares[micro] = share
        self._accumulate(self._step)
        if self._state.reduces_with_backward:
            self._state.open_reduce()
        self._backward(self._step, Instruction(Op.BACKWARD, 0, micro), retain_graph=retain_graph)
        if self._state.reduces_with_backward:
            # To its end here, where all ranks are: who has no further backward goes on to something else.
            self._state.finish_reduce()

    def update(self, counts: Counts, *, has_means: bool) -> StepResult:
        """Perform the end of a written-out step: `reduce 0 | step | publish 0`, less the reduction where
        every backward has had its own.

        Args:
            counts: this rank's samples and targets.
            has_means: whether a loss counts as a mean over samples.
        """
        try:
            if self._step is None:
                self._step = _Step(scale=1.0)
            self._step.counts, self._step.has_means = counts, has_means
            self._accumulate(self._step)
            reduce = "" if self._state.reduces_with_backward else "reduce 0 |"
            for instruction in Program.parse(f"{reduce} step | publish 0").instructions:
                self.perform(instruction)
            assert self._step.result is not None, "the instruction step leaves a result"
            return self._step.result
        finally:
            # An update that was refused is over too: the next one starts anew.
            self._step = None
            self._state.end()

    @property
    def is_idle(self) -> bool:
        """Whether no written-out step is under way."""
        return self._step is None

    def _forward(self, step: _Step, instruction: Instruction) -> None:
        assert instruction.micro is not None, "instructions check their own numbers"
        share = step.forwards[instruction.micro]()
        step.shares[instruction.micro] = share
        self._count(step, share)

    def _backward(self, step: _Step, instruction: Instruction, *, retain_graph: bool = False) -> None:
        assert instruction.micro is not None, "instructions check their own numbers"
        share = step.shares.pop(instruction.micro, None)
        if share is None:
            raise ProgramError(
                f"{instruction} without a forward of micro-batch {instruction.micro}",
                rule="a backward follows its forward, once",
                fix="put the forward before it in the program",
            )
        self._accumulate(step)
        scale = torch.full_like(share.value, self._scaler.scale)
        with self._state.backward():
            share.value.backward(scale, retain_graph=retain_graph)  # type: ignore[no-untyped-call]

    def _serve_backward(self, step: _Step, instruction: Instruction) -> None:
        self._accumulate(step)
        self._state.serve_backward()

    def _reduce(self, step: _Step, instruction: Instruction) -> None:
        self._accumulate(step)
        self._state.open_reduce()

    def _update(self, step: _Step, instruction: Instruction) -> None:
        # The sums travel behind the gradients, so that ranks meet once.
        self._state.flush_reduce()
        sums = self._start_totals(step)
        self._state.finish_reduce()
        totals = sums()
        if totals.weight == 0:
            raise ModelError(
                f"the global weight of this update is {totals.weight:g}: no rank had a sample or target, or "
                "called engine.backward since the last update",
                rule="an update averages over at least one sample",
                fix="call engine.backward(loss), not loss.backward(), before engine.step(); skip empty "
                "global batches; check the labels (-100 is left out)",
            )
        factor = step.scale / (totals.weight * self._scaler.scale)
        own_bounds = self._optimizer.clip_norms
        norms = tuple(norm * abs(factor) for norm in self._state.grad_norms(len(own_bounds)))
        grad_norm = math.hypot(*norms)
        step.result = replace(totals, grad_norm=grad_norm, group_norms=norms, loss_scale=self._scaler.scale)
        if not math.isfinite(grad_norm):
            if not self._scaler.back_off():
                raise self._state.non_finite(grad_norm, step.result.loss_scale, current_session().step)
            step.result = replace(step.result, skipped=True)
            return
        self._scaler.passed()
        clips = clip_factors(norms, own_bounds, self._clip_norm)
        self._state.scale_grads([factor * clip for clip in clips])
        self._optimizer.step()

    def _accumulate(self, step: _Step) -> None:
        if not step.accumulates:
            self._state.begin()
            step.accumulates = True

    def _count(self, step: _Step, share: Share) -> None:
        step.losses.append(share.value.detach())
        step.has_means |= share.is_mean
        if share.weight is not None:
            step.weights.append(share.weight)

    def _start_totals(self, step: _Step) -> Callable[[], StepResult]:
        """Start to sum what the ranks hold; the function returned waits, and judges the sums."""
        sums = self._mesh.start_total(
            sum(float(value) for value in step.losses),
            sum(float(value) for value in step.weights),
            float(step.has_means),
            *step.counts.numbers(),
        )

        def result() -> StepResult:
            loss, weight, has_means, *numbers = sums()
            counts = Counts(*numbers)
            if has_means:
                counts.refuse_ragged()
            mean = loss * step.scale / weight if weight else math.nan
            return StepResult(mean, weight, round(counts.samples))

        return result
