"""What the tests of the engine compare with: small models, their data, and a training loop of one process
in plain torch, with nothing of Sixfold in it.

Also the same update as a user of Sixfold would write it, for any cut of the global batch into ranks and
micro-batches.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sixfold.engine import Engine
from sixfold.models.decoder import Decoder, DecoderConfig
from sixfold.plan import cut_units

Batch = dict[str, Tensor]
NUM_SAMPLES = 12
VOCABULARY = 48


class ConvNet(nn.Module):
    """Two residual blocks with group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(8, 8, 3, padding=1, bias=False),
                nn.GroupNorm(2, 8),
                nn.ReLU(),
                nn.Conv2d(8, 8, 3, padding=1, bias=False),
                nn.GroupNorm(2, 8),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        for block in self.blocks:
            x = F.relu(x + block(x))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class Recommender(nn.Module):
    """Bags of items scored against items: a tied table, a frozen one, and a branch that few samples take."""

    def __init__(self) -> None:
        super().__init__()
        self.history = nn.EmbeddingBag(VOCABULARY, 8, mode="mean")
        self.frozen = nn.Embedding(VOCABULARY, 8).requires_grad_(False)
        self.mix = nn.Linear(16, 8)
        self.rare = nn.Linear(8, 8)
        self.item = nn.Linear(8, VOCABULARY)
        self.item.weight = self.history.weight

    def forward(self, bag: Tensor, user: Tensor, is_rare: Tensor) -> Tensor:
        x = self.mix(torch.cat([self.history(bag), self.frozen(user)], dim=1))
        if is_rare.any():  # otherwise `rare` gets no gradient on this rank
            x = torch.where(is_rare[:, None], self.rare(x), x)
        out: Tensor = self.item(torch.tanh(x))
        return out


class Patch(nn.Module):
    """A low-rank adapter over a frozen base in bf16, a vector of 7, a number, and what nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 12, bias=False).requires_grad_(False)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 12, bias=False)
        self.out = nn.Linear(12, 6)
        self.seven = nn.Parameter(torch.linspace(-1, 1, 7))
        self.scale, self.unused = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.ones(3))
        self.register_buffer("shift", torch.linspace(0, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.seven[:6] * self.scale + self.shift * self.seven[6]
        y = F.linear(y, self.base.weight.to(y.dtype)) + self.up(self.down(y))
        out: Tensor = x + self.out(torch.tanh(y))
        return out


class Patchwork(nn.Module):
    """Blocks of what is hard to keep book of; two of them share a weight, and few samples take the last."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Patch() for _ in range(4))
        self.blocks[2].out.weight = self.blocks[0].out.weight
        self.head = nn.Linear(6, 3)

    def to(self, *args: Any, **kwargs: Any) -> Patchwork:
        """As torch, except that bases stay in bf16."""
        super().to(*args, **kwargs)
        for block in self.blocks:
            block.base.bfloat16()
        return self

    def forward(self, x: Tensor, is_rare: Tensor) -> Tensor:
        for block in self.blocks[:3]:
            x = block(x)
        if is_rare.any():
            x = torch.where(is_rare[:, None], self.blocks[3](x), x)
        out: Tensor = self.head(x)
        return out


