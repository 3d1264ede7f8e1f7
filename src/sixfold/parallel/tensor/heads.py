"""The head of a language model that is cut along the vocabulary, and the loss behind it.

Made by `forwards.py`. Where the model computes its loss by itself and asks for nothing else, each rank
keeps the scores of its own entries; elsewhere (generation, a loss function of the user's) scores are
gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from sixfold.models import decoder
from sixfold.models.chunks import Loss, summed_cross_entropy
from sixfold.parallel.causal_loss import CausalLoss
from sixfold.parallel.change import Remove
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

    def attach(self, owns_loss: bool) -> list[Remove]:
        """Put the loss over the cut vocabulary where the model calls its own; returns what undoes it."""
        undo: list[Remove] = [self._attach_method()] if self.is_method else []
        if not owns_loss:
            return undo
        if isinstance(self.model, decoder.Decoder):
            if self.model.loss is summed_cross_entropy:
                undo += [self._attach_loss(self.model), self._attach_scores()]
        elif (known := CausalLoss.of(self.model)) is not None:
            loss, remove = known
            loss.summed, loss.parted = self._over_parts(loss.summed, torch.float32), self.parted
            loss.entries = self.vocabulary.size
            undo.append(remove)
        return undo

    def _over_parts(self, own: Loss, dtype: torch.dtype | None = None) -> Loss:
        """`own`, and where a rank has a part of the scores the same loss over those of all ranks.

        Args:
            dtype: in which it is computed; None: that of the scores.
        """

        def loss(scores: Tensor, targets: Tensor) -> Tensor:
            if scores.shape[-1] == self.vocabulary.size:
                return own(scores, targets)
            return losses_of(scores.to(dtype=dtype), targets, self.vocabulary).sum()

        return loss

    def _attach_method(self) -> Callable[[], None]:
        own = getattr(type(self.model), self.name)

        def head(model: nn.Module, hidden: Tensor) -> Tensor:
            return self.leave(own(model, cross(hidden, COPIED, self.vocabulary.axis)))

        setattr(self.model, self.name, MethodType(head, self.model))
        return lambda: delattr(self.model, self.name)

    def _attach_loss(self, model: decoder.Decoder) -> Callable[[], None]:
        own, model.loss = model.loss, self._over_parts(model.loss)
        return lambda: setattr(model, "loss", own)

    def _attach_scores(self) -> Callable[[], None]:
        """A decoder's head is asked by its loss, also in recomputed chunks, and by `logits` for all."""
        model: Any = self.model
        self.is_parted = True

        def logits(model: decoder.Decoder, *args: Any, **kwargs: Any) -> Tensor:
            with self.parted(False):
                return decoder.Decoder.logits(model, *args, **kwargs)

        model.logits = MethodType(logits, model)
        return lambda: delattr(model, "logits")

    @contextmanager
    def parted(self, flag: bool = True) -> Iterator[None]:
        """Inside, each rank keeps the scores of its own entries; or does not."""
        before, self.is_parted = self.is_parted, flag
        try:
            yield
        finally:
            self.is_parted = before
