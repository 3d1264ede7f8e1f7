"""Buffers of a module: where they are, and whose numbers they have.

Used by `initialize` and by the state engine, whose units hold parameters alone. It never looks at parameters.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from sixfold.mesh import Mesh


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Move the buffers of `module` to `device`; parameters go there unit by unit."""
    moved: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False, remove_duplicate=False):
            setattr(part, name, moved.setdefault(id(buffer), buffer.to(device)))


def share_buffers(module: nn.Module, mesh: Mesh, sources: Mapping[str, int] | None = None) -> None:
    """Give every rank the buffers of rank 0. A collective.

    Args:
        sources: which buffers instead, and from which ranks.
    """
    asked = dict.fromkeys(dict(module.named_buffers()), 0) if sources is None else sources
    buffers = {name: buffer for name in asked if (buffer := module.get_buffer(name)).numel()}
    # A broadcast writes in place, so buffers that are views of something go through a copy; as bytes, since
    # backends do not know all types.
    copies = {name: buffer.detach().contiguous().clone() for name, buffer in buffers.items()}
    pending = [mesh.broadcast(copy.view(-1).view(torch.uint8), asked[name]) for name, copy in copies.items()]
    for each in pending:
        each.wait()
    with torch.no_grad():
        for name, buffer in buffers.items():
            buffer.copy_(copies[name])
