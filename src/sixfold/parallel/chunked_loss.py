"""The head and loss of a model in chunks of tokens, so that no scores of a whole sequence exist at once.

Called by `initialize`; the arithmetic is in `models.chunks`. The reference decoder has a setting for it. In a
Hugging Face causal model the head hands its input on, and the loss function computes scores itself, chunk
by chunk. Where a model does something to its scores in between, that cannot be, and its own way is taken:
seen once on a small copy, which is the same on every rank, because no rank may run a forward twice.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import MethodType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sixfold.base.errors import ModelError
from sixfold.models.chunks import IGNORED, Loss, in_chunks, rows_at_once, summed_cross_entropy
from sixfold.models.decoder import Decoder
from sixfold.parallel.blocks import own_forward, put_forward
from sixfold.parallel.change import Remove
from sixfold.parallel.tensor.tiny import CannotTry, tiny_of

OfRows = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]
"""Head, hidden states [rows, width] and targets [rows] to their summed loss."""
_BEHIND = "it changes its scores behind the head"


@runtime_checkable
class KnowsRows(Protocol):
    """A loss function that an axis has put into a model whose head is cut."""

    @property
    def of_rows(self) -> OfRows:
        """Its sum over rows, with the head that it is given."""


def chunk_loss(
    model: nn.Module, asked: int | None, loss: Loss | None = None, *, takes_scores: bool = False
) -> Remove:
    """Have `model` compute its loss in chunks where scores are large; returns what undoes it.

    Called before its parameters are cut: how large scores are is read off the whole head.

    Args:
        asked: tokens of a chunk, 0 for all, None for `models.chunks` to decide by size.
        loss: of scores [rows, entries] as the head gives them, and targets, in which `IGNORED` counts for
            nothing; summed. None: cross-entropy in fp32.
        takes_scores: whether a loss function of the user is given what the model returns.

    Raises:
        ModelError: chunks are asked for, and how this model computes its loss is not known.
    """
    if isinstance(model, Decoder):
        before, model.loss_chunk = model.loss_chunk, asked
        return functools.partial(setattr, model, "loss_chunk", before)
    head = None if takes_scores else head_of(model)
    if head is not None and asked != 0:
        own = model.loss_function
        of_rows = own.of_rows if isinstance(own, KnowsRows) else partial(_of_rows, loss or _in_fp32)
        return _Chunks(model, head, asked, of_rows).remove
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


class _Chunks:
    """A model whose head and loss wait for each other."""

    def __init__(self, model: nn.Module, head: nn.Module, asked: int | None, of_rows: OfRows) -> None:
        self._model, self._head, self._asked, self._of_rows = model, head, asked, of_rows
        self._entries = next(head.parameters()).shape[0]  # of all ranks: chunks are alike on each
        self._rows: int | None = None  # of a chunk, in a forward that is computed so
        self._handed_on: tuple[nn.Module, Tensor] | None = None
        self._own, self._own_head = own_forward(model), own_forward(head)
        self._own_loss: Callable[..., Tensor] = model.loss_function  # type: ignore[assignment]
        undo = ExitStack()
        # Methods, so that a stage of the model, which is a copy of some of it, runs its own.
        undo.callback(put_forward(model, MethodType(_as(self._own, self._forward), model)))
        undo.callback(put_forward(head, MethodType(_as(self._own_head, self._hand_on), head)))
        model.loss_function = self._loss_of_chunks  # type: ignore[assignment]
        undo.callback(setattr, model, "loss_function", self._own_loss)
        self.remove = undo.close
        """Give the model its own way back."""

    def _forward(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        if not isinstance(labels, Tensor):
            return self._own(model, *args, **kwargs)
        rows = rows_at_once(labels.numel(), self._entries, self._asked)
        if rows == labels.numel() or not self._goes_straight:
            return self._own(model, *args, **kwargs)
        self._rows = rows
        try:
            output = self._own(model, *args, **kwargs)
            _, hidden = self._handed_on or (None, None)
        finally:
            self._rows = self._handed_on = None
        # Nobody shall take what was handed on for scores.
        if isinstance(output, tuple):  # by return_dict=False
            return tuple(each for each in output if each is not hidden)
        if hasattr(output, "logits"):
            output.logits = None
        return output

    @functools.cached_property
    def _goes_straight(self) -> bool:
        found = goes_straight(self._model)
        if self._asked and found is False:
            raise _unknown(self._model, self._asked, _BEHIND)
        return bool(self._asked) if found is None else found

    def _hand_on(self, head: nn.Module, hidden: Tensor) -> Tensor:
        if self._rows is None:
            return self._own_head(head, hidden)  # type: ignore[no-any-return]
        self._handed_on = head, hidden
        return hidden

    def _loss_of_chunks(
        self, logits: Tensor, labels: Tensor, vocab_size: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """As the library's loss of causal models."""
        if self._rows is None:
            return self._own_loss(logits, labels, vocab_size, *args, **kwargs)
        head, handed_on = self._handed_on or (self._head, None)
        if logits is not handed_on:
            raise _unknown(self._model, self._asked, _BEHIND)
        targets, count = counted(labels.to(logits.device), *args, **kwargs)
        of_rows = partial(self._of_rows, partial(self._own_head, head))
        total = in_chunks(lambda states: states, of_rows, logits.flatten(0, -2), targets, self._rows)
        return total / count


def counted(
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


def _as(own: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
    """`other` with the signature of `own`."""

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return other(*args, **kwargs)

    return forward


def _of_rows(loss: Loss, head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    return loss(head(hidden), targets)


def _in_fp32(scores: Tensor, targets: Tensor) -> Tensor:
    """In the type in which the library computes it, whatever that of the model."""
    return summed_cross_entropy(scores.float() if scores.dtype == torch.float64 else scores, targets)


def _unknown(model: nn.Module, asked: int | None, why: str) -> ModelError:
    given = "unset" if asked is None else f"= {asked}"
    return ModelError(
        f"layout.loss_chunk {given} with a {type(model).__name__}: {why}",
        rule="chunks take a reference decoder, or a Hugging Face causal model whose scores go from its head "
        "straight into its loss",
        fix="set layout.loss_chunk = 0" if asked is None else "leave layout.loss_chunk unset, or set it to 0",
    )
