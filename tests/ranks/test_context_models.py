"""Models over the context axis that nobody wrote for it: which run, which are refused and how, and that
nothing of it stays behind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sixfold
from sixfold.base.errors import ModelError, StateError
from sixfold.engine import Engine
from sixfold.plan import attention_traffic
from sixfold.testing.exchanges import noted_exchanges
from tests.ranks import plain, test_context
from tests.ranks.test_context import SAMPLES, STEPS, TASKS, alone, engine_of, mean_loss, share_of

WIDTH, LENGTH = 12, 13
_own_attention = F.scaled_dot_product_attention


class Encoder(nn.Module):
    """torch's own layers, which look both ways; `extra` works on hidden states [batch, length, width]."""

    def __init__(self, extra: nn.Module | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=dropout, batch_first=True) for _ in range(2)
        )
        self.extra = extra
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x if self.extra is None else self.extra(x)


class AlongTokens(nn.Module):
    """A convolution over tokens, neighbours or at some distance."""

    def __init__(self, distance: int = 1) -> None:
        super().__init__()
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=distance, dilation=distance)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.transpose(1, 2)).transpose(1, 2)


class ByName(nn.Module):
    """Attention by a function that was looked up before."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
        return _own_attention(heads, heads, heads).transpose(1, 2).flatten(2)


def vectors(step: int, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    x, y = torch.randn(2, SAMPLES, length, WIDTH, dtype=torch.float64, generator=draw)
    return x, y


def squares(output: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
    return (output - batch[1]).square().sum(), float(output.shape[0] * output.shape[1])


def mean_square(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(output, batch[1])


def start(model: nn.Module, loss_fn: Any = squares, **layout: Any) -> Engine:
    return sixfold.initialize(
        model,
        config={
            "layout": {"context": 2, **layout},
            "optimizer": {"name": "sgd", "lr": 0.05, "weight_decay": 0.0},
        },
        loss_fn=loss_fn,
    )


@pytest.mark.ranks(2)
@pytest.mark.parametrize("loss_fn", [squares, mean_square], ids=["pair", "mean"])
def test_layers_of_torch_run_as_they_are(loss_fn: Any) -> None:
    reference, engine = Encoder(), start(Encoder(), loss_fn)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05)
    for step in range(STEPS):
        batch = vectors(step)
        found = loss_fn(reference(batch[0]), batch)
        loss = found[0] / found[1] if isinstance(found, tuple) else found
        assert engine.eval_step(batch).loss == pytest.approx(float(loss), rel=1e-12)
        assert engine.train_step(batch) == pytest.approx(float(loss), rel=1e-12)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert plain.farthest(engine.full_state_dict(), reference) < 1e-10
    engine.close()


def _shifting(output: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
    return (output[:, :-1] - batch[1][:, 1:]).square().sum(), float(output[:, :-1, 0].numel())


def _mistral(window: int) -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    model: nn.Module = MistralForCausalLM(
        MistralConfig(
            vocab_size=test_context.VOCABULARY,
            hidden_size=24,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            sliding_window=window,
        )
    )
    return model


def _asleep() -> nn.Module:
    """A convolution that does nothing before it has learned."""
    mix = AlongTokens()
    for parameter in mix.parameters():
        nn.init.zeros_(parameter)
    return Encoder(_Branch(mix))


class _Branch(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.full((WIDTH,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.inner(x)


class Windowed(nn.Module):
    """Attention to the last rows, by a mask that it makes of positions. For the rank that has the innermost
    ones these are all that come before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.up = nn.Linear(WIDTH, WIDTH).double()

    def forward(self, x: Tensor, position_ids: Tensor | None = None) -> Tensor:
        place = torch.arange(x.shape[1]) if position_ids is None else position_ids[0]
        distance = place[:, None] - place
        heads = self.up(x).unflatten(-1, (2, -1)).transpose(1, 2)
        mask = (distance >= 0) & (distance < 7)
        return F.scaled_dot_product_attention(heads, heads, heads, mask).transpose(1, 2).flatten(2)


