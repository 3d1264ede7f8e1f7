"""Initial weights are a function of seed and names: not of ranks, nor of the process's random state."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sixfold
from sixfold.base.errors import MeshError, ModelError, StateError
from sixfold.testing import Pool
from tests.ranks import plain

MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(5, 3),
    "conv1d": lambda: nn.Conv1d(3, 4, 3),
    "conv2d": lambda: nn.Conv2d(3, 4, 3, groups=1),
    "conv3d": lambda: nn.Conv3d(2, 4, 2),
    "conv_transpose": lambda: nn.ConvTranspose2d(3, 4, 3),
    "embedding": lambda: nn.Embedding(7, 3, padding_idx=2),
    "embedding_bag": lambda: nn.EmbeddingBag(7, 3),
    "layer_norm": lambda: nn.LayerNorm(4),
    "rms_norm": lambda: nn.RMSNorm(4),
    "group_norm": lambda: nn.GroupNorm(2, 4),
    "instance_norm": lambda: nn.InstanceNorm1d(4, affine=True),
    "batch_norm1d": lambda: nn.BatchNorm1d(4),
    "batch_norm2d": lambda: nn.BatchNorm2d(4),
    "rnn": lambda: nn.RNN(3, 4),
    "lstm": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True),
    "gru": lambda: nn.GRU(3, 4),
    "lstm_cell": lambda: nn.LSTMCell(3, 4),
    "multihead_attention": lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
    "encoder_layer": lambda: nn.TransformerEncoderLayer(4, 2, 8),
    "transformer": lambda: nn.Transformer(4, 2, 1, 1, 8),
    "decoder_layer": lambda: nn.TransformerDecoderLayer(4, 2, 8),
    "bilinear": lambda: nn.Bilinear(3, 2, 4),
    "prelu": lambda: nn.PReLU(3),
    "conv_net": plain.ConvNet,
    "recommender": plain.Recommender,
    "decoder": plain.TASKS["decoder"].build,
    "llama": plain.TASKS["llama"].build,
    "gpt2": plain.TASKS["gpt2"].build,
    "mixtral": lambda: mixtral(),
}


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        max_position_embeddings=16,
    )
    model: nn.Module = MixtralForCausalLM(config)
    return model


def from_meta(build: Callable[[], nn.Module], **config: Any) -> dict[str, Tensor]:
    """The weights that a module gets which stood on the meta device; then the engine is gone again."""
    with torch.device("meta"):
        module = build()
    config = {"model": {"batch_stats": "micro"}, "optimizer": {"name": "sgd"}, **config}
    engine = sixfold.initialize(module, config=config)
    assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    weights = {
        **engine.full_state_dict(),
        **{name: buffer.clone() for name, buffer in module.named_buffers()},
    }
    engine.close()
    return weights


def digest(weights: dict[str, Tensor]) -> str:
    joined = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(weights.items()):
        joined.update(name.encode() + tensor.to(torch.float64).numpy().tobytes())
    return joined.hexdigest()


def digests(seed: int, zero: int) -> dict[str, str]:
    torch.manual_seed(torch.distributed.get_rank() + 17)  # ranks are in different random states
    state = torch.get_rng_state()
    found = {}
    for name, build in MODULES.items():
        found[name] = digest(from_meta(build, seed=seed, layout={"zero": zero}))
        assert torch.equal(torch.get_rng_state(), state), f"{name} drew from the process's own stream"
        torch.rand(1)
        state = torch.get_rng_state()
    return found


def test_weights_from_meta_are_the_same_for_any_number_of_ranks_and_any_cut(rank_pool: Pool) -> None:
    first, *others = [
        each
        for ranks, zero in ((1, 0), (2, 0), (3, 3), (4, 3))
        for each in rank_pool.run(digests, 5, zero, ranks=ranks, timeout_s=60)
    ]
    for other in others:
        assert other == first
    another_seed = rank_pool.run(digests, 6, 0, ranks=1, timeout_s=60)[0]
    constant = {name for name in MODULES if name.endswith("_norm") or name.startswith("batch_norm")} | {
        "prelu"
    }
    assert {name for name in MODULES if another_seed[name] == first[name]} == constant


@pytest.mark.ranks(2, timeout_s=60)
def test_weights_from_meta_follow_the_models_own_rules() -> None:
    """Sizes are those of a module that was built with storage, tensor by tensor, ties included."""
    builds = {
        "llama": partial(wide, plain.llama_config),
        "gpt2": partial(wide, plain.gpt2_config),
        "decoder": MODULES["decoder"],
        "multihead_attention": MODULES["multihead_attention"],
        "lstm": lambda: nn.LSTM(24, 32),
        "batch_norm2d": MODULES["batch_norm2d"],
    }
    for kind, build in builds.items():
        torch.manual_seed(1)
        built = build()
        expected = {**built.state_dict(), **dict(built.named_buffers())}
        found = from_meta(build)
        assert found.keys() == expected.keys(), kind
        for name, tensor in expected.items():
            check_alike(f"{kind} {name}", found[name].double(), tensor.double())


def check_alike(name: str, found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    if expected.numel() < 2 or float(expected.std()) == 0 or not_drawn(name):
        assert torch.equal(found, expected), name
        return
    assert not torch.equal(found, expected), f"{name}: drawn from a stream of its own"
    # The standard error of a standard deviation is 1 / sqrt(2 n) of it.
    spread = 5 / (2 * expected.numel()) ** 0.5
    assert float(found.std() / expected.std()) == pytest.approx(1.0, abs=2 * spread), name
    assert abs(float(found.mean() - expected.mean())) < 7 * float(expected.std()) / expected.numel() ** 0.5, (
        name
    )


def not_drawn(name: str) -> bool:
    return "inv_freq" in name


def wide(config: Callable[[], Any]) -> nn.Module:
    from transformers import AutoModelForCausalLM

    chosen = config()
    chosen.update({"hidden_size": 64, "intermediate_size": 96, "n_embd": 64})
    model: nn.Module = AutoModelForCausalLM.from_config(chosen)
    return model


@pytest.mark.ranks(1)
def test_a_parents_rule_comes_after_its_childrens() -> None:
    weights = from_meta(partial(wide, plain.gpt2_config))
    ratio = (
        weights["transformer.h.0.mlp.c_proj.weight"].std() / weights["transformer.h.0.mlp.c_fc.weight"].std()
    )
    assert float(ratio) == pytest.approx(0.5, rel=0.05)  # 1 / sqrt(2 layers x 2)


@pytest.mark.ranks(2)
def test_ties_hold_when_storage_is_made() -> None:
    for name, one, other in (
        ("recommender", "item.weight", "history.weight"),
        ("gpt2", "lm_head.weight", "transformer.wte.weight"),
    ):
        with torch.device("meta"):
            module = MODULES[name]()
        engine = sixfold.initialize(module, config={})
        parameters = dict(module.named_parameters(remove_duplicate=False))
        assert parameters[one] is parameters[other]
        whole = engine.full_state_dict()
        assert torch.equal(whole[one], whole[other])
        engine.close()


class Forgetful(nn.Module):
    """Writes one of its tensors and leaves out a parameter, a buffer and half of a third."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.scale, self.part = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))
        self.register_buffer("table", torch.arange(3))
        self.fine = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.fine.zero_()
            self.part[:2] = 1


