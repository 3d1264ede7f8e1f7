"""Recompute per block: the same numbers bit for bit, less memory, hooks outside."""

from __future__ import annotations

import copy
import io
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

import sixfold
from sixfold.base.errors import ModelError
from sixfold.engine import Engine
from sixfold.models.decoder import Decoder, DecoderConfig
from sixfold.parallel import recompute as recompute_file
from sixfold.parallel.recompute import saves
from tests.ranks import plain

KINDS = ("full", "selective")
WITH_BLOCKS = ("decoder", "dropout", "llama", "gpt2", "conv")


def engine_of(model: nn.Module, loss_fn: Any = None, batch: Any = None, **layout: Any) -> Engine:
    config = {"layout": layout, "batch": batch or {}, "optimizer": {"name": "sgd", "lr": 0.05}}
    return sixfold.initialize(model, config=config, loss_fn=loss_fn)


def learned(name: str, dtype: torch.dtype = torch.float32, **layout: Any) -> list[Tensor]:
    """Losses, gradients and parameters of two updates, each of three micro-batches."""
    task = plain.TASKS[name]
    engine = engine_of(task.build().to(dtype), task.loss_fn, {"micro": 4}, **layout)
    losses = [engine.train_step(plain.cast(task.batch(step), dtype)) for step in range(2)]
    found = [torch.tensor(losses), *engine.gradients().values(), *engine.full_state_dict().values()]
    engine.close()
    return found


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


# The same numbers.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_bit_for_bit(name: str, kind: str) -> None:
    assert equal(learned(name, recompute=kind), learned(name))


@pytest.mark.parametrize("kind", KINDS)
def test_another_draw_of_dropout_would_be_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(*args: Any, **options: Any) -> Any:
        return checkpoint(*args, preserve_rng_state=False, **options)

    monkeypatch.setattr(recompute_file, "checkpoint", forgetful)
    assert not equal(learned("dropout", recompute=kind), learned("dropout"))


class Adapter(nn.Module):
    """A frozen projection with a trained low-rank addition."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def adapted() -> nn.Module:
    """A frozen bf16 decoder with adapters: inputs of the first block need no gradient."""
    model: Any = plain.TASKS["dropout"].build().to(torch.bfloat16).requires_grad_(False)
    torch.manual_seed(3)
    for block in model.model.layers:
        block.self_attn.q_proj = Adapter(block.self_attn.q_proj)
        block.mlp.down_proj = Adapter(block.mlp.down_proj)
    module: nn.Module = model
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_over_a_frozen_base(kind: str) -> None:
    def run(**layout: Any) -> list[Tensor]:
        engine = engine_of(adapted(), None, {"micro": 4}, **layout)
        losses = [engine.train_step(plain.TASKS["dropout"].batch(step)) for step in range(2)]
        return [torch.tensor(losses), *engine.gradients().values(), *engine.full_state_dict().values()]

    without = run()
    assert any(tensor.abs().max() > 0 for tensor in without[1:9])
    assert equal(run(recompute=kind), without)


class Keeping(nn.Module):
    """A block with buffers that a training forward changes, and that its result depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.norm(self.inner(x)))


def test_two_backwards_of_a_block_with_buffers() -> None:
    """Each runs the block again. (Selective ones torch refuses to run twice.)"""

    def gradients(recompute: str | None) -> list[Tensor]:
        task = plain.TASKS["patchwork"]
        engine = engine_of(task.build().double(), task.loss_fn, recompute=recompute)
        batch = plain.cast(task.batch(0), torch.float64)
        loss = task.loss(engine, batch)  # type: ignore[arg-type]
        engine.backward(0.25 * loss, retain_graph=True)
        engine.backward(0.75 * loss)
        engine.step()
        found = list(engine.gradients().values())
        engine.close()
        return found

    assert equal(gradients("full"), gradients(None))


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_are_updated_once(kind: str) -> None:
    def run(**layout: Any) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(Keeping(), Keeping())
        engine = engine_of(model, lambda output, batch: output.square().mean(), **layout)
        before = list(model.buffers())
        inputs = torch.randn(12, 8)
        for _ in range(2):
            engine.train_step((inputs,))
        assert all(one is other for one, other in zip(model.buffers(), before, strict=True))
        return [*engine.gradients().values(), *model.state_dict().values()]

    assert equal(run(recompute=kind), run())


@dataclass
class Answer:
    """An output as Hugging Face models return it."""

    hidden: Tensor
    extra: Tensor