def _sum(output: Tensor, batch: Any) -> tuple[Tensor, float]:
    return output.square().sum(), float(output.shape[0] * output.shape[1])


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "convolution at a distance": (lambda: Encoder(AlongTokens(60)), squares, "differ by"),
    "convolution of zeros": (_asleep, squares, "differ by"),
    "shifted by loss_fn": (Encoder, _shifting, "differ by"),
    "attention by name": (lambda: Encoder(ByName()), squares, "differ by"),
    "batch statistics": (lambda: Encoder(nn.BatchNorm1d(LENGTH)), squares, "1 BatchNorm"),
    "attention dropout": (lambda: Encoder(dropout=0.1), squares, "dropout 0.1"),
    "mask on one rank": (Windowed, _sum, "mask"),
    # Longer than the part of a rank.
    "window": (lambda: _mistral(20), None, "sliding_window 20"),
}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_is_refused_on_every_rank(name: str) -> None:
    build, loss_fn, said = REFUSED[name]
    batch: Any = vectors(0, 120 if "distance" in name else LENGTH)
    if name == "mask on one rank":
        batch = {"x": batch[0]}
    if name == "window":
        batch = test_context._padded(0)

    def train() -> None:
        with closing(start(build(), loss_fn)) as engine:
            engine.train_step(batch)

    with pytest.raises(ModelError, match=said) as caught:
        train()
    assert "layout.context = 1" in caught.value.fix


@pytest.mark.ranks(2)
def test_batches_that_do_not_fit_are_refused() -> None:
    engine = engine_of("plain", context=2)
    with pytest.raises(ModelError, match="sequences of 3 tokens"):
        engine.train_step({"tokens": torch.zeros(2, 4, dtype=torch.long)})
    with pytest.raises(ModelError, match="different batches"):
        engine.train_step(TASKS["plain"].batch(engine.mesh.rank))
    with pytest.raises(StateError, match=r"layout.context = 2") as caught:
        engine(torch.zeros(2, 8, dtype=torch.long))
    assert "engine.train_step(batch)" in caught.value.fix
    engine.close()
    engine = engine_of("padded", context=2)
    mask = torch.zeros(SAMPLES, 6, 21, 21)
    with pytest.raises(ModelError, match="attention_mask") as refused:
        engine.train_step({**TASKS["padded"].batch(0), "attention_mask": mask})
    assert "[batch, 1, length, length]" in refused.value.fix
    engine.close()


def _opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=test_context.VOCABULARY,
        hidden_size=12,
        ffn_dim=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        word_embed_proj_dim=12,
        max_position_embeddings=48,
        attention_dropout=0.0,
        dropout=0.0,
    )
    model: nn.Module = OPTForCausalLM(config)
    return model.double()


@pytest.mark.ranks(2)
def test_positions_that_a_model_counts_over_the_padding() -> None:
    """A part of a sequence does not show them: refused once some are hidden, unless the batch gives them."""
    engine, alone = start(_opt(), None), _opt()
    tokens, place = test_context._tokens(0, 21), torch.arange(21).expand(SAMPLES, -1)

    def batch(mask: Tensor, **more: Tensor) -> plain.Batch:
        labels = tokens.masked_fill((place < 5) | ~mask, -100)
        return {"input_ids": tokens, "attention_mask": mask.long(), "labels": labels, **more}

    front, behind = place >= 4, place < 18
    given = front.cumsum(1).sub(1).clamp(min=0)
    for right in (batch(place >= 0), batch(behind), batch(front, position_ids=given)):
        assert engine.eval_step(right).loss == pytest.approx(float(alone(**right).loss), rel=1e-6)
    with pytest.raises(ModelError, match="hides tokens in front of others") as caught:
        engine.eval_step(batch(front))
    assert "position_ids" in caught.value.fix
    engine.close()


@pytest.mark.ranks(4)
def test_long_sequences_with_sequence_parallelism() -> None:
    """What a cut is tried on divides as they do."""
    engine = engine_of("padded", context=2, tensor=2, sequence_parallel=True)
    tokens = torch.randint(0, 24, (2, 44), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "labels": tokens}
    loss = float(mean_loss(test_context.build("padded"), batch))
    assert engine.train_step(batch) == pytest.approx(loss, rel=1e-6)
    with pytest.raises(ModelError, match=r"42 tokens with layout\.sequence_parallel") as caught:
        engine.train_step({name: field[:, :42] for name, field in batch.items()})
    assert "a multiple of 4" in caught.value.fix
    engine.close()


