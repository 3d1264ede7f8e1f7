"""The head of a language model that is cut along the vocabulary, and the loss behind it.

Made by `forwards.py`. Where the model computes its loss by itself and asks for nothing else, each rank
keeps the scores of its own entries; elsewhere (generation, a loss function of the user's) scores are
gathered.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sixfold.models import decoder
from sixfold.models.chunks import IGNORED, summed_cross_entropy
from sixfold.parallel.blocks import own_forward, put_forward
from sixfold.parallel.chunked_loss import OF_ROWS
from sixfold.parallel.tensor.crossing import COPIED, GATHERED, Axis, cross
from sixfold.parallel.tensor.cut import TensorCut
from sixfold.parallel.tensor.vocabulary import Vocabulary, losses_of


@dataclass
class Head:
    """A head and how the model's loss is computed from its part of the scores.

    Args:
        name: of the module, or of the method of the model that is the head.
    """

    model: nn.Module
    name: str
    vocabulary: Vocabulary
    is_parted: bool = field(default=False, init=False)

    @classmethod
    def find(cls, model: nn.Module, cut: TensorCut, axis: Axis) -> Head | None:
        """The head that is cut; None where there is none."""
        found = next((layer for layer in cut.layers if layer.style.role == "scores"), None)
        if found is None:
            return None
        # A head that is a method has no weight of its own, but that of the embedding.
        embeddings = (layer.size for layer in cut.layers if layer.style.role == "vocabulary")
        return cls(model, found.name, Vocabulary(axis, found.size or next(embeddings)))

    @property
    def is_method(self) -> bool:
        """Whether it is no module of its own."""
        return not isinstance(getattr(self.model, self.name, None), nn.Module) and "." not in self.name

    def leave(self, scores: Tensor) -> Tensor:
        """What the head returns."""
        if self.is_parted or scores.shape[-1] == self.vocabulary.size:
            return scores
        return cross(scores, GATHERED, self.vocabulary.axis, -1, self.vocabulary.size)

    def attach(self, owns_loss: bool) -> list[Callable[[], None]]:
        """Put the loss over the cut vocabulary where the model calls its own; returns what undoes it."""
        undo = [self._attach_method()] if self.is_method else []
        if not owns_loss:
            return undo
        if isinstance(self.model, decoder.Decoder):
            if self.model.loss is summed_cross_entropy:
                undo += [self._attach_loss(self.model), self._attach_scores()]
        elif getattr(getattr(self.model, "loss_function", None), "__name__", "") == "ForCausalLMLoss":
            undo += [self._attach_causal_loss(), self._attach_forward()]
        return undo

    def _attach_method(self) -> Callable[[], None]:
        own = getattr(type(self.model), self.name)

        def head(model: nn.Module, hidden: Tensor) -> Tensor:
            return self.leave(own(model, cross(hidden, COPIED, self.vocabulary.axis)))

        setattr(self.model, self.name, MethodType(head, self.model))
        return lambda: delattr(self.model, self.name)

    def _attach_loss(self, model: decoder.Decoder) -> Callable[[], None]:
        own = model.loss

        def loss(scores: Tensor, targets: Tensor) -> Tensor:
            if scores.shape[-1] == self.vocabulary.size:
                return own(scores, targets)
            return losses_of(scores, targets, self.vocabulary).sum()

        model.loss = loss
        return lambda: setattr(model, "loss", own)

    def _attach_causal_loss(self) -> Callable[[], None]:
        model: Any = self.model
        own, was_set = model.loss_function, "_loss_function" in vars(model)

        def of_rows(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
            with self._parted():  # backward comes here again, outside of the model's forward
                scores = head(hidden)
            return losses_of(scores.float(), targets, self.vocabulary).sum()

        @functools.wraps(own)
        def loss(
            logits: Tensor,
            labels: Tensor,
            vocab_size: int,
            num_items_in_batch: Tensor | float | None = None,
            ignore_index: int = IGNORED,
            shift_labels: Tensor | None = None,
            **kwargs: Any,
        ) -> Tensor:
            if logits.shape[-1] == self.vocabulary.size:
                return own(  # type: ignore[no-any-return]
                    logits,
                    labels,
                    vocab_size,
                    num_items_in_batch=num_items_in_batch,
                    ignore_index=ignore_index,
                    shift_labels=shift_labels,
                    **kwargs,
                )
            if shift_labels is None:
                shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
            targets = shift_labels.reshape(-1).to(logits.device)
            losses = losses_of(logits.float().flatten(0, -2), targets, self.vocabulary, ignore_index)
            count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
            return losses.sum() / count

        setattr(loss, OF_ROWS, of_rows)
        model.loss_function = loss

        def undo() -> None:
            if was_set:
                model.loss_function = own
            else:
                del model._loss_function

        return undo

    def _attach_scores(self) -> Callable[[], None]:
        """A decoder's head is asked by its loss, also in recomputed chunks, and by `logits` for all."""
        model: Any = self.model
        self.is_parted = True

        def logits(model: decoder.Decoder, *args: Any, **kwargs: Any) -> Tensor:
            with self._parted(False):
                return decoder.Decoder.logits(model, *args, **kwargs)

        model.logits = MethodType(logits, model)
        return lambda: delattr(model, "logits")

    def _attach_forward(self) -> Callable[[], None]:
        model = self.model
        own = own_forward(model)

        @functools.wraps(own)
        def forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not self._has_labels(args, kwargs):
                return own(model, *args, **kwargs)
            with self._parted():
                output = own(model, *args, **kwargs)
            if isinstance(output, tuple):  # by return_dict=False, (loss, scores, ...)
                return output[:1] + output[2:] if self._is_part(output[1]) else output
            logits = getattr(output, "logits", None)
            if self._is_part(logits):
                # No rank has them whole: better none than a part that looks like all.
                return dataclasses.replace(output, logits=None)
            return output

        return put_forward(model, MethodType(forward, model))

    def _is_part(self, scores: Any) -> bool:
        return isinstance(scores, Tensor) and scores.shape[-1] < self.vocabulary.size

    def _has_labels(self, args: Any, kwargs: Any) -> bool:
        if kwargs.get("labels") is not None:
            return True
        names = list(inspect.signature(type(self.model).forward).parameters)[1:]
        return "labels" in names[: len(args)] and args[names.index("labels")] is not None

    @contextmanager
    def _parted(self, flag: bool = True) -> Iterator[None]:
        before, self.is_parted = self.is_parted, flag
        try:
            yield
        finally:
            self.is_parted = before
