"""`optimizer.name = "muon"`: who gets which optimizer, and that it is torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sixfold
from sixfold.base.errors import ConfigError
from sixfold.models.decoder import Decoder, DecoderConfig


def decoder() -> Decoder:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "context_length": 16, "width": 32, "num_layers": 2, "num_heads": 2}
    return Decoder(DecoderConfig.derive(**sizes)).double()


TOKENS = {"tokens": torch.randint(97, (4, 17), generator=torch.Generator().manual_seed(1))}


def by_hand(model: Decoder) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2]
    rest = [p for name, p in model.named_parameters() if ".layers." not in name or p.dim() != 2]
    return [
        torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9)),
    ]


def test_matrices_of_blocks_get_muon_and_the_rest_adamw() -> None:
    asked = {"name": "muon", "lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9, "betas": [0.8, 0.9]}
    mine, theirs = decoder(), decoder()
    engine = sixfold.initialize(mine, config={"optimizer": asked})
    optimizers = by_hand(theirs)
    for _ in range(3):
        engine.train_step(TOKENS)
        loss, weight = theirs(**TOKENS)
        (loss / weight).backward()
        for optimizer in optimizers:
            optimizer.step()
        theirs.zero_grad()
    for name, tensor in engine.full_state_dict().items():
        torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=0, atol=1e-12)


def test_a_model_without_such_matrices_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4))
    with pytest.raises(ConfigError, match=r"layout\.blocks"):
        sixfold.initialize(
            model, config={"optimizer": {"name": "muon"}}, loss_fn=lambda out, batch: out.mean()
        )