@dataclass(frozen=True)
class Task:
    """A model and what is learnt.

    Args:
        build: the model in fp32, always the same one.
        batch: the global batch of a step.
        loss: mean loss of any part of a batch as one process computes it; `weight` is what the mean is
            over, or the global weight for models that divide by that themselves.
        weight: what `loss` is a mean over.
        loss_fn: what the engine is given.
        fp32_inside: the model computes parts in fp32 whatever its type.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    weight: Callable[[Batch], float]
    loss_fn: Callable[[Any, Batch], Any] | None = None
    fp32_inside: bool = False


def _generator(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + step)


def _tokens(step: int) -> Tensor:
    # Few of the tokens occur, so that there is something to learn.
    return torch.randint(0, 6, (NUM_SAMPLES, 11), generator=_generator(step))


def _labelled(step: int) -> Batch:
    """Prompts and padding are left out of the labels, differently for every sample."""
    tokens, generator = _tokens(step), _generator(step)
    first = torch.randint(0, 5, (NUM_SAMPLES, 1), generator=generator)
    last = torch.randint(6, 12, (NUM_SAMPLES, 1), generator=generator)
    place = torch.arange(11)[None]
    labels = tokens.masked_fill((place < first) | (place >= last), -100)
    return {"input_ids": tokens, "attention_mask": (place < last).long(), "labels": labels}


def _images(step: int) -> Batch:
    generator = _generator(step)
    image = torch.randn(NUM_SAMPLES, 3, 6, 6, generator=generator)
    return {"image": image, "label": torch.randint(0, 2, (NUM_SAMPLES,), generator=generator)}


def _points(step: int) -> Batch:
    generator = _generator(step)
    label = torch.randint(0, 3, (NUM_SAMPLES,), generator=generator)
    x = torch.randn(NUM_SAMPLES, 6, generator=generator) + 2.0 * label[:, None]
    return {"x": x, "is_rare": torch.arange(NUM_SAMPLES) == step % NUM_SAMPLES, "label": label}


def _bags(step: int) -> Batch:
    generator = _generator(step)
    is_rare = torch.zeros(NUM_SAMPLES, dtype=torch.bool)
    is_rare[step % NUM_SAMPLES] = True
    return {
        "bag": torch.randint(0, VOCABULARY, (NUM_SAMPLES, 4), generator=generator),
        "user": torch.randint(0, VOCABULARY, (NUM_SAMPLES,), generator=generator),
        "is_rare": is_rare,
        "clicked": torch.randint(0, 6, (NUM_SAMPLES,), generator=generator),
        "importance": torch.randint(1, 4, (NUM_SAMPLES,), generator=generator),
    }


def _click_loss(output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    losses = F.cross_entropy(output, batch["clicked"], reduction="none")
    return (losses * batch["importance"]).sum(), batch["importance"].sum()


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return build()


def _decoder(dropout: float = 0.0) -> Decoder:
    return Decoder(
        DecoderConfig(
            vocab_size=VOCABULARY,
            context_length=10,
            width=16,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            ffn_width=24,
            dropout=dropout,
        )
    )


def llama_config(**changes: Any) -> Any:
    from transformers import LlamaConfig

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 16,
    }
    return LlamaConfig(**sizes | {"attn_implementation": "sdpa"} | changes)


def gpt2_config(**changes: Any) -> Any:
    from transformers import GPT2Config

    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2Config(**sizes | plain | changes)


def _llama() -> nn.Module:
    from transformers import LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM(llama_config())
    return model


def _gpt2() -> nn.Module:
    from transformers import GPT2LMHeadModel

    model: nn.Module = GPT2LMHeadModel(gpt2_config())
    return model


def num_targets(batch: Batch) -> float:
    """Labels that a causal model predicts."""
    return float((batch["labels"][:, 1:] != -100).sum())


def _causal(build: Callable[[], nn.Module]) -> Task:
    return Task(
        build=lambda: _seeded(build),
        batch=_labelled,
        # The same form of division in one process and in many: the model computes its loss in fp32.
        loss=lambda model, batch: model(**batch, num_items_in_batch=num_targets(batch)).loss,
        weight=num_targets,
        fp32_inside=True,
    )


def _decoder_task(build: Callable[[], nn.Module]) -> Task:
    return Task(
        build=lambda: _seeded(build),
        batch=lambda step: {"tokens": _tokens(step)},
        loss=lambda model, batch: _pair_mean(model(**batch)),
        weight=lambda batch: float(batch["tokens"][:, 1:].numel()),
    )


def _pair_mean(pair: tuple[Tensor, Tensor]) -> Tensor:
    return pair[0] / pair[1]


def _module_inputs(batch: Batch) -> Batch:
    return {name: batch[name] for name in ("bag", "user", "is_rare")}


TASKS: dict[str, Task] = {
    "decoder": _decoder_task(_decoder),
    "dropout": _decoder_task(lambda: _decoder(dropout=0.1)),
    "llama": _causal(_llama),
    "gpt2": _causal(_gpt2),
    "conv": Task(
        build=lambda: _seeded(ConvNet),
        batch=_images,
        loss=lambda model, batch: F.cross_entropy(model(batch["image"]), batch["label"]),
        weight=lambda batch: float(len(batch["label"])),
        loss_fn=lambda output, batch: F.cross_entropy(output, batch["label"]),
    ),
    "patchwork": Task(
        build=lambda: _seeded(Patchwork),
        batch=_points,
        loss=lambda model, batch: F.cross_entropy(model(batch["x"], batch["is_rare"]), batch["label"]),
        weight=lambda batch: float(len(batch["label"])),
        loss_fn=lambda output, batch: F.cross_entropy(output, batch["label"]),
    ),
    "recommender": Task(
        build=lambda: _seeded(Recommender),
        batch=_bags,
        loss=lambda model, batch: _pair_mean(_click_loss(model(**_module_inputs(batch)), batch)),
        weight=lambda batch: float(batch["importance"].sum()),
        loss_fn=_click_loss,
    ),
}

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    # Rates at which two fp32 runs that differ in one rounding stay together for 20 steps. At 1e-2 the
    # convolution net has a unit at the border of its ReLU in step 19: plain torch, with the loss times 12
    # and the gradients divided by 12, already differs from itself by 2e-5 there.
    "adamw": (torch.optim.AdamW, {"lr": 3e-3, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"lr": 5e-2, "momentum": 0.9}),
    "adagrad": (torch.optim.Adagrad, {"lr": 2e-2}),
}


def groups_of(model: nn.Module, settings: dict[str, Any], num_groups: int) -> list[dict[str, Any]]:
    """Parameter groups; of two, vectors form one with half the rate and without decay."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if num_groups == 1:
        return [{"params": parameters, **settings}]
    vectors = {**settings, "lr": settings["lr"] / 2, "weight_decay": 0.0}
    return [
        {"params": [parameter for parameter in parameters if parameter.dim() > 1], **settings},
        {"params": [parameter for parameter in parameters if parameter.dim() <= 1], **vectors},
    ]


