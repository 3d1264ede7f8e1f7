"""Loss normalisation: one division by the global weight of the update, whatever the partition.

A micro-batch's loss is read as a share: a sum over a common scale P, and its weight. P is a guess at the
update's global weight that all ranks share before the first forward; at `step` gradients are multiplied
once by P / (global weight), which is exactly 1 where the guess was right. Used by all who run the model;
it never calls backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import nn

from sixfold.base.errors import ModelError
from sixfold.mesh import Mesh
from sixfold.models.chunks import IGNORED
from sixfold.pipeline.batch import Batch, cast_floating, fields_of, lengths_of, num_samples, targets_of
from sixfold.pipeline.sequence import Piece

WAYS = (
    "return (sum, weight) from the model or from loss_fn, or call engine.backward(loss, weight=...) "
    "with the micro-batch's number of targets"
)


@dataclass(frozen=True)
class Share:
    """One micro-batch's part of the loss.

    Args:
        value: what backward starts from, a 0-d tensor: summed loss / P.
        weight: what the sum is a sum over; None for a further loss of a micro-batch already counted.
        is_mean: whether it was a mean over samples, which only holds where all have equally many targets.
    """

    value: torch.Tensor
    weight: torch.Tensor | float | None
    is_mean: bool = False


@dataclass(frozen=True)
class Counts:
    """Samples and targets, summable over micro-batches and ranks.

    `targets` counts labels that are not -100, `shifted` leaves out each sequence's first one (causal
    models predict the next token); the squares decide whether all samples have equally many.
    """

    samples: float = 0.0
    targets: float = 0.0
    targets_squared: float = 0.0
    shifted: float = 0.0
    shifted_squared: float = 0.0

    @classmethod
    def of(cls, batch: Batch) -> Counts:
        """Count a batch; without integer labels every sample is one target."""
        samples = float(num_samples(batch))
        labels = targets_of(batch)
        if labels is None:
            return cls(samples, samples, samples, samples, samples)
        valid = (labels != IGNORED).double()
        # Classes have no order, so nothing is left out of one-dimensional labels.
        whole = valid.flatten(1).sum(1) if valid.dim() > 1 else valid
        shifted = valid.flatten(1)[:, 1:].sum(1) if valid.dim() > 1 else valid
        return cls(
            samples,
            float(whole.sum()),
            float(whole.square().sum()),
            float(shifted.sum()),
            float(shifted.square().sum()),
        )

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(mine + theirs for mine, theirs in zip(self.numbers(), other.numbers(), strict=True)))

    def numbers(self) -> tuple[float, ...]:
        """The fields in order."""
        return astuple(self)

    @property
    def is_ragged(self) -> bool:
        """Whether samples differ in their number of targets: n sum(x^2) = (sum x)^2 exactly where not."""
        return (
            self.samples * self.targets_squared != self.targets**2
            or self.samples * self.shifted_squared != self.shifted**2
        )

    def refuse_ragged(self) -> None:
        """Raise when a mean over samples would weigh targets unequally."""
        if self.is_ragged:
            raise ModelError(
                f"a mean loss over {self.samples:.0f} samples with {self.targets:.0f} targets, unequally "
                "many per sample",
                rule="a bare scalar counts as the mean over samples; with ragged targets the update would "
                "depend on how the batch is cut",
                fix=WAYS,
            )


class LossForm:
    """How a model is asked for its loss and how that is read; settled once, by `Trials` on the first batch.

    Args:
        module: the model.
        loss_fn: `loss_fn(output, batch)`, in place of the model's own loss.

    Attributes:
        shift: labels that the model leaves out at the beginning of each sequence, where it divides its summed
            loss by `num_items_in_batch`; None where it does not, or it is not known.
        is_settled: whether it is known.
    """

    def __init__(self, module: nn.Module, loss_fn: Callable[[Any, Batch], Any] | None) -> None:
        self._module = module
        self.loss_fn = loss_fn
        self.shift: int | None = None
        self.is_settled = False

    def arguments(
        self, batch: Batch, scale: float = 1.0, *, cast: torch.dtype | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the module is called with for a micro-batch.

        Args:
            scale: P, handed to a model that divides by it.
            cast: type of the module's floating inputs; None: as they are given. The loss function sees
                targets and weights as they were given.
        """
        inputs = batch if cast is None else cast_floating(batch, cast)
        args, kwargs = fields_of(inputs, self._module.forward, all_of_them=self.loss_fn is None)
        if self.shift is not None:
            kwargs["num_items_in_batch"] = scale
        return args, kwargs

    def scale(self, counts: Counts, last_weight: float | None, mesh: Mesh) -> float:
        """P of an update: its targets where the model divides by them, else the last update's weight.

        Args:
            counts: this rank's own.
            last_weight: global weight of the update before; None for the first, which takes samples.
        """
        if last_weight is not None and self.shift is None:
            return last_weight
        update = Counts(*mesh.total(*counts.numbers()))
        # Where nobody has any, whatever divides by P comes to nothing all the same.
        return (self._items(update) if self.shift is not None else update.samples) or 1.0

    def read(self, output: Any, piece: Piece, scale: float) -> Share:
        """A micro-batch's share of the loss, divided by P = `scale`.

        Args:
            piece: what the output came from.
        """
        batch = piece.batch
        result = self.loss_fn(output, batch) if self.loss_fn is not None else loss_of(output)
        if isinstance(result, tuple | list) and len(result) == 2:
            return Share(number_of(result[0], "the first of a tuple of 2") / scale, weight_of(result[1]))
        value = number_of(result, "the loss")
        if self.shift is not None:
            return Share(value, self._items(Counts.of(batch)) if piece.targets is None else piece.targets)
        lengths = lengths_of(batch)
        if len(lengths) > 1:
            raise ModelError(
                f"a mean loss over a batch whose tensors have {', '.join(map(str, lengths))} entries "
                "along dim 0",
                rule="a bare scalar counts as the mean over samples, so their number must be plain",
                fix="return (sum, weight) from the model or from loss_fn",
            )
        samples = lengths[0] * piece.share
        if not lengths[0] * piece.least:  # judged alike on all ranks that share them
            raise ModelError(
                f"a mean loss over {lengths[0]} samples, of whose targets a rank has {piece.least:.0%}, run "
                "where other ranks have more",
                rule="a mean over nothing is no number",
                fix="return (sum, weight) from the model or from loss_fn, or give every rank as many samples "
                "as there are micro-batches, with targets in every part of a sequence",
            )
        return Share(value * (samples / scale), samples, is_mean=True)

    def _items(self, counts: Counts) -> float:
        return counts.shifted if self.shift == 1 else counts.targets


