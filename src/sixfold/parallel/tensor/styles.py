"""Styles: the ways in which a layer is cut over the tensor axis, as data.

A rule gives a module one of these by name; the names are those that Hugging Face models use in their own
plans. `cut.py` decides pieces from them, and `forwards.py` puts their crossings around layers. A new kind of
layer or way to cut it is a row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from sixfold.parallel.tensor.crossing import (
    BETWEEN,
    COPIED,
    GATHERED,
    PARTED,
    SUMMED,
    Crossing,
    Operation,
    State,
)

Share = Literal["out", "in", "whole", "partial"]
"""What a rank has of a parameter: rows of outputs or of inputs; or all of it, with the whole gradient or
with a summand."""

OUT: Mapping[str, Share] = {
    "weight": "out",
    "bias": "out",
    "lora_A.weight": "partial",
    "lora_B.weight": "out",
}
IN: Mapping[str, Share] = {"weight": "in", "bias": "whole", "lora_A.weight": "in", "lora_B.weight": "partial"}
ALL: Mapping[str, Share] = dict.fromkeys(OUT, "partial")
"""What each rank works on in part, with all of its numbers."""


@dataclass(frozen=True)
class Product:
    """What a layer does by itself to the state of activations, and on the way back of their gradients."""

    takes: State
    gives: State
    takes_back: State
    gives_back: State


PRODUCTS: dict[tuple[str, Share], Product] = {
    ("linear", "out"): (by_columns := Product("whole", "cut", "cut", "partial")),
    ("linear", "in"): Product("cut", "partial", "whole", "cut"),
    ("linear", "partial"): by_columns,  # of which each rank goes on with its own
    ("scores", "out"): by_columns,
    ("vocabulary", "out"): Product("whole", "partial", "whole", "whole"),  # zeros for entries of others
}
"""By role and share of the weight."""


@dataclass(frozen=True)
class Style:
    """How a layer is cut.

    The states of activations fit at each of its borders, in both directions, and a summand never leaves it:
    checked as it is made.

    Args:
        shares: of its parameters, by their names in it.
        parts: equal parts that its outputs are packed from, each cut by itself (gate and up, say).
        entering: around the layer, before it.
        leaving: and behind it.
        role: "linear", "vocabulary" (an embedding that knows a part of its entries), "scores" (the head),
            "experts" (a module of stacked matrices, cut as `STACKED` says) or "none" (its forward stays as it
            is).
    """

    shares: Mapping[str, Share] = field(hash=False)
    parts: int = 1
    entering: Crossing | None = None
    leaving: Crossing | None = None
    role: Literal["linear", "vocabulary", "scores", "experts", "none"] = "linear"

    def __post_init__(self) -> None:
        if self.role in ("none", "experts"):
            return
        product = PRODUCTS[self.role, self.shares["weight"]]
        entering, leaving = self.entering or _UNCHANGED, self.leaving or _UNCHANGED
        before = product.takes if entering.there == "same" else BETWEEN[entering.there][0]
        after = _behind(product.gives, leaving.there)
        back, last = _behind(after, leaving.back), _behind(product.gives_back, entering.back)
        fits = _behind(before, entering.there) == product.takes and back == product.takes_back
        if not fits or last != before or after == "partial":
            raise ValueError(
                f"a {self.role} layer cut by {self.shares['weight']}, entered by {self.entering} and left by "
                f"{self.leaving}: {before} becomes {after}, and of gradients {back} becomes {last}"
            )


_UNCHANGED = Crossing("same", "same")


def _behind(state: State, operation: Operation) -> State:
    """What an operation makes of something in that state."""
    if operation == "same":
        return state
    takes, gives = BETWEEN[operation]
    if state != takes:
        raise ValueError(f'"{operation}" takes what is {takes}, and is given what is {state}')
    return gives


STYLES: dict[str, Style] = {
    "colwise": Style(OUT, entering=COPIED),
    "packed_colwise": Style(OUT, parts=2, entering=COPIED),
    "packed3_colwise": Style(OUT, parts=3, entering=COPIED),
    "colwise_gather_output": Style(OUT, entering=COPIED, leaving=GATHERED),
    "rowwise": Style(IN, leaving=SUMMED),
    "rowwise_split_input": Style(IN, entering=PARTED, leaving=SUMMED),
    "embedding_rowwise": Style(OUT, leaving=SUMMED, role="vocabulary"),
    "scores": Style(OUT, entering=COPIED, leaving=GATHERED, role="scores"),
    "local_colwise": Style(OUT, role="none"),
    "replicated_with_grad_allreduce": Style(ALL, role="none"),
    "moe_tp_experts": Style({}, role="experts"),
}
STYLES |= {"colwise_rep": STYLES["colwise_gather_output"], "rowwise_rep": STYLES["rowwise_split_input"]}

SHARED = Style(ALL, entering=COPIED)
"""Keys and values with fewer heads than ranks: projected whole on every rank, which goes on with its own."""

STACKED = {"colwise": (-2, 1), "packed_colwise": (-2, 2), "rowwise": (-1, 1), "packed_rowwise": (-1, 2)}
"""Of a parameter of experts, [experts, ...]: the dim that is cut, and the equal parts it is packed from."""

LEFT_WHOLE = frozenset({"grouped_gemm", "ep_dispatch_experts", "moe_identity_expert"})
"""Styles of the expert axis, which cuts experts otherwise, and of experts without parameters."""


def dims_of(module: nn.Module) -> Mapping[Share, int] | None:
    """The dims of a layer's matrices that count its outputs and its inputs; None for another kind of
    module."""
    if isinstance(module, nn.Linear | nn.Embedding):
        return {"out": 0, "in": 1}
    # Of Hugging Face: a linear layer with its weight the other way round.
    return {"out": 1, "in": 0} if type(module).__name__ == "Conv1D" and hasattr(module, "nf") else None


def dim_of(share: Share, name: str, module: nn.Module) -> int | None:
    """Which dim of a parameter is cut; None where it is not.

    Args:
        name: its name in the layer `module`.
    """
    if share not in ("out", "in"):
        return None
    if name == "bias":
        return 0
    dims = dims_of(module) if name == "weight" else {"out": 0, "in": 1}
    assert dims is not None, "only layers with dims have such shares"
    return dims[share]


HEAD_WIDTHS = ("head_dim", "attention_head_size", "head_width", "head_size", "qk_head_dim")
"""Attributes of attention modules that say how wide a head is."""
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_attn_heads")
"""And how many they have, where their forwards read that."""
KEY_COUNTS = ("num_key_value_heads", "num_kv_heads")
WIDTHS = (
    "all_head_size",
    "embed_dim",
    "inner_dim",
    "split_size",
    "hidden_size",
    "attention_hidden_size",
    "dim",
)
"""Attributes that may count the columns of all heads."""
OUTPUTS = ("nf",)
"""Attributes by which layers themselves know the number of their outputs."""
GROUPS = ("num_key_value_groups",)
"""Query heads for each head of keys, which changes where the latter are not cut evenly."""