def cast(batch: Batch, dtype: torch.dtype, device: str = "cpu") -> Batch:
    """All fields on `device`, floating ones in `dtype`."""
    return {
        key: value.to(device, dtype if value.is_floating_point() else None) for key, value in batch.items()
    }


@dataclass
class PlainRun:
    """What the loop of one process came to."""

    model: nn.Module
    losses: list[float]
    grad_norms: list[float]


@cache
def plain_run(
    name: str,
    dtype: torch.dtype,
    steps: int,
    optimizer: str,
    num_groups: int,
    clip_norm: float | None,
    device: str = "cpu",
) -> PlainRun:
    """The loop that everything is compared with."""
    task = TASKS[name]
    kind, settings = OPTIMIZERS[optimizer]
    model = task.build().to(device, dtype)
    made = kind(groups_of(model, settings, num_groups))
    losses, grad_norms = [], []
    for step in range(steps):
        made.zero_grad()
        loss = task.loss(model, cast(task.batch(step), dtype, device))
        loss.backward()
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:  # what nobody used has a gradient of zero
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(
            model.parameters(), clip_norm if clip_norm is not None else float("inf")
        )
        made.step()
        losses.append(loss.item())
        grad_norms.append(norm.item())
    return PlainRun(model, losses, grad_norms)


def rows(batch: Batch, places: range) -> Batch:
    """Part of a batch."""
    return {key: value[places.start : places.stop] for key, value in batch.items()}


def cuts(size: int, parts: int, shares: str, step: int) -> list[range]:
    """Divide `size` samples: "even", "uneven" (another cut every step), or "empty" (one part gets none)."""
    draw = random.Random(f"{size} {parts} {step}")
    borders = [place * size // parts for place in range(1, parts)]
    if shares == "uneven":
        borders = sorted(draw.sample(range(1, size), parts - 1))
    if shares == "empty" and parts > 1:
        twice = draw.randrange(parts - 1)
        borders = sorted(draw.sample(range(1, size), parts - 2))
        borders.insert(twice, [0, *borders, size][twice])
    return [range(start, stop) for start, stop in zip([0, *borders], [*borders, size], strict=True)]


def micro_batches(batch: Batch, num_micro: int) -> Iterator[Batch]:
    """Cut a share into at most `num_micro` parts."""
    size = len(next(iter(batch.values())))
    micro = -(-size // num_micro)
    for start in range(0, size, max(1, micro)):
        yield rows(batch, range(start, min(size, start + micro)))


def written_out_step(
    engine: Engine, task: Task, batch: Batch, num_micro: int, fractions: tuple[float, ...] = (1.0,)
) -> float:
    """One update as a user writes it out, from this rank's share; a backward for each fraction of a loss."""
    for part in micro_batches(batch, num_micro):
        loss = written_out_loss(engine, task, part)
        for fraction in fractions:
            is_last = fraction is fractions[-1]
            engine.backward(fraction * loss, weight=task.weight(part), retain_graph=not is_last)
    return engine.step().loss


def written_out_loss(engine: Engine, task: Task, part: Batch) -> Tensor:
    """Forward through the engine; the mean loss over `part`."""
    return task.loss(engine, part)  # type: ignore[arg-type]


@contextmanager
def small_units() -> Iterator[None]:
    """Units of one block each, however small the model."""
    defaults = cut_units.__defaults__
    cut_units.__defaults__ = (1024,)
    try:
        yield
    finally:
        cut_units.__defaults__ = defaults


def farthest(found: Mapping[str, Tensor], reference: nn.Module) -> float:
    """Largest difference over all parameters, by name."""
    expected = dict(reference.named_parameters())
    return max(
        float((found[name].double() - each.detach().cpu().double()).abs().max())
        for name, each in expected.items()
    )
