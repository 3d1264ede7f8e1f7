"""Whether all ranks hold the same facts, such as the model's names and shapes.

Called once by the engine, before anything is exchanged that presumes it. It compares digests and sends no
facts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from sixfold.base.errors import MeshError
from sixfold.mesh.mesh import Mesh


def agree(mesh: Mesh, facts: Mapping[str, str]) -> None:
    """Raise on every rank unless all ranks hold the same facts.

    Args:
        facts: text under a name; the names are compared too.

    Raises:
        MeshError: with the names that differ and the ranks that differ from rank 0.
    """
    if mesh.world_size == 1:
        return
    digests = [_digest(name, text) for name, text in sorted(facts.items())]
    mine = torch.tensor(digests, device=mesh.device)
    # Lengths first: a gather of unequal lengths would hang or tear.
    counts = mesh.gather(torch.tensor([len(facts)], device=mesh.device))
    same_length = all(int(count) == len(facts) for count in counts)
    rows = mesh.gather(mine) if same_length else counts
    strangers = [rank for rank, row in enumerate(rows) if not torch.equal(row, rows[0])]
    if strangers:
        differing = [
            name
            for place, name in enumerate(sorted(facts))
            if same_length and any(int(row[place]) != int(rows[0][place]) for row in rows)
        ]
        raise MeshError(
            f"rank(s) {', '.join(map(str, strangers))} differ from rank 0 in: "
            f"{', '.join(differing) or 'the number of facts'}",
            rule="every rank builds the same model with the same configuration, and cuts it alike",
            fix="build the model from the same code, configuration and seed on every rank",
        )


def _digest(name: str, text: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{name}={text}".encode(), digest_size=8).digest(), "big") >> 1