@pytest.mark.ranks(2)
def test_a_tensor_that_no_rule_writes_is_named() -> None:
    with pytest.raises(ModelError) as caught:
        from_meta(Forgetful)
    assert "3 tensor(s)" in caught.value.given
    for name in ("scale", "part", "table"):
        assert name in caught.value.given
    assert "fine" not in caught.value.given
    assert "inner" not in caught.value.given


@pytest.mark.ranks(2)
def test_what_has_storage_keeps_its_numbers_beside_what_stands_on_meta() -> None:
    def build() -> nn.Module:
        torch.manual_seed(torch.distributed.get_rank())
        with torch.device("cpu"):
            base = nn.Linear(3, 3)
        return nn.ModuleDict({"base": base, "adapter": nn.Linear(3, 2)})

    torch.manual_seed(0)
    expected = nn.Linear(3, 3)
    found = from_meta(build)
    assert torch.equal(found["base.weight"], expected.weight)
    assert torch.equal(
        found["adapter.weight"],
        from_meta(lambda: nn.ModuleDict({"adapter": nn.Linear(3, 2)}))["adapter.weight"],
    )


@pytest.mark.ranks(1, 3)
def test_a_model_with_weights_keeps_those_of_rank_0() -> None:
    torch.manual_seed(torch.distributed.get_rank())
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).bfloat16())
    model[1].running_mean.normal_()
    torch.manual_seed(0)
    expected = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).bfloat16())
    expected[1].running_mean.normal_()
    identities = list(model.parameters())
    engine = sixfold.initialize(model, config={"model": {"batch_stats": "micro"}})
    assert all(one is other for one, other in zip(model.parameters(), identities, strict=True))
    for (name, tensor), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
        assert tensor.dtype == other.dtype
    assert engine.module is model


def variants() -> dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]]:
    """What may differ between ranks, by the word that names it in the error."""
    same = partial(nn.Linear, 4, 4)
    tied = nn.ModuleDict({"one": same(), "other": same()})
    tied["other"].weight = tied["one"].weight
    with_buffer = same()
    with_buffer.register_buffer("extra", torch.zeros(2))
    return {
        "parameter names": (lambda: nn.Sequential(same()), {}),
        "parameter shapes": (partial(nn.Linear, 2, 4), {}),
        "parameter types": (lambda: same().double(), {}),
        "requires_grad": (lambda: freeze(same()), {}),
        "buffers": (lambda: with_buffer, {}),
        "tied names": (lambda: tied, {}),
        "configuration": (same, {"optimizer": {"lr": 0.5}}),
    }


def freeze(module: nn.Linear) -> nn.Module:
    module.bias.requires_grad_(False)
    return module


@pytest.mark.ranks(2, 3)
def test_ranks_that_differ_are_told_in_what(num_ranks: int) -> None:
    odd = num_ranks - 1
    for word, (build, config) in variants().items():
        is_odd = torch.distributed.get_rank() == odd
        with pytest.raises(MeshError) as caught:
            sixfold.initialize(build() if is_odd else nn.Linear(4, 4), config=config if is_odd else {})
        assert f"rank(s) {odd} differ from rank 0" in caught.value.given
        assert word in caught.value.given


@pytest.mark.ranks(1, 2)
def test_batch_statistics_are_refused_where_the_batch_is_cut(num_ranks: int) -> None:
    def start(**config: Any) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        sixfold.initialize(model, config=config, loss_fn=lambda output, batch: output.mean())

    start(model={"batch_stats": "micro"}, batch={"micro": 1})
    for config in ({}, {"batch": {"micro": 2}}):
        if num_ranks == 1 and not config:
            start()
            continue
        with pytest.raises(ModelError, match="BatchNorm"):
            start(**config)


@pytest.mark.ranks(1)
def test_an_optimizer_over_meta_parameters_is_refused_with_the_way_out() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(StateError, match="factory"):
        sixfold.initialize(model, config={}, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
