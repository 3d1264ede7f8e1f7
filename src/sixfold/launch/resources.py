"""How many ranks and compute threads this machine carries when nobody says.

Asked by the commands that launch; it counts and starts nothing.
"""

from __future__ import annotations

import os

from sixfold.launch.environment import NodePlacement


def num_cores() -> int:
    """Cores this process may use; a container or `taskset` may leave fewer than the machine has."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def default_ranks(node: NodePlacement | None = None) -> tuple[int, str]:
    """Ranks for this machine, and why: as many as `node` says, else one per GPU or, without, per core."""
    if node is not None and node.ranks_per_node is not None:
        return node.ranks_per_node, "as the cluster asks of every node"
    # Torch is loaded by every launch, but not by the help texts that import this file.
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count(), "one per GPU"
    return num_cores(), "one per core"


def default_threads(ranks: int) -> int:
    """Compute threads per rank: the cores divided by the ranks, at least one."""
    return max(1, num_cores() // ranks)