@pytest.mark.ranks(2)
def test_nothing_stays_behind() -> None:
    fused, engine = torch.backends.mha.get_fastpath_enabled(), engine_of("anew", context=2)
    assert F.scaled_dot_product_attention is not _own_attention
    batch = share_of(engine, "anew", 0)
    engine.train_step(batch)
    # Outside of a step modules run on whole sequences, as they would without the axis.
    with torch.no_grad(), engine.gathered():
        whole = mean_loss(engine.module, batch)
    expected = engine.eval_step(batch).loss
    assert float(whole) == pytest.approx(expected, rel=1e-6)
    query = torch.randn(1, 2, 3, 4)
    assert F.scaled_dot_product_attention(query, query, query).shape == query.shape
    module = engine.module
    engine.close()
    assert F.scaled_dot_product_attention is _own_attention
    assert torch.backends.mha.get_fastpath_enabled() == fused
    assert not any("forward" in vars(part) for part in module.modules())
    assert module.config._attn_implementation == "eager"


@pytest.mark.ranks(3)
def test_a_long_sequence_that_does_not_divide() -> None:
    engine, module = engine_of("plain", None, context=3), test_context.build("plain")
    tokens = torch.randint(0, 24, (1, 1001), generator=torch.Generator().manual_seed(0))
    loss = mean_loss(module, {"tokens": tokens})
    assert engine.train_step({"tokens": tokens}) == pytest.approx(loss.item(), rel=1e-12)
    loss.backward()
    found = engine.gradients()
    expected = {name: each.grad for name, each in module.named_parameters()}
    assert max(float((found[name] - each).abs().max()) for name, each in expected.items()) < 1e-12
    engine.close()


@pytest.mark.ranks(2)
def test_losses_in_fp32_stay_together() -> None:
    def losses(**layout: Any) -> list[float]:
        model = test_context.build("packed").float()
        engine = sixfold.initialize(
            model, config={"layout": layout, "optimizer": {"lr": 3e-3}, "precision": {"compute": "fp32"}}
        )
        found = [engine.train_step(share_of(engine, "packed", step)) for step in range(20)]
        engine.close()
        return found

    alike = [losses(context=2), losses(data=2)]
    assert alike[0] == pytest.approx(alike[1], rel=1e-5)


@pytest.mark.ranks(2)
def test_bf16_attends_across_ranks_too_and_sends_what_the_formula_says() -> None:
    model, batch = test_context.build("plain").float(), {"tokens": test_context._tokens(0, 21)}
    reference = float(mean_loss(model, batch))
    engine = sixfold.initialize(model, config={"layout": {"context": 2}, "precision": {"compute": "bf16"}})
    assert engine.train_step(batch) == pytest.approx(reference, rel=3e-3)
    with noted_exchanges() as topics:
        engine.train_step(batch)
    sent = sum(topic.num_bytes for topic in topics if topic.op == "all-to-all")
    sizes = {"samples": SAMPLES, "length": 20, "heads": 6, "kv_heads": 2, "head_width": 4}
    layer = attention_traffic(2, **sizes, item_bytes=2)
    assert sent == 2 * (layer.forward + layer.backward)
    engine.close()


@pytest.mark.ranks(2)
def test_dropout_differs_between_parts() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            dropped = self.drop(x * self.scale)
            if self.training:
                seen.append(dropped.detach())
            return dropped

    seen: list[Tensor] = []
    engine = start(Noisy(), lambda output, batch: (output.sum(), 1.0))
    engine.train_step((torch.ones(1, 16, 4),))
    rows = engine.mesh.gather(seen[-1])
    assert not torch.equal(rows[0], rows[1])
    engine.close()


@pytest.mark.matrix  # compiling takes long
@pytest.mark.ranks(2, timeout_s=120)
def test_compiled_blocks_attend_across_ranks() -> None:
    losses = alone("plain").losses
    engine = engine_of("plain", context=2, compile="aot_eager")
    for step in range(2):
        assert engine.train_step(share_of(engine, "plain", step)) == pytest.approx(losses[step], rel=1e-10)
    engine.close()
