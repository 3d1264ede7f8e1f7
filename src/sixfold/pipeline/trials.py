"""Trials of a model before its first update: how it divides its loss, and whether its sequences may be cut.

Called with every rank's first batch. Ranks run the model by its programs, as in training, but on the
beginning of the batch and without gradients; those that have nothing to run serve the others. It changes no
number of the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sixfold.base.errors import ModelError
from sixfold.mesh import Mesh, Streams
from sixfold.models.evaluation import evaluating
from sixfold.parallel import Stage, off_zero
from sixfold.parallel.context.attention import OFF
from sixfold.pipeline.batch import (
    Batch,
    num_samples,
    tensors_of,
    to_device,
    with_targets,
    without_targets,
)
from sixfold.pipeline.comparing import compare
from sixfold.pipeline.loss import LossForm, Share, loss_of
from sixfold.pipeline.player import Player
from sixfold.pipeline.sequence import PER_TOKEN, Piece, SequenceCut
from sixfold.pipeline.step import Work
from sixfold.pipeline.transfers import kind_of
from sixfold.program import Program
from sixfold.state import ModelState

_BOUND, _NARROW_BOUND = 1e-4, 3e-2
"""How far numbers may be off by rounding, in fp32 and in 16 bits."""


class Trials:
    """Runs a model to find out what it does.

    Args:
        module: the user's own model.
        stages: its stages on this rank, by number.
        cast: type of the module's floating inputs; None: as they are given.
        program: this rank's program of forwards, for its number of micro-batches and of those it serves.
        loss_form: what is found out of the loss goes there.
        sequences: and of the cut.
    """

    def __init__(
        self,
        *,
        module: nn.Module,
        stages: Mapping[int, Stage],
        cast: torch.dtype | None,
        program: Callable[[int, int], Program],
        mesh: Mesh,
        streams: Streams,
        state: ModelState,
        player: Player,
        loss_form: LossForm,
        sequences: SequenceCut,
    ) -> None:
        self._module = module
        self._stages = stages
        self._has_loss = any(stage.is_last for stage in stages.values())
        self._cast = cast
        self._program = program
        self._mesh = mesh
        self._streams = streams
        self._state = state
        self._player = player
        self._loss_form = loss_form
        self._sequences = sequences

    def settle(self, batch: Batch) -> None:
        """Find out what is not known yet. Called on every rank until some rank had samples; ranks with empty
        shares follow the others. A collective.

        Raises:
            ModelError: the model does not give the same for sequences that are cut; on every rank.
        """
        if self._sequences.is_cut:
            if num_samples(batch):
                self._sequences.piece(batch, shift=None)  # refuses what cannot be cut at all
            compare(batch, self._mesh)
        short = self._sequences.short(batch)
        self._settle_loss(to_device(short, self._mesh.device, self._cast))
        if self._sequences.is_cut:
            self._settle_cut(short)

    def _settle_loss(self, batch: Batch) -> None:
        """Find out whether the model divides its loss by `num_items_in_batch`."""
        is_asked = self._loss_form.loss_fn is None and num_samples(batch) > 0 and self._takes_num_items(batch)
        found = -1
        with self._trying("settle", 2 if is_asked else 0, batch) as arrive:
            if is_asked:
                found = self._honoured_shift(batch)
            arrive()
        # Votes: -1 from ranks without samples or without the ability; a real shift otherwise.
        has_vote = self._has_loss and num_samples(batch) > 0
        votes = self._mesh.total(float(found == 0), float(found == 1), float(has_vote))
        for shift in (0, 1):
            if votes[shift] and votes[shift] == votes[2]:
                self._loss_form.shift = shift
        self._loss_form.is_settled = votes[2] > 0

    def _honoured_shift(self, batch: Batch) -> int:
        """How many leading labels the model leaves out of the sum it divides; -1 if it does not divide.

        The same sample is put in with `num_items_in_batch` = 1 and without: sum / mean is the number of
        targets the model itself counts. Accepting the argument proves nothing; some models ignore it.
        """
        one = {
            key: value[:1] if isinstance(value, Tensor) and value.dim() else value
            for key, value in batch.items()
        }
        labels, one = one["labels"], with_targets(one)
        try:
            mean = loss_of(self._output_of((), one))
            total = loss_of(self._output_of((), {**one, "num_items_in_batch": 1}))
        except TypeError:
            return -1
        if not isinstance(mean, Tensor) or not isinstance(total, Tensor) or labels.dim() < 2:
            return -1
        counted = float(total.double() / mean.double())
        for shift in (1, 0):
            if abs(counted - (labels[:, shift:]).numel()) < 0.01 * labels.numel() / labels.shape[-1]:
                return shift
        return -1

    def _settle_cut(self, short: Batch) -> None:
        """Find out whether the model gives the same for sequences that are cut."""
        tried = [short, *self._sequences.padded(short)] if num_samples(short) else []
        errors, sums = [0.0, 0.0], self._loss_form.shift is not None  # means may weigh padded parts unequally
        with (
            self._trying("cut", 2 * len(tried), short) as arrive,
            off_zero(self._module),
            self._sequences.noting() as refused,
        ):
            for number, each in enumerate(tried):
                errors[number] = self._difference_of_cut(each, compares_loss=not number or sums)
            arrive()
        self._judge_cut(errors[0], errors[1], refused)

    def _difference_of_cut(self, short: Batch, *, compares_loss: bool) -> float:
        """How far this rank's output and the sum of all parts' losses are from those of whole sequences,
        relative to these."""
        whole, piece = Piece(short), self._sequences.piece(short, shift=self._loss_form.shift)
        found = []
        for each in (whole, piece):
            each = replace(each, batch=to_device(each.batch, self._mesh.device, None))
            with self._sequences.running(each):
                output = self._output_of(*self._loss_form.arguments(each.batch, cast=self._cast))
            has_loss = compares_loss and self._has_loss
            value = self._loss_form.read(output, each, 1.0).value if has_loss else torch.zeros(())
            found.append((list(tensors_of(output)), value))
        (expected, loss), (outputs, part) = found
        total = part.detach().double().reshape(1)
        self._mesh.along("context").all_reduce(total).wait()
        errors = [abs(float(total) - float(loss)) / max(abs(float(loss)), 1e-30)]
        # Scores may be missing in one of them: there are fewer in a part, and only many are left out.
        for one, other in zip(expected, outputs, strict=True) if len(expected) == len(outputs) else ():
            errors += self._difference_of_tensor(one, other, piece)
        return float(torch.tensor(errors).max())  # of which one that is no number is the largest

    def _difference_of_tensor(self, whole: Tensor, part: Tensor, piece: Piece) -> list[float]:
        """The same of one tensor of the output; nothing where it has not one entry a token."""
        assert piece.sequences is not None, "asked where something is cut"
        length, keys = piece.sequences.length, piece.sequences.keys
        if whole.dim() < 2 or whole.shape[1] != length or not whole.is_floating_point():
            return []
        visible, far = _visible(whole, keys), float("inf")
        rows = self._sequences.rows(visible)
        if rows.shape == part.shape:
            own = None if keys is None else self._sequences.rows(keys)
            far = float((rows - _visible(part, own)).abs().max())
        return [far / max(float(visible.abs().max()), 1e-30)]

    def _judge_cut(self, error: float, padded_error: float, refused: Sequence[ModelError]) -> None:
        """Raise ModelError where some rank had to refuse a mask, or the difference is more than rounding.
        Where only that with hidden tokens is, batches that have such are refused from now on."""
        is_narrow = next((each.itemsize < 4 for each in self._module.parameters()), False)
        bound = _NARROW_BOUND if is_narrow else _BOUND
        num_ranks = self._mesh.along("context").num_ranks
        cut = f"{type(self._module).__name__} over layout.context = {num_ranks}"
        if self._mesh.any(bool(refused)):
            elsewhere = ModelError(
                f"{cut}: another rank refuses the attention mask of its rows",
                rule="attention across ranks knows of masks what the batch says: documents, padding, order",
                fix=f"do what the error of that rank says, or {OFF}",
            )
            raise refused[0] if refused else elsewhere
        if self._mesh.any(not error <= bound):
            raise ModelError(
                f"{cut}: its outputs for a sequence that is cut differ by {error:.1e} from those for the "
                "whole one",
                rule="attention by scaled_dot_product_attention alone may mix tokens, positions are told by "
                f"position_ids or by the model's {PER_TOKEN}, and the loss is a sum or mean over tokens, "
                "whose labels are not shifted by a loss_fn",
                fix=f"shift labels in the batch, give the model {PER_TOKEN}(...) -> fields [batch, length], "
                f"or {OFF}",
            )
        self._sequences.counts_positions = self._mesh.any(not padded_error <= bound)

    @contextmanager
    def _trying(self, what: str, num_trials: int, batch: Batch) -> Iterator[Callable[[], object]]:
        """Inside, this rank runs the model `num_trials` times, in evaluation mode and without gradients, and
        ranks that run it less often serve the others; gives what it calls when it has."""
        with evaluating(self._module), torch.no_grad(), self._streams.keyed("settle"):
            if self._mesh.pipe_ranks == 1:
                if self._mesh.geometry.degree("expert") > 1:  # ranks wait for each other's tokens
                    bare = to_device(without_targets(batch), self._mesh.device, None)
                    for _ in range(num_trials, self._mesh.largest(num_trials)):
                        self._output_of(*self._loss_form.arguments(bare, cast=self._cast))
                yield lambda: self._state.arrive(what)
                return
            most = self._state.largest(what, num_trials)
            compare(batch, self._mesh)
            if self._state.residency.parameters and not num_trials:
                for _ in range(most):
                    self._player.pass_through(self._program(0, 1), Work())
            yield lambda: None

    def _output_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The model's output, None on ranks that have not the last stage."""
        if self._mesh.pipe_ranks == 1:
            return self._module(*args, **kwargs)
        outputs: list[Any] = []

        def run(number: int, micro: int, received: Any) -> Any:
            stage = self._stages[number]
            try:
                output = stage(received, args, kwargs)
            except TypeError as error:  # the other stages wait, so it cannot be tried another way
                raise ModelError(
                    f"{type(self._module).__name__} with num_items_in_batch: {error}",
                    rule="a model that takes any keyword argument is asked whether it divides its loss by it",
                    fix="give a loss_fn to sixfold.initialize",
                ) from error
            if not stage.is_last:
                return output
            outputs.append(output)
            return Share(torch.zeros(()), None)

        work = Work(run, kinds=[kind_of((args, kwargs), self._module)])
        self._player.pass_through(self._program(1, 0), work)
        return outputs[0] if outputs else None

    def _takes_num_items(self, batch: Batch) -> bool:
        if not isinstance(batch, Mapping) or "labels" not in batch:
            return False
        parameters = inspect.signature(self._module.forward).parameters
        return "num_items_in_batch" in parameters or any(
            parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()
        )


def _visible(output: Tensor, keys: Tensor | None) -> Tensor:
    """An output [batch, length, ...] with zeros for padding: what that comes to is nobody's business."""
    if keys is None:
        return output.double()
    return output.double().masked_fill(~keys.view(*keys.shape, *[1] * (output.dim() - 2)), 0.0)
