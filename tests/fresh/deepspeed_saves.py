"""One rank of DeepSpeed that trains three steps, saves, and tells its next loss; started by `test_deepspeed`.

Prints the loss before the next step; rank 0 writes the weights that it has then, in full precision.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

SIZE = 8


class Small(nn.Module):
    """Tied, frozen and plain parameters in two groups, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(13, 7)
        self.inner = nn.Linear(7, 7)
        self.base = nn.Linear(7, 7, bias=False).requires_grad_(False)
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.table.weight
        self.norm = nn.LayerNorm(7)
        self.register_buffer("seen", torch.arange(3.0))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = self.norm(torch.tanh(self.inner(x) + self.base(x)))
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1).float(), tokens.flatten())


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices, and vectors with a rate of their own."""
    trained = [each for each in model.parameters() if each.requires_grad]
    return [
        {"params": [each for each in trained if each.dim() == 2]},
        {"params": [each for each in trained if each.dim() < 2], "lr": 0.02},
    ]


def tokens(step: int) -> Tensor:
    """The global batch of one step."""
    return (torch.arange(4 * SIZE).view(4, SIZE) * (step + 1)) % 13


def main() -> None:
    """Arguments: stage, "fp32" or "bf16", folder."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    stage, precision, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    model = Small()
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=groups_of(model),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage},
            "gradient_clipping": 0.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
            "bf16": {"enabled": precision == "bf16"},
        },
    )
    rank = dist.get_rank()
    for step in range(3):
        engine.backward(engine(tokens(step).tensor_split(2)[rank]))
        engine.step()
    engine.save_checkpoint(str(folder), client_state={"note": "plain values may come along"})
    weights = {
        name: safe_get_full_fp32_param(each) for name, each in model.named_parameters() if each.requires_grad
    }
    losses = []
    for step in (3, 4):
        loss = engine(tokens(step).tensor_split(2)[rank])
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / 2)
    if rank == 0:
        torch.save(
            {"weights": {name: each.clone() for name, each in weights.items()}, "losses": losses},
            folder / "truth",
        )
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