class Wordy(nn.Module):
    """A block called by keyword, with a list among its arguments, that returns what it is told to."""

    def __init__(self, answer: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.answer = nn.Linear(8, 8), answer

    def forward(self, x: Tensor, *, parts: list[Tensor], scale: float = 1.0) -> Any:
        y = torch.tanh(self.linear(x) * parts[0]) * scale
        return self.answer(y, y.sum())


class Wordily(nn.Module):
    def __init__(self, answer: Callable[[Tensor, Tensor], Any], read: Callable[[Any], tuple[Tensor, Tensor]]):
        super().__init__()
        self.blocks = nn.ModuleList(Wordy(answer) for _ in range(2))
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for block in self.blocks:
            x, extra = self.read(block(x=x, parts=[x, x], scale=2.0))
            total = total + extra
        return x.square().mean() + total


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "tuple": (lambda y, extra: (y, extra), lambda out: out),
    "dict": (lambda y, extra: {"y": y, "e": extra}, lambda out: (out["y"], out["e"])),
    "dataclass": (Answer, lambda out: (out.hidden, out.extra)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_any_inputs_and_outputs(form: str, kind: str) -> None:
    def run(**layout: Any) -> list[Tensor]:
        torch.manual_seed(0)
        engine = engine_of(Wordily(*FORMS[form]), **layout)
        engine.train_step({"x": torch.randn(6, 8)})
        return list(engine.gradients().values())

    assert equal(run(recompute=kind), run())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_inside_a_checkpoint_of_the_user(kind: str, reentrant: bool) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            block = lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.3))  # noqa: E731
            self.blocks = nn.ModuleList([block(), block()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x.square().mean()

    def run(**layout: Any) -> list[Tensor]:
        torch.manual_seed(0)
        engine = engine_of(Outer(), **layout)
        engine.train_step({"x": torch.randn(6, 8).requires_grad_()})
        return list(engine.gradients().values())

    assert equal(run(recompute=kind), run())


# What is kept and what runs again.


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside that still live, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if id(storage) not in self._known | given:
                self._count(storage)
        return out

    def _count(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone() -> None:
            self._known.discard(key)
            self.live -= size

        weakref.finalize(storage, gone)


def _storages(tree: Any) -> Iterator[Any]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def memory(num_layers: int, **layout: Any) -> tuple[int, int]:
    """Bytes alive after forward, and the peak of forward and backward."""
    torch.manual_seed(0)
    config = DecoderConfig.derive(
        vocab_size=32, context_length=64, width=32, num_heads=2, num_layers=num_layers
    )
    engine = engine_of(Decoder(config), **layout)
    tokens = torch.randint(32, (4, 65))
    with LiveBytes() as seen:
        total, weight = engine(tokens=tokens)
        after_forward = seen.live
        engine.backward(total / weight)
    return after_forward, seen.peak


def test_memory_falls() -> None:
    held, peak = zip(
        *(memory(6, **layout) for layout in ({}, *({"recompute": k} for k in KINDS[::-1]))), strict=True
    )
    assert held[0] > 1.4 * held[1] > 2 * 1.4 * held[2]
    assert peak[0] > 1.3 * peak[1] > 1.3 * 1.3 * peak[2]


def test_full_keeps_the_inputs_of_a_block_alone() -> None:
    hidden_bytes = 4 * 64 * 32 * 4
    a_block = (memory(6, recompute="full")[0] - memory(2, recompute="full")[0]) / 4
    assert a_block == pytest.approx(hidden_bytes, rel=0.2)  # beside it the state of the random stream


@pytest.mark.parametrize(("kind", "calls"), [(None, 1), ("full", 2), ("selective", 2)])
def test_hooks_on_the_block_run_once(kind: str | None, calls: int) -> None:
    model: Any = plain.TASKS["decoder"].build()
    engine = engine_of(model, **({"recompute": kind} if kind else {}))
    seen: list[str] = []
    block = model.model.layers[1]
    block.register_forward_pre_hook(lambda *_: seen.append("before"))
    block.register_forward_hook(lambda *_: seen.append("after"))
    block.input_layernorm.register_forward_hook(lambda *_: seen.append("inside"))
    engine.train_step(plain.TASKS["decoder"].batch(0))
    assert seen == ["before", "inside", "after", "inside"][: 2 + calls]


def test_what_selective_keeps() -> None:
    aten, keep, again = torch.ops.aten, CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
    flash = aten._scaled_dot_product_flash_attention.default
    efficient = aten._scaled_dot_product_efficient_attention.default
    x = torch.zeros(2, 2)
    assert saves(None, aten.mm.default, x, x) == keep
    assert saves(None, aten.addmm.default, x, x, x) == keep
    assert saves(None, aten.bmm.default, x, x) == again
    assert saves(None, aten.silu.default, x) == again
    assert saves(None, flash, x, x, x) == saves(None, flash, x, x, x, 0.0, True) == keep
    assert saves(None, flash, x, x, x, 0.1) == again
    assert saves(None, efficient, x, x, x, None, True) == keep
    assert saves(None, efficient, x, x, x, None, True, 0.1) == again


@pytest.mark.parametrize("name", list(recompute_file._ATTENTION))
def test_place_of_dropout(name: str) -> None:
    arguments = getattr(torch.ops.aten, name).default._schema.arguments
    assert arguments[recompute_file._ATTENTION[name]].name == "dropout_p"


# Without gradients, and afterwards.


def test_without_gradients_the_own_forward_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    task = plain.TASKS["llama"]
    model: Any = task.build()
    engine = engine_of(model, recompute="full")
    monkeypatch.setattr(recompute_file, "checkpoint", None)
    assert engine.eval_step(task.batch(0)).loss > 0
    prompt = task.batch(0)["input_ids"][:1, :4]
    cached = model.generate(prompt, max_new_tokens=4, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(prompt, max_new_tokens=4, do_sample=False, use_cache=False))


def test_a_copy_computes_with_its_own_weights() -> None:
    model: Any = plain.TASKS["decoder"].build()
    engine_of(model, recompute="full")
    tokens = plain.TASKS["decoder"].batch(0)["tokens"]
    written = io.BytesIO()
    torch.save(model, written)
    written.seek(0)
    for other in (copy.deepcopy(model), torch.load(written, weights_only=False)):
        assert torch.equal(other(tokens)[0], model(tokens)[0])
        with torch.no_grad():
            other.model.layers[0].mlp.down_proj.weight.add_(1)
        assert not torch.equal(other(tokens)[0], model(tokens)[0])


def test_closing_puts_the_own_forward_back() -> None:
    model: Any = plain.TASKS["decoder"].build()
    first, second = model.model.layers
    given = first.forward
    second.forward = lambda *args: given(*args)  # as tools that wrap instances leave it
    wrapped = second.forward
    engine = engine_of(model, recompute="full")
    assert first.forward != given
    engine.train_step(plain.TASKS["decoder"].batch(0))
    engine.close()
    assert "forward" not in vars(first)
    assert second.forward is wrapped


# What cannot be.


def refused(error: type[Exception], match: str, model: nn.Module, **layout: Any) -> None:
    with pytest.raises(error, match=match):
        engine_of(model, **layout)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleList([nn.Linear(2, 2)]) for _ in range(2))


@pytest.mark.parametrize("layout", [{"recompute": "full"}, {"compile": "eager"}])
@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), Nested()]
)
def test_without_blocks(model: nn.Module, layout: dict[str, str]) -> None:
    refused(ModelError, "no repeated blocks", model, **layout)


