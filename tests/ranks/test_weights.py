"""Weights that other tools saved go straight into any layout; a rank reads and keeps what it owns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import sixfold
from sixfold.base.errors import CheckpointError
from sixfold.checkpoint import open_checkpoint, weights

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


def llama(device: str = "cpu", dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return LlamaForCausalLM._from_config(CONFIG, dtype=dtype)


def saved_as_theirs(folder: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The model as `save_pretrained` lays it out, in two files with an index, tied weights once. It is not
    called itself, since it imports whatever trainers are installed."""
    model = llama(dtype=dtype)
    if dist.get_rank() == 0:
        folder.mkdir()
        state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        files = {
            f"model-0000{number}-of-00002.safetensors": list(state)[number - 1 :: 2] for number in (1, 2)
        }
        for file, names in files.items():
            save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map = {name: file for file, names in files.items() for name in names}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    dist.barrier()
    return model


def tokens(engine: sixfold.Engine) -> dict[str, Tensor]:
    ids = torch.arange(6 * 8).view(6, 8) % 61
    mine = ids.tensor_split(engine.data_ranks)[engine.data_rank]
    return {"input_ids": mine, "labels": mine}


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_folder_of_hugging_face_goes_into_any_layout(zero: int, num_ranks: int, tmp_path: Path) -> None:
    expected = saved_as_theirs(tmp_path / "hf")
    config = {"layout": {"zero": zero}}
    engine = sixfold.initialize(llama("meta"), config=config, weights=tmp_path / "hf")
    found = engine.full_state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found[name], tensor), name
    # What no file holds, such as the frequencies of positions, is computed.
    loss = engine.train_step(tokens(engine))
    plain = sixfold.initialize(expected, config=config)
    assert loss == plain.train_step(tokens(plain))
    # Into an engine that has been trained: weights change, counters stay, and an average starts anew.
    averaged = sixfold.initialize(
        llama(), config={"layout": {"zero": zero}, "optimizer": {"ema_decay": 0.5, "lr": 0.1}}
    )
    averaged.train_step(tokens(averaged))
    averaged.load(tmp_path / "hf")
    assert averaged.num_steps == 1
    for state in (averaged.full_state_dict(), averaged.ema_state_dict()):
        assert torch.equal(state["lm_head.weight"], llama().lm_head.weight)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("zero", [1, 3])
def test_number_types_are_converted_and_masters_keep_what_files_hold(zero: int, tmp_path: Path) -> None:
    expected = saved_as_theirs(tmp_path / "hf")
    precision = {"compute": "bf16", "storage": "bf16"}
    engine = sixfold.initialize(
        llama("meta"), config={"layout": {"zero": zero}, "precision": precision}, weights=tmp_path / "hf"
    )
    engine.save(tmp_path / "c")
    name = "model.layers.0.mlp.up_proj.weight"
    source = expected.get_parameter(name)
    assert torch.equal(open_checkpoint(tmp_path / "c").read_optimizer(name)["master"], source)
    assert torch.equal(engine.full_state_dict()[name], source.bfloat16())
    # And back, out of the model part of that checkpoint.
    wide = sixfold.initialize(llama("meta"), config={"layout": {"zero": zero}}, weights=str(tmp_path / "c"))
    assert torch.equal(wide.full_state_dict()[name], source.bfloat16().float())
    assert wide.num_steps == 0


