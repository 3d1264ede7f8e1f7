"""The programs of one batch: the layout's schedule, for what ranks have and lowered for how they exchange.

Asked for by the pipeline room at every batch, and before there is one by whoever prices or times an update.
It writes no schedule itself, and knows nothing of a batch but numbers of micro-batches.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from sixfold.config import LayoutConfig
from sixfold.program import Program, check, evaluation, post_ahead, training

Purpose = Literal["training", "rehearsal", "evaluation"]


@lru_cache(maxsize=64)
def programs_for(
    layout: LayoutConfig,
    purpose: Purpose,
    num_micro: int,
    num_served: int = 0,
    num_reduces: int = 1,
    *,
    cuts: bool = False,
    posts_ahead: bool = False,
) -> tuple[Program, ...]:
    """The programs of all ranks of a pipeline, checked.

    Args:
        num_micro: micro-batches of this rank.
        num_served: further ones that only other data ranks have.
        num_reduces: reductions of each stage in an update.
        cuts: whether parameters are cut. Then breadth-first, which runs many passes of a stage in a row, has
            it whole for all of them; elsewhere blocks are gathered as they run.
        posts_ahead: whether receives may move past sends; see `sixfold.mesh.is_duplex`.
    """
    name, num_ranks, num_virtual = layout.schedule or "1f1b", layout.pipe, layout.virtual_stages
    longest = None if cuts and name == "breadth-first" else 0
    if purpose == "evaluation":
        programs = evaluation(
            name, num_ranks, num_micro, num_virtual, num_served=num_served, longest_window=longest
        )
    else:
        programs = training(
            name,
            num_ranks,
            num_micro,
            num_virtual,
            num_served=num_served,
            num_reduces=num_reduces,
            longest_window=longest,
            updates=purpose == "training",
        )
    check(programs)
    return tuple(map(post_ahead, programs)) if posts_ahead else programs