def weight_of(value: Any) -> float:
    """A weight as a number.

    Raises:
        ModelError: it is not one finite number, or negative.
    """
    try:
        weight = float(value)
    except (TypeError, ValueError, RuntimeError):
        weight = math.nan
    if not math.isfinite(weight) or weight < 0:
        raise ModelError(
            f"a loss with the weight {value!r}"[:160],
            rule="a weight says what a loss is a sum or mean over: one finite number, not negative",
            fix="give the number of samples or targets, for example targets.numel()",
        )
    return weight


def number_of(loss: Any, what: str) -> torch.Tensor:
    """A loss as a 0-d tensor.

    Raises:
        ModelError: it is not one real number in a tensor.
    """
    is_one = isinstance(loss, torch.Tensor) and loss.numel() == 1 and loss.is_floating_point()
    if not is_one:
        raise ModelError(
            f"{what} is {_describe(loss)}",
            rule="a loss is one number in a floating tensor, an output with .loss, or a pair (sum, weight)",
            fix="reduce it to a number, for example loss.mean(), and return that from forward or from the "
            "loss_fn(output, batch) given to sixfold.initialize",
        )
    # Dividing and summing losses in a narrow type would lose digits that the model has computed.
    number: torch.Tensor = loss.reshape(()).to(torch.promote_types(loss.dtype, torch.float32))
    if torch.is_grad_enabled() and not number.requires_grad:
        raise ModelError(
            f"{what} is {_describe(loss)} without a gradient",
            rule="a loss is computed from trainable parameters, with gradients enabled",
            fix="leave out detach(), item() and no_grad() on the way from the parameters to the loss",
        )
    return number


def loss_of(output: Any) -> Any:
    """The loss in a model's output: `.loss`, `["loss"]`, or the output itself."""
    if isinstance(output, Mapping):
        return output.get("loss", output)
    return getattr(output, "loss", output)


def _describe(result: Any) -> str:
    if isinstance(result, torch.Tensor):
        return f"a tensor of shape {tuple(result.shape)}"
    if isinstance(result, tuple | list):
        return f"a {type(result).__name__} of {len(result)}"
    return f"{type(result).__name__} {result!r}"[:120]
