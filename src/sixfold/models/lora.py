"""Low-rank adapters: frozen projections with a trained product of two thin matrices beside each.

Called by whoever fine-tunes, before an engine is made around the module. The names of everything that was
there stay the same; the files of adapters are another's affair. Source: LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FACTORS = ("lora_A", "lora_B")


class Factor(nn.Module):
    """One thin matrix. No `nn.Linear`: the initialisation rules of models would draw it anew."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Adapted(nn.Linear):
    """y = W x + b + (alpha / rank) B A x. Mixed into the class of a projection; never made by itself."""

    lora_A: Factor
    lora_B: Factor
    lora_scale: float

    def forward(self, x: Tensor) -> Tensor:
        beside: Tensor = self.lora_B(self.lora_A(x))
        return super().forward(x) + beside * self.lora_scale


_KINDS: dict[type, type[Adapted]] = {}


def _adapted(kind: type[nn.Linear]) -> type[Adapted]:
    """The class of a projection, with an adapter mixed in; the same one every time."""
    if kind not in _KINDS:
        _KINDS[kind] = type(f"Adapted{kind.__name__}", (Adapted, kind), {})
    return _KINDS[kind]


def add_adapters(module: nn.Module, targets: Sequence[str], rank: int, alpha: float, seed: int) -> list[str]:
    """Freeze `module` and give adapters to its projections whose names end in one of `targets`.

    A is drawn uniformly within 1 / sqrt(inputs), from `seed` and the name; B is zero, so at first nothing
    changes. Both are fp32, on the CPU, wherever the module is.

    Returns:
        Names of the projections in module order; empty where none matches.
    """
    module.requires_grad_(False)
    found = [(name, part) for name, part in module.named_modules() if _matches(name, part, targets)]
    for name, part in found:
        assert isinstance(part, nn.Linear), "only such are found"
        digest = hashlib.blake2b(f"lora:{seed}:{name}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        draw = torch.rand(rank, part.in_features, generator=generator)
        part.__class__ = _adapted(type(part))
        assert isinstance(part, Adapted), "made so"
        part.lora_A = Factor((2 * draw - 1) / part.in_features**0.5)
        part.lora_B = Factor(torch.zeros(part.out_features, rank))
        part.lora_scale = alpha / rank
    return [name for name, _ in found]


def adapters_of(module: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Every projection that has one, by its name."""
    for name, part in module.named_modules():
        if isinstance(part, Adapted):
            yield name, part


def _matches(name: str, part: nn.Module, targets: Sequence[str]) -> bool:
    return isinstance(part, nn.Linear) and any(
        name == target or name.endswith(f".{target}") for target in targets
    )
