"""The loss of a causal model in chunks of tokens, so that no scores of a whole sequence exist at once, and
over the parts of scores that the ranks of the tensor axis have.

Called by `initialize` for chunks and by `tensor/heads.py` for parts; one model may have both. The reference
decoder has attributes for it. Forward, head and loss function of a Hugging Face causal model are replaced,
once: in chunks its head hands its input on, and the loss computes the scores. Where a model does something
to its scores in between, that cannot be, and its own way is taken: seen once on a small copy, which is the
same on every rank, because no rank may run a forward twice. The arithmetic is in `models.chunks`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from sixfold.base.errors import ModelError
from sixfold.models.chunks import IGNORED, Loss, in_chunks, rows_at_once, summed_cross_entropy
from sixfold.models.decoder import Decoder
from sixfold.parallel.blocks import own_forward, put_forward
from sixfold.parallel.change import Remove
from sixfold.parallel.tiny import CannotTry, tiny_of

_BEHIND = "it changes its scores behind the head"


def chunk_loss(model: nn.Module, asked: int | None, *, takes_scores: bool = False) -> Remove:
    """Have `model` compute its loss in chunks where scores are large; returns what undoes it.

    Called before its parameters are cut: how large scores are is read off the whole head.

    Args:
        asked: tokens of a chunk, 0 for all, None for `models.chunks` to decide by size.
        takes_scores: whether a loss function of the user is given what the model returns.

    Raises:
        ModelError: chunks are asked for, and how this model computes its loss is not known.
    """
    if isinstance(model, Decoder):
        before, model.loss_chunk = model.loss_chunk, asked
        return functools.partial(setattr, model, "loss_chunk", before)
    known = None if takes_scores or asked == 0 else CausalLoss.of(model)
    if known is not None:
        loss, remove = known
        loss.chunk = asked
        return remove
    if asked:
        why = "its loss_fn takes all scores" if takes_scores else "its head and its loss are not known"
        raise _unknown(model, asked, why)
    return lambda: None


def head_of(model: nn.Module) -> nn.Module | None:
    """The head of a Hugging Face causal model that takes the library's own loss; None of any other."""
    library = sys.modules.get("transformers.loss.loss_utils")
    function: Any = getattr(model, "loss_function", None)
    if library is None or function is None or inspect.unwrap(function) is not library.ForCausalLMLoss:
        return None
    head = model.get_output_embeddings()  # type: ignore[operator]
    return head if isinstance(head, nn.Module) else None


