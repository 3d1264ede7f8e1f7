"""Attention across the ranks of the context axis, in the place of torch's own.

Called with the arguments of `scaled_dot_product_attention` and the rows of this rank, wherever a model calls
that (`calls.py`). Heads are exchanged for rows as far as they go round; what they cannot divide, the ring
takes. It knows what the sequences are, and refuses a call that means anything else.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from sixfold.base.errors import ModelError
from sixfold.mesh import Group
from sixfold.parallel.context.calls import Attend
from sixfold.parallel.context.heads import Swap, to_heads, to_rows
from sixfold.parallel.context.ring import Ring, View, ring_attention
from sixfold.parallel.context.spans import Sequences, Span, num_rows, spans_of

_HIDDEN = -1e4
"""Numbers below it in a mask that is added to scores hide a key: models take the lowest of their type."""
OFF = "set layout.context = 1"


class ContextAttention:
    """Attention of this rank's rows over those of all ranks.

    Args:
        group: the ranks of the axis; None until they have met.
        is_compiled: whether modules that call it are compiled, around it.

    Attributes:
        sequences: those of the micro-batch under way; None while modules run on whole sequences.
        refused: masks that a rank has to refuse, while it is tried what is refused: others may not have to,
            and wait for its rows. None: raised at once.
    """

    def __init__(self, group: Group | None = None, *, is_compiled: bool = False) -> None:
        self.met = group
        self._call: Attend = self
        if is_compiled:
            self._call = torch.compiler.disable(self.__call__)  # type: ignore[no-untyped-call]
        self.sequences: Sequences | None = None
        self.refused: list[ModelError] | None = None
        self._checked: tuple[Sequences, Tensor, bool] | None = None

    @property
    def group(self) -> Group:
        """The ranks of the axis."""
        assert self.met is not None, "asked when they have met"
        return self.met

    def answer(self) -> Attend | None:
        """What answers calls of attention now; None: torch's own."""
        return None if self.sequences is None else self._call

    @property
    def spans(self) -> tuple[Span, ...]:
        """This rank's rows of the sequences under way, two chunks."""
        assert self.sequences is not None, "asked while there are some"
        return self.spans_in(self.sequences.length)

    def spans_in(self, length: int, place: int | None = None) -> tuple[Span, ...]:
        """Rows of sequences of a length that the rank at `place` has; None: this one."""
        place = self.group.place if place is None else place
        return spans_of(length, self.group.num_ranks, range(place, place + 1))

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """See `torch.nn.functional.scaled_dot_product_attention`; query [batch, heads, own rows, width].

        Raises:
            ModelError: what the call asks for cannot be had over several ranks.
        """
        sequences = self.sequences
        assert sequences is not None, "called while there are some"
        self._check_shapes(query, key, enable_gqa=enable_gqa)
        if dropout_p > 0:
            raise ModelError(
                f"attention with dropout {dropout_p:g} and layout.context = {self.group.num_ranks}",
                rule="which weights of attention are dropped would depend on how the sequence is cut",
                fix=f"set the model's attention dropout to 0 (other dropout may stay), or {OFF}",
            )
        if attn_mask is not None:
            is_causal = self._means_causal(attn_mask, sequences)
        num_ranks = self.group.num_ranks
        num = gcd(num_ranks, key.shape[1])
        rows = [
            spans_of(sequences.length, num_ranks, range(first, first + num))
            for first in range(0, num_ranks, num)
        ]
        view = View(sequences, is_causal, query.shape[-1] ** -0.5 if scale is None else scale)
        ring = Ring(self.group, num, rows)
        if num == 1:
            return ring_attention(query, key, value, ring, view)
        swap = Swap(self.group, num, sequences.length)
        query, key, value = to_heads(swap, query, key, value)
        return to_rows(swap, ring_attention(query, key, value, ring, view))

    def _check_shapes(self, query: Tensor, key: Tensor, *, enable_gqa: bool) -> None:
        rows = num_rows(self.spans)
        is_own = query.dim() == key.dim() == 4 and query.shape[2] == key.shape[2] == rows
        is_grouped = enable_gqa or key.shape[1] in (1, query.shape[1])  # one key head is broadcast
        if not is_own or not is_grouped:
            raise ModelError(
                f"attention of queries {tuple(query.shape)} over keys {tuple(key.shape)} on a rank that has "
                f"{rows} rows of each sequence",
                rule="layout.context cuts one sequence, of which attention has the same rows as queries and "
                "keys, [batch, heads, rows, width]",
                fix=f"{OFF} for models with cross-attention, caches or pooled tokens",
            )

    def _means_causal(self, mask: Tensor, sequences: Sequences) -> bool:
        try:
            return self._is_causal(mask, sequences)
        except ModelError as error:
            if self.refused is None:
                raise
            self.refused.append(error)
            return False

    def _is_causal(self, mask: Tensor, sequences: Sequences) -> bool:
        """Whether a mask over this rank's own rows is that of causal attention, or of attention to all.

        Raises:
            ModelError: it is neither, given the documents and the padding of the batch.
        """
        if self._checked is not None and self._checked[0] is sequences and self._checked[1] is mask:
            return self._checked[2]
        rows = num_rows(self.spans)
        seen = seen_by(mask)
        allowed = sequences.allowed(self.spans, self.spans)
        whole = torch.ones(1, 1, rows, rows, dtype=torch.bool, device=mask.device)
        whole = whole if allowed is None else allowed
        for is_causal in (True, False):
            expected = whole.tril() if is_causal else whole
            # What padding sees is nobody's business: models differ there.
            differs = (seen != expected) & expected.any(-1, keepdim=True)
            if not bool(differs.any()):
                self._checked = (sequences, mask, is_causal)
                return is_causal
        raise ModelError(
            f"an attention mask {tuple(mask.shape)} that is neither causal nor open to all, given the "
            "documents and the padding of the batch",
            rule="of attention across ranks only what the batch says is known: documents, padding, order",
            fix=f"give documents or padding as fields [batch, length] of the batch, or {OFF} for models with "
            "other masks (sliding windows, biases)",
        )


def seen_by(mask: Tensor) -> Tensor:
    """Which keys a mask lets queries see, bool, whether it says so or is added to scores.

    Raises:
        ModelError: it does something else to scores.
    """
    if mask.dtype == torch.bool:
        return mask
    seen = mask == 0
    if not bool((seen | (mask < _HIDDEN)).all()):
        raise ModelError(
            f"an attention bias {tuple(mask.shape)} that is added to scores",
            rule="attention across ranks knows masks that hide keys, and nothing that shifts scores",
            fix=f"{OFF} for models with relative position biases",
        )
    return seen