def test_named_blocks_alone_are_changed() -> None:
    model: Any = plain.TASKS["decoder"].build()
    engine_of(model, recompute="full", blocks=["model.layers.1.mlp"])
    changed = [name for name, part in model.named_modules() if "forward" in vars(part)]
    assert changed == ["model.layers.1.mlp"]


def test_model_that_recomputes_by_itself() -> None:
    model: Any = plain.TASKS["llama"].build()
    model.gradient_checkpointing_enable()
    refused(ModelError, "gradient checkpointing is on", model, recompute="full")
    model.gradient_checkpointing_disable()
    engine_of(model, recompute="full").close()


def test_filled_cache() -> None:
    model: Any = plain.TASKS["llama"].build()
    engine = engine_of(model, recompute="full")
    tokens = plain.TASKS["llama"].batch(0)["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=tokens, use_cache=True).past_key_values
    assert cache.get_seq_length() == 11
    with pytest.raises(ModelError, match="a cache of 11 keys"):
        engine(input_ids=tokens, past_key_values=cache)


def test_dropout_in_fused_attention_is_drawn_again() -> None:
    """On CPUs torch writes attention with dropout out; its draws come back with all others."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.mix(x)[:, None]
            y = F.scaled_dot_product_attention(y, y, y, dropout_p=0.3)[:, 0]
            return x + F.dropout(y, 0.3)

    def run(**layout: Any) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(Attending(), Attending())
        engine = engine_of(model, lambda output, batch: output.square().mean(), **layout)
        engine.train_step((torch.randn(2, 5, 8),))
        return list(engine.gradients().values())

    assert equal(run(recompute="selective"), run())
