"""Batches cut along their sequences: what each rank of the context axis runs of a micro-batch.

Used between a batch and the module. Labels are shifted and positions counted before anything is
cut, so a token knows its place and its target wherever it lies. Where ranks have whole sequences the same
lines run and nothing is cut.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sixfold.base.errors import ModelError
from sixfold.models.chunks import IGNORED
from sixfold.parallel import ContextAttention, Sequences, cut_rows, length_limits, num_rows, seen_by
from sixfold.parallel.context.attention import OFF
from sixfold.pipeline.batch import (
    Batch,
    change_tensors,
    num_samples,
    targets_of,
    tensors_of,
    with_targets,
)

PER_TOKEN = "per_token"
"""Method by which a model may say what it takes with one entry a token in each field."""
_TRIED = 4096
"""Tokens, or as many as a rank has where that is more, on which it is tried whether a model can be cut: what
mixes tokens farther apart is not seen. A forward of so many takes no more memory than an update does."""


@dataclass(frozen=True)
class Piece:
    """What this rank runs of a micro-batch.

    Args:
        batch: its fields, cut.
        sequences: which sequences it was cut from; None where they are whole.
        share: the part of the micro-batch's targets that is in it.
        least: the smallest such part that any rank has.
        targets: how many these are; None where there are no labels, or nothing is cut.
    """

    batch: Batch
    sequences: Sequences | None = None
    share: float = 1.0
    least: float = 1.0
    targets: float | None = None


class SequenceCut:
    """Cuts micro-batches, and tells attention which one runs.

    Args:
        module: the model; asked what it takes.
        attention: what is told; None where ranks have whole sequences.
        device: where it computes.
        multiple: of it is the number of tokens in each rank's part.
    """

    def __init__(
        self, module: nn.Module, attention: ContextAttention | None, device: torch.device, multiple: int = 1
    ) -> None:
        self._module = module
        self._attention = attention
        self._device = device
        self._multiple = multiple
        self._limits = {} if attention is None else length_limits(module)
        self.is_cut = attention is not None
        """Whether ranks have parts of sequences."""
        self.counts_positions = False
        """Whether the model counts positions over the tokens that are not hidden: then none may be hidden in
        front of others."""

    def enter(self, piece: Piece | None) -> None:
        """From now on modules run on this piece; None: on whole sequences."""
        if self._attention is not None:
            self._attention.sequences = None if piece is None else piece.sequences

    @contextmanager
    def running(self, piece: Piece) -> Iterator[None]:
        """Inside, they do."""
        self.enter(piece)
        try:
            yield
        finally:
            self.enter(None)

    def piece(self, batch: Batch, *, shift: int | None) -> Piece:
        """This rank's part of a micro-batch.

        Args:
            shift: labels that the model itself leaves out at the beginning of each sequence; None: unknown.

        Raises:
            ModelError: there are no sequences in it, or of lengths that are not cut, or fields
                that cannot be.
        """
        if self._attention is None:
            return Piece(batch)
        fields, known = self._fields(batch, shift)
        length = _length(fields)
        self._check_length(length)
        num_ranks = self._attention.group.num_ranks
        spans = self._attention.spans_in(length)

        def cut(tensor: Tensor) -> Tensor:
            is_sequence = tensor.dim() > 1 and tensor.shape[1] == length
            return cut_rows(tensor, spans, 1) if is_sequence else tensor

        part, targets = change_tensors(fields, cut), targets_of(fields)
        known = {name: each.to(self._device) for name, each in known.items()}
        sequences = Sequences(length, known.get("documents"), known.get("keys"), known.get("seen"))
        if sequences.seen is not None:
            part["attention_mask"] = cut_rows(cut_rows(fields["attention_mask"], spans, 2), spans, 3)
        if targets is None or targets.dim() < 2 or targets.shape[1] != length:
            return Piece(part, sequences, num_rows(spans) / length)
        parts = (cut_rows(targets, self._attention.spans_in(length, place), 1) for place in range(num_ranks))
        found = [float((each != IGNORED).sum()) for each in parts]
        own, valid = found[self._attention.group.place], max(1.0, sum(found))
        return Piece(part, sequences, own / valid, min(found) / valid, own)

    def _check_length(self, length: int) -> None:
        """Raise ModelError, on every rank that shares them, where sequences of this length are not cut."""
        assert self._attention is not None, "asked where something is cut"
        num_ranks = self._attention.group.num_ranks
        if length < 2 * num_ranks:
            raise ModelError(
                f"sequences of {length} tokens over layout.context = {num_ranks}",
                rule="each rank has two pieces of every sequence, of one token at least",
                fix=f"give sequences of {2 * num_ranks} tokens or more, or set layout.context = "
                f"{max(1, length // 2)}",
            )
        rows = [num_rows(self._attention.spans_in(length, place)) for place in range(num_ranks)]
        if any(each % self._multiple for each in rows):
            raise ModelError(
                f"sequences of {length} tokens with layout.sequence_parallel, of which ranks along context "
                f"have {', '.join(map(str, rows))}",
                rule=f"between blocks each of {self._multiple} tensor ranks keeps an equal part of what its "
                "context rank has",
                fix=f"pad sequences to a multiple of {num_ranks * self._multiple}, or leave "
                "layout.sequence_parallel unset",
            )
        for name, limit in self._limits.items():
            if length > limit:
                raise ModelError(
                    f"sequences of {length} tokens over layout.context = {num_ranks} with {name} {limit} in "
                    f"the configuration of {type(self._module).__name__}",
                    rule="such a model treats longer sequences otherwise, and does not see from a part how "
                    "long it is",
                    fix=f"give sequences of at most {limit} tokens, or {OFF}",
                )

    def short(self, batch: Batch) -> Batch:
        """A batch's first sample, or its beginning where that is long, to try the model on, with a target
        everywhere; all of the batch where nothing is cut or there is nothing."""
        if self._attention is None or not num_samples(batch):
            return batch
        length, num_ranks = _length(batch), self._attention.group.num_ranks
        # The parts of a beginning that is shorter by periods divide as those of the whole do.
        period = 2 * num_ranks * self._multiple
        spare = length - max(_TRIED, length // num_ranks)
        kept = length - max(0, spare) // period * period

        def begin(tensor: Tensor) -> Tensor:
            if tensor.dim() > 1 and tensor.shape[1] == length:
                return tensor[:1, :kept]
            is_of_pairs = tensor.dim() == 4 and tensor.shape[2:] == (length, length)
            return tensor[:1, :, :kept, :kept] if is_of_pairs else tensor[:1] if tensor.dim() else tensor

        return change_tensors(with_targets(batch), begin)

    def padded(self, short: Batch) -> list[Batch]:
        """The same with its first tokens hidden, for a model that is told positions, and could count
        them by itself over the others; nothing for any other model."""
        takes = inspect.signature(self._module.forward).parameters
        is_told = isinstance(short, Mapping) and not hasattr(self._module, PER_TOKEN)
        if not is_told or "position_ids" in short or not {"attention_mask", "position_ids"} <= set(takes):
            return []
        mask = short.get("attention_mask")
        if mask is not None and mask.dim() > 2:  # of pairs, over which nobody counts
            return []
        like, length = next(each for each in tensors_of(short) if each.dim() > 1), _length(short)
        place, num_hidden = torch.arange(length, device=like.device).expand(len(like), -1), length // 4
        mask = torch.ones_like(place) if mask is None else mask
        fields = {**short, "attention_mask": mask * (place >= num_hidden)}
        if isinstance(short.get("labels"), Tensor):
            # The last hidden one is asked for the first that is not.
            fields["labels"] = short["labels"].masked_fill(place <= num_hidden, IGNORED)
        return [fields]

    @contextmanager
    def noting(self) -> Iterator[list[ModelError]]:
        """Inside, masks that this rank refuses are put on the list: others go on, and wait for its rows."""
        assert self._attention is not None, "asked where something is cut"
        self._attention.refused = refused = list[ModelError]()
        try:
            yield refused
        finally:
            self._attention.refused = None

    def rows(self, tensor: Tensor) -> Tensor:
        """This rank's part of [batch, length, ...]."""
        assert self._attention is not None, "asked where something is cut"
        return cut_rows(tensor, self._attention.spans_in(tensor.shape[1]), 1)

    def _fields(self, batch: Batch, shift: int | None) -> tuple[Batch, dict[str, Tensor]]:
        """Fields with one entry a token, and what is known of the sequences, see `Sequences`."""
        told: Callable[..., Mapping[str, Any]] | None = getattr(self._module, PER_TOKEN, None)
        if told is not None:
            named = isinstance(batch, Mapping)
            fields = (
                told(**batch) if named else told(*(batch if isinstance(batch, tuple | list) else (batch,)))
            )
            return fields, _given(documents=fields.get("documents"))
        if not isinstance(batch, Mapping):
            return batch, {}
        return self._named_fields(dict(batch), shift)

    def _named_fields(self, fields: dict[str, Any], shift: int | None) -> tuple[Batch, dict[str, Tensor]]:
        length, like = _length(fields), next(each for each in tensors_of(fields) if each.dim() > 1)
        documents, keys, seen = fields.get("documents"), None, None
        takes = inspect.signature(self._module.forward).parameters
        mask, positions = fields.get("attention_mask"), fields.get("position_ids")
        if isinstance(mask, Tensor) and mask.shape[1:] == (1, length, length):
            seen = seen_by(mask)
        elif isinstance(mask, Tensor):
            if mask.shape != (len(like), length):
                raise ModelError(
                    f"an attention_mask {tuple(mask.shape)} with sequences of {length} tokens cut by "
                    "layout.context",
                    rule="attention across ranks takes a mask of tokens, or of pairs, the same for all heads",
                    fix=f"give attention_mask as [batch, length] or [batch, 1, length, length], or {OFF}",
                )
            keys = None if bool((mask != 0).all()) else mask != 0
            if keys is not None and positions is None and self.counts_positions:
                self._refuse_hidden_before(keys)
        elif isinstance(positions, Tensor) and not _keeps_cache(self._module, fields):
            documents = _documents(positions.expand(len(like), -1))
        if "position_ids" in takes:
            if positions is None:
                positions = torch.arange(length, device=like.device)[None]
            fields["position_ids"] = positions.expand(len(like), -1)
        if seen is None and "attention_mask" in takes and (mask is not None or "position_ids" in takes):
            # Parts of a sequence are no documents, and what is padding is known already.
            kind = mask.dtype if mask is not None else torch.long
            fields["attention_mask"] = torch.ones(len(like), length, dtype=kind, device=like.device)
        labels = fields.get("labels")
        if shift == 1 and isinstance(labels, Tensor) and labels.shape == (len(like), length):
            shifted = fields.get("shift_labels", F.pad(labels[:, 1:], (0, 1), value=IGNORED))
            fields["labels"] = fields["shift_labels"] = shifted
        return fields, _given(documents=documents, keys=keys, seen=seen)

    def _refuse_hidden_before(self, keys: Tensor) -> None:
        if bool((keys[:, 1:] & ~keys[:, :-1]).any()):
            raise ModelError(
                f"an attention_mask that hides tokens in front of others, over layout.context, with "
                f"{type(self._module).__name__}",
                rule="such a model counts positions over the tokens that are not hidden, which a part of a "
                "sequence does not show",
                fix=f"pad behind the tokens, give position_ids [batch, length], or {OFF}",
            )


def _given(**known: Tensor | None) -> dict[str, Tensor]:
    return {name: each for name, each in known.items() if each is not None}


def _keeps_cache(module: nn.Module, fields: Mapping[str, Any]) -> bool:
    """Whether a Hugging Face model makes a cache: only without one it takes new positions for documents."""
    own = getattr(getattr(module, "config", None), "use_cache", False)
    return bool(fields.get("use_cache", own))


def _documents(positions: Tensor) -> Tensor | None:
    """The number of each token's document; None where each sequence is one."""
    begins = positions[:, 1:] - positions[:, :-1] != 1
    return F.pad(begins.cumsum(1), (1, 0)) if bool(begins.any()) else None


def _length(batch: Batch) -> int:
    for tensor in tensors_of(batch):
        if tensor.dim() > 1:
            return tensor.shape[1]
    raise ModelError(
        f"layout.context with a batch of {type(batch).__name__} that has no tensor of two dims",
        rule="sequences lie along dim 1 of the batch's tensors",
        fix=f"hand over [batch, length] tensors, or {OFF}",
    )
