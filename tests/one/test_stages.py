"""Models cut into stages compute what they computed whole, stage after stage; others are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sixfold.base.errors import ModelError
from sixfold.config import LayoutConfig
from sixfold.models.decoder import Decoder, DecoderConfig
from sixfold.parallel import ModelCut

TOKENS = torch.randint(0, 30, (2, 7), generator=torch.Generator().manual_seed(3))


def _decoder() -> nn.Module:
    sizes = {"vocab_size": 30, "context_length": 6, "width": 8, "num_layers": 5, "num_heads": 2}
    return Decoder(DecoderConfig.derive(**sizes))


def _causal(kind: str, **sizes: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**sizes)
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config)
    return model


COMMON = {
    "vocab_size": 30,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}


def _gemma() -> nn.Module:
    """Scales its embeddings and its logits, and asks each block for its kind of attention."""
    return _causal("Gemma2", **COMMON, head_dim=4, sliding_window=4, attn_implementation="eager")


def _gpt2() -> nn.Module:
    """Carries no plan, adds positions to its embeddings, and ties its head."""
    import transformers

    sizes = {"vocab_size": 30, "n_embd": 8, "n_layer": 5, "n_head": 2, "n_positions": 16}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    model.pipeline_parts = (
        "transformer.wte",
        "transformer.wpe",
        "transformer.h",
        "transformer.ln_f",
        "lm_head",
    )
    return model


def _sequential() -> nn.Module:
    return nn.Sequential(nn.Embedding(30, 8), *(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)))


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "decoder": (_decoder, "tokens"),
    "llama": (lambda: _causal("Llama", **COMMON), "input_ids"),
    "qwen": (lambda: _causal("Qwen3", **COMMON, head_dim=4, tie_word_embeddings=True), "input_ids"),
    "gemma": (_gemma, "input_ids"),
    "gpt2": (_gpt2, "input_ids"),
    "sequential": (_sequential, "input"),
}


def first_tensor(output: Any) -> torch.Tensor:
    output = getattr(output, "logits", output)
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


@pytest.mark.parametrize(("pipe", "schedule"), [(3, "1f1b"), (2, "zero-bubble-v")])
@pytest.mark.parametrize("name", MODELS)
def test_stages_compute_what_the_model_does(name: str, pipe: int, schedule: str) -> None:
    build, argument = MODELS[name]
    torch.manual_seed(5)
    model = build().eval()
    with torch.no_grad():
        whole = first_tensor(model(**{argument: TOKENS}))
    cut = ModelCut.decide(model, LayoutConfig(pipe=pipe, schedule=schedule))  # type: ignore[arg-type]
    assert cut.plan is not None
    stages = sorted(
        (stage for rank in range(pipe) for stage in cut.stages(rank)), key=lambda each: each.number
    )
    own = dict(model.named_parameters())
    for stage in stages:
        for key, parameter in stage.parameters.items():
            if parameter is not own[key]:
                parameter.data.copy_(own[key])  # a copy of a tied weight
    held = [key for stage in stages for key in stage.parameters]
    assert set(held) == set(own)
    value: Any = None
    args, kwargs = ((TOKENS,), {}) if name == "sequential" else ((), {argument: TOKENS})
    with torch.no_grad():
        for stage in stages:
            value = stage(value, args, kwargs)
    assert torch.equal(first_tensor(value), whole)
    # The model itself is as it was.
    assert torch.equal(first_tensor(model(**{argument: TOKENS})), whole)
    assert [key for key, _ in model.named_parameters()] == list(own)


def test_a_stage_holds_nothing_of_the_others_but_names_are_the_models() -> None:
    model = _causal("Llama", **COMMON)
    cut = ModelCut.decide(model, LayoutConfig(pipe=2, balance=(2, 3)))
    first, last = (cut.stages(rank)[0] for rank in range(2))
    assert {key for key, _ in first.module.named_parameters()} == set(first.parameters)
    assert "model.layers.1.mlp.up_proj.weight" in first.parameters
    assert "lm_head.weight" in last.parameters
    assert not first.parameters.keys() & last.parameters.keys()
    assert last.module.get_submodule("model.layers.4") is model.get_submodule("model.layers.4")


def test_training_mode_follows_the_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Linear(2, 2))
    last = ModelCut.decide(model, LayoutConfig(pipe=2, balance=(1, 2))).stages(1)[0]
    model.eval()
    given = torch.ones(4, 2)
    assert torch.equal(last(given, (given,), {}), model[2](given))
    model.train()
    assert not torch.equal(last(given, (given,), {}), model[2](given))


class Loose(nn.Module):
    """Blocks, and a weight that stands in none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(2))
        self.pipeline_parts = ("blocks",)

    def forward(self, x: torch.Tensor) -> Any:
        for block in self.blocks:
            x = block(x * self.scale)
        return x


class Backwards(Loose):
    """Runs its blocks in another order than it says."""

    def __init__(self) -> None:
        super().__init__()
        del self.scale

    def forward(self, x: torch.Tensor) -> Any:
        for block in reversed(self.blocks):
            x = block(x)
        return x


def _routed() -> nn.Module:
    sizes = {**COMMON, "num_local_experts": 2, "output_router_logits": True}
    return _causal("Mixtral", **sizes)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: nn.Bilinear(2, 2, 2), "says nothing of the order of its parts"),
        (Loose, "no part of it holds scale"),
        (_routed, "routing of all layers"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused(build: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        ModelCut.decide(build(), LayoutConfig(pipe=2))
    assert "pipeline_parts" in caught.value.fix


def test_a_wrong_order_is_seen() -> None:
    stages = [
        ModelCut.decide(Backwards(), LayoutConfig(pipe=2, balance=(1, 2))).stages(rank)[0] for rank in (0, 1)
    ]
    given = torch.ones(1, 2)
    with pytest.raises(ModelError, match=r"its 1 block\(s\) in the order \[\]"):
        stages[0](None, (given,), {})


def test_blocks_that_return_tuples_are_refused() -> None:
    class Tupled(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return (super().forward(x),)

    class Model(Backwards):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Tupled(2, 2) for _ in range(3))

        def forward(self, x: torch.Tensor) -> Any:
            for block in self.blocks:
                x = block(x)[0]
            return x

    stage = ModelCut.decide(Model(), LayoutConfig(pipe=2)).stages(0)[0]
    with pytest.raises(ModelError, match="returns a tuple"):
        stage(None, (torch.ones(1, 2),), {})
