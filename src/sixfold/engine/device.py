"""Which device a rank computes on.

Asked once by `initialize`. A GPU becomes torch's current one, since libraries allocate there without asking.
"""

from __future__ import annotations

import os

import torch

from sixfold.base.errors import ConfigError
from sixfold.launch import Placement

_CHOSEN = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""Variables by which somebody has said which GPUs a process sees."""


def own_device(asked: torch.device | str | None, placement: Placement | None) -> torch.device:
    """Where this rank computes.

    Args:
        asked: a device; a GPU without a number is this rank's own. None: its GPU where there is one, else the
            CPU.
        placement: which rank of its node this is; None where a script has placed it itself.

    Raises:
        ConfigError: this node has more ranks than GPUs.
    """
    device = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda":
        return device
    if device.index is None:
        device = torch.device("cuda", _own_gpu(placement))
    torch.cuda.set_device(device)
    return device


def _own_gpu(placement: Placement | None) -> int:
    if placement is None:
        return torch.cuda.current_device()
    num_visible = torch.cuda.device_count()
    if num_visible == 1 and any(os.environ.get(name) for name in _CHOSEN):
        return 0  # a scheduler may show each rank no other than its own
    if placement.local_rank >= num_visible:
        raise ConfigError(
            f"local rank {placement.local_rank} of {placement.local_world_size} on a node where it sees "
            f"{num_visible} GPU(s)",
            rule="each rank computes on a GPU of its own",
            fix=f"start at most {num_visible} rank(s) on each node, let each see its own GPU alone "
            f"({_CHOSEN[0]}), or compute on CPUs: "
            'sixfold.initialize(..., device="cpu")',
        )
    return placement.local_rank
