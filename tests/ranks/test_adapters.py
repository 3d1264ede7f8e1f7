"""Adapters beside a frozen model, in residencies that cut it: the numbers of one process, and whole again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sixfold
from sixfold.models.decoder import Decoder, DecoderConfig
from sixfold.models.lora import adapters_of, add_adapters

SIZES = {"vocab_size": 61, "context_length": 16, "width": 32, "num_layers": 2, "num_heads": 4}
TOKENS = torch.randint(61, (4, 17), generator=torch.Generator().manual_seed(1))


def model() -> Decoder:
    torch.manual_seed(0)
    built = Decoder(DecoderConfig.derive(**SIZES))
    add_adapters(built, ["q_proj", "down_proj"], rank=2, alpha=4.0, seed=3)
    return built.double()


def reference(steps: int) -> Decoder:
    built = model()
    optimizer = torch.optim.AdamW([p for p in built.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        loss, weight = built(TOKENS)
        (loss / weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    return built


@pytest.mark.ranks(2)
@pytest.mark.parametrize("zero", [1, 3])
def test_only_adapters_learn_and_are_saved(zero: int, tmp_path: Path) -> None:
    engine = sixfold.initialize(
        model(),
        config={"layout": {"zero": zero}, "optimizer": {"lr": 1e-2, "weight_decay": 0.01}},
    )
    part = slice(2 * engine.data_rank, 2 * engine.data_rank + 2)
    for _ in range(4):
        engine.train_step({"tokens": TOKENS[part]})
    expected = reference(4).state_dict()
    found = engine.full_state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-10)
    factors = [part.lora_B.weight for _, part in adapters_of(engine.module)]
    with engine.gathered(factors):
        assert all(bool(factor.any()) for factor in factors)
    engine.save(tmp_path / "adapters", only="adapters")
    again = sixfold.initialize(
        model(), config={"layout": {"zero": zero}, "optimizer": {"lr": 1e-2, "weight_decay": 0.01}}
    )
    again.load(tmp_path / "adapters")
    assert again.num_steps == 4
    for name, tensor in again.full_state_dict().items():
        assert torch.equal(tensor, found[name])


@pytest.mark.ranks(2)
def test_a_base_from_files_goes_under_fresh_adapters(tmp_path: Path) -> None:
    whole = model().float().state_dict()
    if torch.distributed.get_rank() == 0:
        base = {name: tensor for name, tensor in whole.items() if "lora_" not in name}
        save_file(base, tmp_path / "model.safetensors")
    torch.distributed.barrier()
    with torch.device("meta"):
        built = Decoder(DecoderConfig.derive(**SIZES))
    add_adapters(built, ["q_proj", "down_proj"], rank=2, alpha=4.0, seed=3)
    engine = sixfold.initialize(built, config={"layout": {"zero": 3}}, weights=tmp_path)
    for name, tensor in engine.full_state_dict().items():
        assert torch.equal(tensor, whole[name]), name