def goes_straight(model: nn.Module) -> bool | None:
    """Whether what the head of a Hugging Face causal model gives is what its loss function takes, as a small
    copy of it shows; None where there is no such copy, or it does not run."""
    try:
        tiny, inputs = tiny_of(model)
    except CannotTry:
        return None
    tiny.to(next(model.parameters()).dtype)  # scores that are widened on the way are others
    head, scores = head_of(tiny), list[Tensor]()
    if head is None or tiny.main_input_name != "input_ids":
        return None

    def loss(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        scores.append(logits)
        return logits.sum()

    head.register_forward_hook(lambda _head, _given, output: scores.append(output))
    tiny.loss_function = loss  # type: ignore[assignment]
    with torch.no_grad():
        try:
            tiny.eval()(**{"labels": inputs["input_ids"]} | inputs)
        except Exception:  # of the model's own code, on inputs that were made up
            return None
    return len(scores) == 2 and scores[0] is scores[1]


def _in_fp32(scores: Tensor, targets: Tensor) -> Tensor:
    """In the type in which the library computes it, whatever that of the model."""
    return summed_cross_entropy(scores.float() if scores.dtype == torch.float64 else scores, targets)


class CausalLoss:
    """The loss function of a Hugging Face causal model, and what its forward and its head do for it.

    Attributes:
        chunk: tokens of a chunk, 0 for all, None for `models.chunks` to decide by size.
        entries: of the whole vocabulary.
        summed: loss of scores [rows, entries], or of this rank's part of them, and of targets, in which
            `IGNORED` counts for nothing.
        parted: inside of it the head leaves scores to be parts.
    """

    @classmethod
    def of(cls, model: nn.Module) -> tuple[CausalLoss, Remove] | None:
        """The one of `model`, put there where it has none yet, and what undoes that; None where its own loss
        is not known."""
        known = getattr(model, "loss_function", None)
        if isinstance(known, cls):
            return known, lambda: None
        head = head_of(model)
        if head is None:
            return None
        made = cls(model, head)
        return made, made._undo.close

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        self.chunk: int | None = 0
        self.entries = next(head.parameters()).shape[0]
        self.summed: Loss = _in_fp32
        self.parted: Callable[[], AbstractContextManager[object]] = nullcontext
        self._model, self._rows = model, 0  # of a chunk, in a forward that is computed so
        self._scores: tuple[nn.Module, Tensor] | None = None  # a head and what it gave
        self._own, self._own_head = own_forward(model), own_forward(head)
        own_loss: Any = model.loss_function
        self._own_loss: Callable[..., Tensor] = own_loss
        functools.update_wrapper(self, own_loss)
        self._undo = ExitStack()
        # Methods, so that a stage of the model, which is a copy of some of it, runs its own.
        self._undo.callback(put_forward(model, MethodType(_as(self._own, self._forward), model)))
        self._undo.callback(put_forward(head, MethodType(_as(self._own_head, self._leave_head), head)))
        was_set = "_loss_function" in vars(model)
        model.loss_function = self  # type: ignore[assignment]
        self._undo.callback(setattr if was_set else _forget, model, "loss_function", self._own_loss)

    def __deepcopy__(self, memo: dict[int, Any]) -> CausalLoss:
        return self  # as a function: its ranks have no copy

    def _forward(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        labels = self._labels(args, kwargs)
        if labels is None:
            return self._own(model, *args, **kwargs)
        rows = rows_at_once(labels.numel(), self.entries, self.chunk)
        self._rows = rows if rows < labels.numel() and self._goes_straight else 0
        try:
            with self.parted():
                output = self._own(model, *args, **kwargs)
            return self._without_scores(output)
        finally:
            self._rows, self._scores = 0, None

    def _labels(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        labels = kwargs.get("labels")
        if args and labels is None:
            names = list(inspect.signature(type(self._model).forward).parameters)[1:]
            labels = dict(zip(names, args, strict=False)).get("labels")
        return labels if isinstance(labels, Tensor) else None

    @functools.cached_property
    def _goes_straight(self) -> bool:
        found = goes_straight(self._model)
        if self.chunk and found is False:
            raise _unknown(self._model, self.chunk, _BEHIND)
        return bool(self.chunk) if found is None else found

    def _leave_head(self, head: nn.Module, hidden: Tensor) -> Tensor:
        if not self._rows:
            return self._own_head(head, hidden)  # type: ignore[no-any-return]
        self._scores = head, hidden
        return hidden

    def _without_scores(self, output: Any) -> Any:
        """What the model returns, better without scores than with a part of them, or their input, instead."""
        if isinstance(output, tuple):  # by return_dict=False, (loss, scores, ...)
            return output[:1] + output[2:] if self._stands_in(output[1]) else output
        stands_in = self._stands_in(getattr(output, "logits", None))
        return dataclasses.replace(output, logits=None) if stands_in else output

    def _stands_in(self, scores: Any) -> bool:
        """Whether a forward had something else for them."""
        return isinstance(scores, Tensor) and (self._rows > 0 or scores.shape[-1] < self.entries)

    def __call__(self, logits: Tensor, labels: Tensor, vocab_size: int, *args: Any, **kwargs: Any) -> Tensor:
        """As the library's."""
        if not self._stands_in(logits):
            return self._own_loss(logits, labels, vocab_size, *args, **kwargs)
        targets, count = _counted(labels.to(logits.device), *args, **kwargs)
        rows = logits.flatten(0, -2)
        if not self._rows:
            return self.summed(rows, targets) / count
        if self._scores is None or logits is not self._scores[1]:
            raise _unknown(self._model, self.chunk, _BEHIND)
        head = self._scores[0]

        def scores(hidden: Tensor) -> Tensor:
            with self.parted():  # backward comes here again, outside of the model's forward
                return self._own_head(head, hidden)  # type: ignore[no-any-return]

        return in_chunks(scores, self.summed, rows, targets, self._rows) / count


def _counted(
    labels: Tensor,
    num_items_in_batch: Tensor | float | None = None,
    ignore_index: int = IGNORED,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | float]:
    """What the library's loss of causal models makes of its arguments behind the scores: targets [rows],
    `IGNORED` where they count for nothing, and what their sum is divided by."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(labels.device)
    counts = targets != ignore_index
    count = counts.sum() if num_items_in_batch is None else num_items_in_batch
    return targets.masked_fill(~counts, IGNORED), count


def _forget(model: Any, *_: object) -> None:
    """Take off the loss function that was given to an instance."""
    del model._loss_function


def _as(own: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
    """`other` with the signature of `own`."""

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return other(*args, **kwargs)

    return forward


def _unknown(model: nn.Module, asked: int | None, why: str) -> ModelError:
    given = "unset" if asked is None else f"= {asked}"
    return ModelError(
        f"layout.loss_chunk {given} with a {type(model).__name__}: {why}",
        rule="chunks take a reference decoder, or a Hugging Face causal model whose scores go from its head "
        "straight into its loss",
        fix="set layout.loss_chunk = 0" if asked is None else "leave layout.loss_chunk unset, or set it to 0",
    )
