"""The tensor axis follows one process: alone and with residencies, pipelines, data and cut sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sixfold
from sixfold.base.errors import MeshError, ModelError
from sixfold.engine import Engine
from sixfold.models.decoder import Decoder, DecoderConfig
from sixfold.models.lora import add_adapters
from sixfold.plan import layer_traffic, scores_traffic
from sixfold.testing import Pool
from sixfold.testing.exchanges import noted_exchanges
from tests.covering import Case, covering, label, with_drawn
from tests.ranks import plain

LENGTH, VOCABULARY, STEPS = 8, 25, 5
"""A vocabulary that no degree divides."""

SIZES = {"width": 16, "num_layers": 2, "ffn_width": 20, "context_length": LENGTH, "vocab_size": VOCABULARY}


def _decoder(num_kv_heads: int, tie: bool) -> Decoder:
    return Decoder(DecoderConfig(num_heads=4, num_kv_heads=num_kv_heads, tie_embeddings=tie, **SIZES))


def _adapted() -> Decoder:
    model = _decoder(2, tie=True)
    add_adapters(model, ("q_proj", "k_proj", "o_proj", "down_proj"), rank=2, alpha=4.0, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    return model


def _llama(tie: bool) -> nn.Module:
    from transformers import LlamaForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    sizes = {"vocab_size": VOCABULARY, "intermediate_size": 20, "tie_word_embeddings": tie}
    model: nn.Module = LlamaForCausalLM(plain.llama_config(**heads, **sizes))
    return model


def _gpt2() -> nn.Module:
    from transformers import GPT2LMHeadModel

    model: nn.Module = GPT2LMHeadModel(plain.gpt2_config(vocab_size=VOCABULARY, n_head=4))
    return model


def _tokens(step: int, length: int) -> Tensor:
    return torch.randint(0, 6, (plain.NUM_SAMPLES, length), generator=torch.Generator().manual_seed(step))


def _labelled(step: int) -> plain.Batch:
    tokens = _tokens(step, LENGTH)
    place = torch.arange(LENGTH)[None]
    return {"input_ids": tokens, "labels": tokens.masked_fill(place < torch.arange(12)[:, None] % 4, -100)}


def _causal(build: Callable[[], nn.Module]) -> plain.Task:
    return replace(plain._causal(build), batch=_labelled)


def _own(build: Any) -> plain.Task:
    return replace(plain._decoder_task(build), batch=lambda step: {"tokens": _tokens(step, LENGTH + 1)})


TASKS = {
    "decoder": _own(lambda: _decoder(4, tie=False)),
    "tied": _own(lambda: _decoder(1, tie=True)),
    "adapted": _own(_adapted),
    "llama": _causal(lambda: _llama(tie=False)),
    "tied-llama": _causal(lambda: _llama(tie=True)),
    "gpt2": _causal(_gpt2),
}

FACTORS: dict[str, tuple[Any, ...]] = {
    "model": ("decoder", "tied", "adapted", "tied-llama", "gpt2"),
    "tensor": (2, 4),
    "zero": (0, 1, 2, 3),
    "pipe": (1, 2),
    "data": (1, 2),
    "sequence": (False, True),
    "recompute": (None, "full", "selective"),
    "clip_norm": (None, 0.3),
    "loss_chunk": (None, 13),
    "transport": ("host", "network"),
}

DRAWN = ("recompute", "clip_norm", "loss_chunk", "transport")
"""Not multiplied out in the full product, but drawn for each of its cases."""


def ranks_of(case: Case) -> int:
    return int(case["tensor"] * case["pipe"] * case["data"])


def legal(case: Case, most: int = 4) -> bool:
    has_no_plan_of_stages = case["model"] == "gpt2" and case["pipe"] > 1
    return ranks_of(case) <= most and not has_no_plan_of_stages


CASES = covering(FACTORS, legal)


@dataclass
class Reference:
    """What one process came to."""

    whole: dict[str, Tensor]
    losses: list[float]
    norms: list[float]


@cache
def reference(name: str, dtype: torch.dtype, steps: int, clip_norm: float | None) -> Reference:
    task = TASKS[name]
    model = task.build().to(dtype)
    optimizer = torch.optim.SGD(
        [each for each in model.parameters() if each.requires_grad], lr=0.1, momentum=0.9
    )
    losses, norms = [], []
    for step in range(steps):
        optimizer.zero_grad()
        loss = task.loss(model, task.batch(step))
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm or float("inf"))))
        optimizer.step()
        losses.append(loss.item())
    return Reference({name: each.detach() for name, each in model.named_parameters()}, losses, norms)


def engine_of(case: Case, dtype: torch.dtype = torch.float64) -> Engine:
    config: dict[str, Any] = {
        "layout": {
            key: case[key]
            for key in ("tensor", "zero", "pipe", "data", "recompute", "loss_chunk", "transport")
        },
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        "batch": {"micro": 6},
    }
    config["layout"] |= {"sequence_parallel": case["sequence"], "compile": case.get("compile")}
    if case["clip_norm"] is not None:
        config["optimizer"]["clip_norm"] = case["clip_norm"]
    with plain.small_units():
        return sixfold.initialize(TASKS[case["model"]].build().to(dtype), config=config)


def train(engine: Engine, case: Case, steps: int) -> tuple[list[float], list[float]]:
    losses, norms = [], []
    for step in range(engine.num_steps, steps):
        batch = TASKS[case["model"]].batch(step)
        share = plain.cuts(plain.NUM_SAMPLES, engine.data_ranks, "uneven", step)[engine.data_rank]
        losses.append(engine.train_step(plain.rows(batch, share)))
        assert engine.last is not None
        norms.append(engine.last.grad_norm or 0.0)
    return losses, norms


def follow(case: Case, expected: Reference) -> None:
    engine = engine_of(case)
    losses, norms = train(engine, case, STEPS)
    # Hugging Face models compute norms and losses in fp32 whatever their type.
    is_fp32_inside = TASKS[case["model"]].fp32_inside
    bound = 1e-5 if is_fp32_inside else 1e-10
    whole = engine.full_state_dict()
    assert max(float((whole[name] - each).abs().max()) for name, each in expected.whole.items()) < bound
    assert losses == pytest.approx(expected.losses, rel=3e-6 if is_fp32_inside else 1e-12, abs=0)
    assert norms == pytest.approx(expected.norms, rel=1e-5 if is_fp32_inside else 1e-10, abs=0)
    assert losses[-1] < losses[0]
    engine.close()


def expected_of(case: Case) -> Reference:
    return reference(case["model"], torch.float64, STEPS, case["clip_norm"])


@pytest.mark.parametrize("case", CASES, ids=label)
def test_follows_one_process(case: Case, rank_pool: Pool) -> None:
    rank_pool.run(follow, case, expected_of(case), ranks=ranks_of(case), timeout_s=60)


@pytest.mark.matrix
@pytest.mark.parametrize("model", TASKS)
def test_follows_one_process_in_every_combination(model: str, rank_pool: Pool) -> None:
    for case in with_drawn({**FACTORS, "model": (model,)}, DRAWN, lambda case: legal(case, most=8)):
        rank_pool.run(follow, case, expected_of(case), ranks=ranks_of(case), timeout_s=120)


def without(model: str, **more: Any) -> Case:
    case = {name: values[0] for name, values in FACTORS.items()}
    return {**case, "model": model, **more}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("model", ["tied", "llama", "gpt2"])
def test_the_whole_model_can_be_read_used_and_edited(model: str) -> None:
    case = without(model, zero=3, loss_chunk=5)
    engine, whole = engine_of(case), TASKS[model].build().double()
    batch = TASKS[model].batch(0)
    with torch.no_grad(), engine.gathered():
        assert float(engine.module(**batch)[0]) == pytest.approx(float(whole(**batch)[0]), rel=1e-6)
        for parameter in engine.module.parameters():
            parameter.mul_(2)
    for parameter in whole.parameters():
        parameter.data.mul_(2)
    assert plain.farthest(engine.full_state_dict(), whole) == 0
    expected = float(TASKS[model].loss(whole, batch))
    assert engine.eval_step(batch).loss == pytest.approx(expected, rel=1e-6)
    engine.close()
    assert all("forward" not in vars(part) for part in engine.module.modules())


@pytest.mark.ranks(2)
def test_scores_are_whole_where_somebody_reads_them() -> None:
    """Without labels, from a decoder's `logits`, and for a loss function of the user's."""
    batch = TASKS["llama"].batch(0)
    whole = TASKS["llama"].build()
    engine = engine_of(without("llama"), torch.float32)
    with torch.no_grad():
        scores = whole(input_ids=batch["input_ids"]).logits
        torch.testing.assert_close(engine(input_ids=batch["input_ids"]).logits, scores)
        assert engine(**batch).logits is None
        loss, *rest = engine(**batch, return_dict=False)
        torch.testing.assert_close(loss, engine(**batch).loss)
        assert not any(isinstance(each, Tensor) for each in rest)
    engine.close()
    decoder, tokens = engine_of(without("tied"), torch.float32), TASKS["tied"].batch(0)["tokens"]
    with torch.no_grad():
        expected = TASKS["tied"].build().logits(tokens)  # type: ignore[operator]
        torch.testing.assert_close(decoder.module.logits(tokens), expected)  # type: ignore[operator]
    decoder.close()

    def loss_fn(output: Any, batch: plain.Batch) -> tuple[Tensor, int]:
        return output.logits.square().mean(), 1

    engine = sixfold.initialize(TASKS["llama"].build(), config={"layout": {"tensor": 2}}, loss_fn=loss_fn)
    expected = whole(input_ids=batch["input_ids"]).logits.square().mean()
    assert engine.eval_step(batch).loss == pytest.approx(float(expected), rel=1e-5)
    engine.close()


@pytest.mark.ranks(2)
def test_a_written_out_loop_counts_samples_once_and_refuses_what_does_not_fit() -> None:
    engine = engine_of(without("decoder", sequence=True))
    loss, weight = engine(**TASKS["decoder"].batch(0))
    engine.backward(loss / weight, weight=float(weight))
    assert engine.step().samples == plain.NUM_SAMPLES
    assert engine.num_samples == plain.NUM_SAMPLES
    with pytest.raises(ModelError, match=r"2 ranks .* different batches"):
        engine(**TASKS["decoder"].batch(engine.mesh.rank))
    with pytest.raises(ModelError, match=r"sequences of 7 with layout\.sequence_parallel on 2") as caught:
        engine.train_step({"tokens": _tokens(0, LENGTH)})
    assert "a multiple of 2" in caught.value.fix
    engine.close()


SENT = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}
"""How many times (ranks - 1) / ranks of what is exchanged each rank sends."""


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize(("sequence", "recompute"), [(False, "selective"), (True, None)])
def test_what_is_sent_is_what_the_formula_says(sequence: bool, recompute: str | None, num_ranks: int) -> None:
    """Sums are kept where blocks run again for backward, so none is sent twice."""
    case = without("decoder", tensor=num_ranks, sequence=sequence, recompute=recompute)
    engine = engine_of(case)
    train(engine, case, 1)  # the first update is checked, which sends more
    with noted_exchanges() as topics:
        train(engine, case, 2)
    sent = sum(
        SENT[topic.op] * topic.num_bytes * (num_ranks - 1) // num_ranks
        for topic in topics
        if topic.group.partition(":")[2].startswith("tensor axis")
    )
    tokens = 2 * 6 * LENGTH  # of two micro-batches
    pair = layer_traffic(num_ranks, tokens=tokens, width=16, item_bytes=8)
    whole = scores_traffic(num_ranks, tokens=tokens, item_bytes=8) + (2 * 2 + 1) * pair
    # Where the sequence is cut, it is so behind the embedding's sum and before the head's.
    ends = 2 * tokens * 16 * 8 * (num_ranks - 1) // num_ranks if sequence else 0
    norms = sum(
        2 * unit.numel * 8 * (num_ranks - 1) // num_ranks for unit in engine.plan.units if unit.partial
    )
    assert sent == whole + ends + norms
    engine.close()


class NormOfHeads(nn.Module):
    """A norm between two cut layers, with one weight for all heads; declares, and forgets, what it does."""

    def __init__(self, forgets: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up, self.norm, self.down = nn.Linear(4, 8), nn.LayerNorm(2), nn.Linear(8, 4)
        self.tensor_rules = {"up": "colwise", "down": "rowwise"}
        if not forgets:
            self.tensor_rules |= {"norm": "replicated_with_grad_allreduce"}

    def forward(self, x: Tensor) -> Tensor:
        heads = self.up(x).unflatten(-1, (-1, 2))
        out: Tensor = self.down(self.norm(heads).flatten(-2)).square().mean()
        return out


@pytest.mark.ranks(2)
@pytest.mark.parametrize("zero", [0, 3])
def test_an_update_from_a_partial_gradient_is_refused_by_name(zero: int) -> None:
    config = {"layout": {"tensor": 2, "zero": zero}}
    batch = {"x": torch.randn(4, 4, generator=torch.Generator().manual_seed(0))}
    engine = sixfold.initialize(NormOfHeads(forgets=False), config=config)
    engine.train_step(batch)
    engine.close()
    engine = sixfold.initialize(NormOfHeads(forgets=True), config=config)
    with pytest.raises(ModelError, match=r"2 parameter\(s\) differ .* first: norm\.weight") as caught:
        engine.train_step(batch)
    assert "replicated_with_grad_allreduce" in caught.value.fix
    engine.close()


@pytest.mark.ranks(2)
def test_ranks_that_would_cut_a_model_differently_are_told() -> None:
    model = NormOfHeads(forgets=torch.distributed.get_rank() == 1)
    with pytest.raises(MeshError, match=r"rank\(s\) 1 differ from rank 0 in: cuts of the model"):
        sixfold.initialize(model, config={"layout": {"tensor": 2}})


class Dropping(nn.Module):
    """Drops columns, of which ranks have unequally many, and what it adds to what all have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 33), nn.Linear(33, 16)
        self.columns: list[Tensor] = []
        self.dropped: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        inner = F.dropout(torch.tanh(self.up(self.norm(x))), 0.5, self.training)
        self.columns.append((inner == 0).detach())
        branch = F.dropout(self.down(inner), 0.5, self.training)
        self.dropped.append((branch == 0).detach().to(torch.int64))
        return x + branch


class DroppingBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Dropping() for _ in range(2))
        self.tensor_rules = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("sequence", [False, True])
def test_ranks_drop_alike_what_they_have_alike(sequence: bool) -> None:
    """And each its own of columns and of parts of a sequence, also where blocks run again for backward."""
    layout = {"tensor": 2, "sequence_parallel": sequence, "recompute": "full"}
    engine = sixfold.initialize(DroppingBlocks(), config={"layout": layout})
    x = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        engine.train_step({"x": x})
    blocks: Any = engine.module.blocks
    for block in blocks:
        rows = engine.mesh.gather(block.dropped[0])
        assert torch.equal(rows[0], rows[1]) != sequence
        first, again, later, _ = block.columns
        assert torch.equal(first, again)
        assert not torch.equal(first, later)
    columns = blocks[0].columns[0][..., :16].to(torch.int64)
    rows = engine.mesh.gather(columns)
    assert not torch.equal(rows[0], rows[1])
    engine.close()


class LateNorm(NormOfHeads):
    """Its gradients come later than with the first update: until then they are zero, or overflow."""

    def __init__(self, factors: tuple[float, ...]) -> None:
        super().__init__(forgets=True)
        self.factors = iter(factors)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * next(self.factors)


@pytest.mark.ranks(2)
def test_partial_gradients_that_come_later_are_refused_too() -> None:
    batch = {"x": torch.randn(4, 4, generator=torch.Generator().manual_seed(0))}
    engine = sixfold.initialize(
        LateNorm((float("inf"), 0.0, 1.0)),
        config={"layout": {"tensor": 2}, "precision": {"compute": "fp16", "initial_scale": 2.0}},
    )
    engine.train_step(batch)
    assert engine.last is not None
    assert engine.last.skipped
    engine.train_step(batch)
    with pytest.raises(ModelError, match=r"2 parameter\(s\) differ .* first: norm\.weight"):
        engine.train_step(batch)
    engine.close()


@pytest.mark.matrix  # each block is cut in many graphs, which takes a while
@pytest.mark.ranks(2, timeout_s=200)
def test_compiled_blocks() -> None:
    case = without("decoder")
    expected = reference("decoder", torch.float64, 3, None)
    engine = engine_of(case | {"compile": "aot_eager"})
    losses, norms = train(engine, case, 3)
    assert losses == pytest.approx(expected.losses, rel=1e-12)
    assert norms == pytest.approx(expected.norms, rel=1e-10)
    engine.close()
