"""Passes: forwards and backwards of stages, and what goes between them.

The player has these instructions performed here, in the order of its program. Losses are counted as forwards
give them, and nothing is updated.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from sixfold.base.errors import ProgramError
from sixfold.parallel import Deferral
from sixfold.pipeline.scaling import LossScaler
from sixfold.pipeline.step import Step
from sixfold.pipeline.transfers import Received, Transfers, form_of, received
from sixfold.program import WEIGHT_PARTS, Instruction, Op
from sixfold.state import ModelState


class Passes:
    """Performs the passes, transfers, windows and reductions of one rank.

    Args:
        state: whose verbs are called.
        scaler: the factor on losses under fp16.
        last_stage: the one that computes the loss.
        transfers: to and from other stages; None in a pipeline of one stage.
        deferral: where weight parts of backwards are put off to; None where they are not.
    """

    def __init__(
        self,
        state: ModelState,
        scaler: LossScaler,
        last_stage: int = 0,
        transfers: Transfers | None = None,
        deferral: Deferral | None = None,
    ) -> None:
        self._state = state
        self._scaler = scaler
        self._last_stage = last_stage
        self.transfers = transfers
        self._deferral = deferral
        self.perform: dict[Op, Callable[[Step, Instruction], None]] = {
            Op.FORWARD: self.forward,
            Op.BACKWARD: self.backward,
            Op.SERVE_FORWARD: lambda step, instruction: self._state.serve_forward(instruction.place[0]),
            Op.SERVE_BACKWARD: self.serve_backward,
            Op.GATHER: lambda step, instruction: self._state.keep(instruction.place[0], is_kept=True),
            Op.DROP: lambda step, instruction: self._state.keep(instruction.place[0], is_kept=False),
            Op.REDUCE: self.reduce,
            Op.PUBLISH: lambda step, instruction: self._state.publish(instruction.place[0]),
        }
        """By kind of instruction, those that can be played in this layout."""
        if transfers is not None:
            self.perform |= {
                Op.SEND_ACTIVATION: self._send_activation,
                Op.RECEIVE_ACTIVATION: self._receive_activation,
                Op.SEND_GRADIENT: self._send_gradient,
                Op.RECEIVE_GRADIENT: self._receive_gradient,
            }
        if deferral is not None:
            self.perform |= {
                Op.BACKWARD_INPUT: self._backward_input,
                Op.BACKWARD_WEIGHT: self._backward_weight,
            }

    def begin(self, step: Step) -> None:
        """Gradients of the last update go; once a step."""
        self._state.begin()
        step.accumulates = True

    def forward(self, step: Step, instruction: Instruction) -> None:
        """Run a stage on what it has received."""
        stage, micro = place = instruction.place
        taken = step.inputs.pop(place, Received())  # from another stage of this rank
        if message := step.messages.pop((Op.RECEIVE_ACTIVATION, *place), None):
            taken = self._between.take_activation(stage, message)
            step.ready = time.monotonic()
        if step.work.enter is not None:
            step.work.enter(micro)
        result = step.work.run(stage, micro, taken.value)
        if torch.is_grad_enabled():
            step.inputs[place] = taken
        if stage == self._last_stage:
            step.shares[micro] = result
            step.count(result)
            return
        is_local = self._between.is_local(stage, stage + 1)
        if is_local:
            step.inputs[stage + 1, micro] = received(*form_of(result))
        if torch.is_grad_enabled() or not is_local:  # the backward starts from it, or it is sent
            step.outputs[place] = result

    def _send_activation(self, step: Step, instruction: Instruction) -> None:
        stage, micro = place = instruction.place
        self._between.send_activation(stage, micro, step.work.kinds[micro], step.outputs[place])
        if not torch.is_grad_enabled():
            del step.outputs[place]

    def _receive_activation(self, step: Step, instruction: Instruction) -> None:
        stage, micro = instruction.place
        message = self._between.receive_activation(stage, step.work.kinds[micro])
        step.messages[instruction.op, stage, micro] = message

    def _send_gradient(self, step: Step, instruction: Instruction) -> None:
        place = instruction.place
        self._between.send_gradient(*place, step.inputs.pop(place).gradients())

    def _receive_gradient(self, step: Step, instruction: Instruction) -> None:
        stage, micro = place = instruction.place
        message = self._between.receive_gradient(stage, _learning(step.outputs[place]))
        step.messages[instruction.op, stage, micro] = message

    def backward(self, step: Step, instruction: Instruction, *, retain_graph: bool = False) -> None:
        """Run it backward."""
        if not step.accumulates:
            self.begin(step)
        with self._state.backward(instruction.place[0]):
            self._run_backward(step, instruction, retain_graph=retain_graph)

    def _backward_input(self, step: Step, instruction: Instruction) -> None:
        assert self._deferral is not None, "performed only with one"
        if not step.accumulates:
            self.begin(step)
        place = instruction.place
        with self._state.backward_input(place[0]), self._deferral.put_off() as queue:
            self._run_backward(step, instruction)
        step.put_off[place] = queue

    def _backward_weight(self, step: Step, instruction: Instruction) -> None:
        place = instruction.place
        with torch.no_grad():
            queue = step.put_off.pop(place)
            while queue:
                product = queue.pop(0)
                self._state.put_off(product.weight, product.compute())
        self._state.complete(place[0])

    def _run_backward(self, step: Step, instruction: Instruction, *, retain_graph: bool = False) -> None:
        stage, micro = place = instruction.place
        if stage == self._last_stage:
            share = step.shares.pop(micro, None)
            if share is None:
                raise ProgramError(
                    f"{instruction} without a forward of micro-batch {micro}",
                    rule="a backward follows its forward, once",
                    fix="put the forward before it in the program",
                )
            roots = [share.value]
            gradients = [torch.full_like(share.value, self._scaler.scale)]
        else:
            gradients = step.gradients.pop(place, [])
            if message := step.messages.pop((Op.RECEIVE_GRADIENT, *place), None):
                gradients = self._between.take_gradient(stage, micro, message)
                step.ready = time.monotonic()
            roots = _learning(step.outputs.pop(place))
        if step.work.enter is not None:
            step.work.enter(micro)  # parts of the forward may run again
        if roots:
            torch.autograd.backward(roots, gradients, retain_graph=retain_graph)
        if stage > 0 and self._between.is_local(stage, stage - 1):
            step.gradients[stage - 1, micro] = step.inputs.pop(place).gradients()

    @property
    def _between(self) -> Transfers:
        assert self.transfers is not None, "a pipeline of several stages has transfers"
        return self.transfers

    def serve_backward(self, step: Step, instruction: Instruction) -> None:
        """Take part in the backward of other data ranks."""
        if not step.accumulates:
            self.begin(step)
        self._state.serve_backward(instruction.place[0], puts_off=self._deferral is not None)

    def reduce(self, step: Step, instruction: Instruction) -> None:
        """Open a reduction window."""
        if not step.accumulates:
            self.begin(step)
        stage, following = instruction.place[0], step.following
        self._state.open_reduce(stage)
        ends = (*WEIGHT_PARTS, Op.SERVE_BACKWARD)
        if following is None or following.stage != stage or following.op not in ends:
            self._state.complete(stage)  # nothing comes into this window here, whatever others have


def _learning(output: Any) -> list[torch.Tensor]:
    """The tensors of a stage's output that have a gradient."""
    return [tensor for tensor in form_of(output)[1] if tensor.requires_grad]
