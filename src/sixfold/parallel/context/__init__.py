"""The context axis: one sequence over several ranks, in any model that calls torch's attention.

`attention.py` answers calls of attention (`calls.py`) with an exchange of heads (`heads.py`) around a ring
(`ring.py`) over blocks (`kernels.py`, `spans.py`).
"""

from sixfold.parallel.context.attention import ContextAttention, seen_by
from sixfold.parallel.context.lengths import length_limits
from sixfold.parallel.context.off_zero import off_zero
from sixfold.parallel.context.spans import Sequences, cut_rows, num_rows

__all__ = ["ContextAttention", "Sequences", "cut_rows", "length_limits", "num_rows", "off_zero", "seen_by"]
