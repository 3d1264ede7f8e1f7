"""`torch.compile` per block: one graph for all equal blocks, hooks outside, the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sixfold.base.errors import ConfigError
from sixfold.models.decoder import Decoder, DecoderConfig
from tests.one.test_recompute import engine_of, refused
from tests.ranks import plain


def compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Graphs that blocks are compiled into from here on; a graph break raises."""
    graphs: list[Any] = []
    compile_ = torch.compile

    def count(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", lambda f, *, backend: compile_(f, backend=count, fullgraph=True))
    return graphs


def deep(name: str) -> nn.Module:
    """More equal blocks than torch would compile one function for."""
    from transformers import GPT2LMHeadModel, LlamaForCausalLM

    if name == "llama":
        config = plain.llama_config()
        config.num_hidden_layers = 12
        model: nn.Module = LlamaForCausalLM(config)
        return model
    if name == "gpt2":
        config = plain.gpt2_config()
        config.n_layer = 12
        return GPT2LMHeadModel(config)
    sizes = DecoderConfig.derive(
        vocab_size=48, context_length=10, width=16, num_heads=2, num_layers=12, dropout=0.1
    )
    return Decoder(sizes)


@pytest.mark.parametrize(("name", "kind"), [("decoder", None), ("llama", "full"), ("gpt2", "selective")])
def test_one_graph_for_all_blocks(name: str, kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = compiled_graphs(monkeypatch)
    model = deep(name)
    engine = engine_of(model, compile="eager", **({"recompute": kind} if kind else {}))
    assert len(graphs) == 1  # the trial
    seen: list[str] = []
    blocks = [
        part for part in model.modules() if type(part).__name__ in ("Block", "LlamaDecoderLayer", "GPT2Block")
    ]
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: seen.append("before"))
        block.register_forward_hook(lambda *_: seen.append("after"))
    for step in range(2):
        engine.train_step(plain.TASKS[name].batch(step))
    assert len(graphs) == 2
    assert len(blocks) == 12
    assert seen[-24:] == ["before", "after"] * 12


@pytest.mark.parametrize(
    ("name", "kind"), [("decoder", None), ("dropout", "selective"), ("conv", "full"), ("llama", None)]
)
def test_follows_compiled_blocks_of_one_process(name: str, kind: str | None) -> None:
    torch.compiler.reset()
    task, recompute = plain.TASKS[name], {"recompute": kind} if kind else {}
    engine = engine_of(task.build().double(), task.loss_fn, compile="aot_eager", **recompute)
    batches = [plain.cast(task.batch(step), torch.float64) for step in range(3)]
    losses = [engine.train_step(batch) for batch in batches]
    if name == "dropout":  # its random streams are the engine's own
        other = engine_of(task.build().double(), task.loss_fn, compile="aot_eager")
        assert losses == [other.train_step(batch) for batch in batches]
        assert plain.farthest(engine.full_state_dict(), other.module) == 0
        return
    torch.compiler.reset()
    model = task.build().double()
    blocks = next(part for part in model.modules() if isinstance(part, nn.ModuleList))
    for block in blocks:
        block.compile(backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for batch in batches:
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    assert plain.farthest(engine.full_state_dict(), model) < 1e-14


def test_compiled_and_recomputed_keeps_less() -> None:
    def packed(**layout: Any) -> int:
        torch.compiler.reset()
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        engine = engine_of(plain.TASKS["decoder"].build(), **layout)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            engine(**plain.TASKS["decoder"].batch(0))
        return sum(sizes)

    none, selective, full = (
        packed(compile="aot_eager", **more)
        for more in ({}, {"recompute": "selective"}, {"recompute": "full"})
    )
    assert none > selective > full


def test_backend_that_is_none() -> None:
    refused(ConfigError, "inductr", plain.TASKS["decoder"].build(), compile="inductr")


def test_backend_without_its_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch.compiler.reset()
    refused(ConfigError, "g\\+\\+", plain.TASKS["decoder"].build(), compile="inductor")
