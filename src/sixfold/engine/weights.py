"""Weights from a file into a model's state, whatever the layout: each rank reads the elements that it owns.

Called by `initialize` for a model that starts from saved weights, and by `Persistence` for folders that
hold no state of training. No rank ever has a whole copy beside what its residency keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from sixfold.checkpoint import MODEL, Piece, Spec
from sixfold.checkpoint.together import together
from sixfold.checkpoint.weights import Weights, open_weights
from sixfold.mesh import Mesh
from sixfold.parallel import persistent_buffers
from sixfold.state import ModelState, runs_of


def given_names(module: nn.Module, weights: Weights, aliases: Mapping[str, str]) -> set[str]:
    """Parameters and buffers of a module that `weights` has, by all of their names."""
    here = {name for name, _ in module.named_parameters()} | persistent_buffers(module).keys()
    found = {name for name in here if name in weights.places}
    return found | {alias for alias, name in aliases.items() if name in found}


def find_weights(module: nn.Module, source: Path, aliases: Mapping[str, str], mesh: Mesh) -> Weights:
    """Open weights and compare them with a module, which may be on meta. A collective.

    Raises:
        CheckpointError: there are none, or lists all that does not fit; on every rank.
    """
    return together(mesh, source, lambda: matching_weights(module, source, aliases))


def matching_weights(module: nn.Module, source: Path, aliases: Mapping[str, str]) -> Weights:
    """`find_weights` on one rank."""
    weights = open_weights(source).under(aliases)
    named = {**dict(module.named_parameters()), **persistent_buffers(module)}
    on_meta = any(tensor.is_meta for tensor in named.values())
    # Beside a module on meta, what has numbers already (fresh adapters, say) needs none.
    wanted = {n: t for n, t in named.items() if t.is_meta or not on_meta or n in weights.places}
    weights.check(
        {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in wanted.items()},
        # Old files hold what is computed now.
        passed_over=[name for name, _ in module.named_buffers()],
    )
    return weights


def read_weights(module: nn.Module, state: ModelState, weights: Weights) -> None:
    """Fill masters and buffers, then bring them into the working parameters. A collective.

    Raises:
        CheckpointError: a file cannot be read; on every rank. The model has parts of it then.
    """
    pieces = [
        Piece(MODEL, slot.name, start, part)
        for unit, slot in state.slots()
        if slot.name in weights.places
        for start, part in runs_of(
            slot, max(0, unit.own.start - slot.offset), unit.part_of(unit.master, slot)
        )
    ]
    buffers = {n: each for n, each in persistent_buffers(module).items() if n in weights.places}
    read = {name: torch.empty(buffer.shape, dtype=buffer.dtype) for name, buffer in buffers.items()}
    pieces += [Piece(MODEL, name, 0, numbers) for name, numbers in read.items()]
    filled = [piece for piece in pieces if piece.tensor.numel()]
    together(state.mesh, weights.folder, lambda: weights.fill(filled))
    with torch.no_grad():
        for name, buffer in buffers.items():
            buffer.copy_(read[name])
    state.publish(None)