@pytest.mark.ranks(2)
def test_a_frozen_base_keeps_the_type_that_it_has(tmp_path: Path) -> None:
    saved_as_theirs(tmp_path / "hf", torch.bfloat16)
    model = llama("meta", torch.bfloat16).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    engine = sixfold.initialize(model, config={"layout": {"zero": 3}}, weights=tmp_path / "hf")
    found = engine.full_state_dict()["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(found, llama(dtype=torch.bfloat16).model.layers[1].mlp.up_proj.weight)


class Wide(nn.Module):
    """A parameter with a buffer beside it that no file holds, and one that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(8))
        self.norm = nn.BatchNorm1d(4)
        self.gain = nn.Parameter(torch.ones(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)
        self.scratch.fill_(7)


def numbers() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    with torch.device("meta"):
        state = Wide().state_dict()
    return {name: torch.randn(each.shape, generator=generator).to(each.dtype) for name, each in state.items()}


def memory_bytes() -> int:
    """This process's memory; of pages that ranks share its part."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon", "Pss_Shmem")))


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("trained", [True, False])
def test_ranks_take_memory_for_their_own_elements_alone(
    trained: bool, num_ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dist.get_rank() == 0:
        save_file(numbers(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = Wide()
    if not trained:
        model.layers.requires_grad_(False)
    num_read = 0
    plain = weights.read_into

    def counted(handle: Any, memory: memoryview) -> int:
        nonlocal num_read
        num_read += len(memory)
        return plain(handle, memory)

    monkeypatch.setattr(weights, "read_into", counted)
    config = {"layout": {"zero": 3}, "model": {"batch_stats": "micro"}}
    sixfold.initialize(nn.Linear(2, 2), config=config)  # what is loaded once
    dist.barrier()
    before = memory_bytes()
    dist.barrier()
    engine = sixfold.initialize(model, config=config, weights=tmp_path)
    total = 32 * 2**20
    assert num_read < total / num_ranks + 2**16
    dist.barrier()
    grown = torch.tensor(float(memory_bytes() - before))
    dist.all_reduce(grown)
    assert grown < total + num_ranks * 3 * 2**20
    found = engine.full_state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in numbers().items())
    assert engine.module.scratch.tolist() == [7, 7]


@pytest.mark.ranks(2)
def test_weights_that_do_not_fit_are_listed_on_every_rank(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)

    def refused(match: str, folder: Path = tmp_path) -> None:
        dist.barrier()
        with pytest.raises(CheckpointError, match=match):
            sixfold.initialize(nn.Linear(3, 2), config={}, weights=folder)
        dist.barrier()

    def write(tensors: dict[str, Tensor], name: str = "model.safetensors") -> None:
        if dist.get_rank() == 0:
            save_file(tensors, tmp_path / name)

    refused("neither a manifest.json nor safetensors files")
    refused("neither a manifest.json nor", tmp_path / "nowhere")
    write({"weight": torch.ones(2, 4), "bais": torch.ones(2, dtype=torch.int32)})
    refused(r"missing: bias \(saved: bais\)\n.*extra: bais\n.*weight: shape \[2, 4\] saved, \[2, 3\]")
    write({"weight": torch.ones(2, 3), "bias": torch.ones(2, dtype=torch.int32)})
    refused("bias: torch.int32 saved, torch.float32 expected")
    write(dict(model.state_dict()))
    sixfold.initialize(nn.Linear(3, 2), config={}, weights=tmp_path / "model.safetensors")
    dist.barrier()
    if dist.get_rank() == 0:
        whole = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    refused("model.safetensors: .*it is cut short")
    if dist.get_rank() == 0:
        (tmp_path / "model.safetensors").write_bytes(b"<html>")
    refused("cut short, or no safetensors file")
    # What is left of a save is no set of weights.
    engine = sixfold.initialize(nn.Linear(3, 2), config={}, loss_fn=lambda output, batch: output.sum())
    engine.save(tmp_path / "c")
    dist.barrier()
    if dist.get_rank() == 0:
        (tmp_path / "c" / "manifest.json").unlink()
        assert load_file(tmp_path / "c" / "model.safetensors")
    dist.barrier()
    with pytest.raises(CheckpointError, match="has no manifest"):
        engine.load(tmp_path / "c")


@pytest.mark.ranks(2)
@pytest.mark.parametrize("at", ["engine.weights.open_weights", "checkpoint.weights.fill_pieces"])
def test_an_unforeseen_error_on_one_rank_is_told_on_all(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a library, say, whichever step it comes in: the other ranks wait for nobody who has left."""

    def fail(*_: object) -> None:
        raise RuntimeError("boom")

    rank = dist.get_rank()
    if rank == 0:
        save_file(dict(nn.Linear(3, 2).state_dict()), tmp_path / "model.safetensors")
    dist.barrier()
    if rank == 1:
        monkeypatch.setattr(f"sixfold.{at}", fail)
    with pytest.raises(CheckpointError, match="RuntimeError: boom") as caught:
        sixfold.initialize(nn.Linear(3, 2), config={}, weights=tmp_path)
    assert isinstance(caught.value.__cause__, RuntimeError) == (rank == 1)
    assert caught.value.given.startswith("rank 1: ") == (rank == 0)
