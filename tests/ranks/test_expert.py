"""Experts dealt out to ranks: the numbers of one process, however tokens fall and batches are cut."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sixfold
from sixfold.base.errors import ModelError, PlanError
from sixfold.engine import Engine
from sixfold.models.decoder import Decoder, DecoderConfig
from sixfold.models.moe import Experts, ExpertsConfig, Router
from sixfold.plan import dispatch_traffic, persistent_memory
from sixfold.testing import Pool
from sixfold.testing.exchanges import noted_exchanges
from tests.covering import Case, covering, label, with_drawn

SAMPLES, LENGTH, VOCABULARY, STEPS = 12, 8, 19, 5
PLAIN = DecoderConfig.derive(
    vocab_size=VOCABULARY, context_length=LENGTH, width=16, num_layers=2, num_heads=2, ffn_width=8
)
FORMS = {
    "loss": ExpertsConfig(4, num_shared=1, balance="loss", balance_rate=0.5, z_weight=0.1),
    "bias": ExpertsConfig(4, num_choices=1, balance="bias", balance_rate=0.2),
    "capacity": ExpertsConfig(8, num_choices=3, capacity_factor=0.8),
}


class Forced(Router):
    """All tokens go to one expert, the next one after every update, so the others get none on any rank."""

    num_updates = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        before = self.tally.clone()
        experts, weights = super().forward(x)
        turn, num_experts = self.num_updates % self.config.num_experts, self.config.num_experts
        if not torch.equal(self.tally, before):
            self.tally[:num_experts] = before[:num_experts]
            self.tally[turn] += len(experts)
        return torch.full_like(experts[:, :1], turn), weights[:, :1]

    def end_update(self, tally: Tensor) -> None:
        super().end_update(tally)
        assert self.last is None or max(self.last.load) == 1.0
        self.num_updates += 1


def build(form: str) -> Decoder:
    torch.manual_seed(0)
    forced = form == "forced"
    model = Decoder(replace(PLAIN, experts=FORMS["bias" if forced else form])).double()
    if forced:
        for part in model.modules():
            if isinstance(part, Router):
                part.__class__ = Forced
    return model


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, VOCABULARY, (SAMPLES, LENGTH + 1), generator=generator)


@cache
def reference(form: str) -> tuple[dict[str, Tensor], list[float], list[float], list[Any]]:
    """The same in plain torch: parameters, losses and gradient norms, and how tokens were shared out."""
    model = build(form)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses, norms = [], []
    routers = [part for part in model.modules() if isinstance(part, Router)]
    for step in range(STEPS):
        optimizer.zero_grad()
        loss, weight = model(batch(step))
        (loss / weight).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        losses.append(float(loss.detach() / weight))
        optimizer.step()
        for router in routers:
            router.end_update(router.tally)
    return model.state_dict(), losses, norms, [router.last for router in routers]


FACTORS: dict[str, tuple[Any, ...]] = {
    "form": ("loss", "bias", "capacity", "forced"),
    "ranks": (2, 4),
    "expert": (2, 4),
    "zero": (0, 1, 2, 3),
    "groups": (1, 2),
    "pipe": (1, 2),
    "tensor": (None, "whole", "sequence"),
    "context": (1, 2),
    "micro": (None, 3),
    "shares": ("even", "uneven", "empty"),
    "recompute": (None, "full", "selective"),
    "transport": ("host", "network"),
}

DRAWN = ("groups", "micro", "shares", "recompute", "transport")
"""Not multiplied out in the full product, but drawn for each of its cases."""


def data_ranks(case: Case) -> int:
    return case["ranks"] // case["pipe"] // case["context"] // (1 if case["tensor"] is None else 2)


def legal(case: Case) -> bool:
    data, replicas = data_ranks(case), data_ranks(case) * case["context"]
    shard = replicas // case["groups"]
    fits = data and shard and replicas % case["expert"] == 0 and (case["groups"] == 1 or case["zero"] > 0)
    divides = shard % case["expert"] == 0 or case["expert"] % max(1, shard) == 0
    is_whole = case["form"] != "capacity" or (case["tensor"] != "sequence" and case["context"] == 1)
    return fits and divides and is_whole and (case["shares"] == "even" or data > 1)


CASES = covering(FACTORS, legal)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_follows_one_process(case: Case, rank_pool: Pool) -> None:
    rank_pool.run(follow, case, reference(case["form"]), ranks=case["ranks"], timeout_s=60)


EIGHT = [
    {"tensor": "whole", "context": 2, "expert": 2, "zero": 3},
    {"tensor": "sequence", "context": 2, "expert": 4, "zero": 1, "micro": 2},
    {"pipe": 2, "tensor": "whole", "expert": 2, "zero": 2, "micro": 2},
    {"pipe": 2, "context": 2, "expert": 4, "zero": 3, "micro": 2, "recompute": "full"},
]


@pytest.mark.matrix
@pytest.mark.parametrize("changes", EIGHT, ids=str)
@pytest.mark.parametrize("form", ["loss", "bias", "forced"])
def test_follows_one_process_on_eight_ranks(form: str, changes: dict[str, Any], rank_pool: Pool) -> None:
    case = {name: values[0] for name, values in FACTORS.items()} | {"form": form, "ranks": 8} | changes
    assert legal(case)
    rank_pool.run(follow, case, reference(form), ranks=8, timeout_s=120)


@pytest.mark.matrix
@pytest.mark.parametrize("ranks", FACTORS["ranks"])
@pytest.mark.parametrize("form", FACTORS["form"])
def test_follows_one_process_in_every_combination(form: str, ranks: int, rank_pool: Pool) -> None:
    for case in with_drawn({**FACTORS, "form": (form,), "ranks": (ranks,)}, DRAWN, legal):
        rank_pool.run(follow, case, reference(form), ranks=ranks, timeout_s=60)


@pytest.mark.matrix  # compiling takes long
@pytest.mark.parametrize("recompute", [None, "full"])
@pytest.mark.parametrize(("ranks", "expert"), [(1, 1), (2, 2)])
def test_compiled_blocks_send_tokens(ranks: int, expert: int, recompute: str | None, rank_pool: Pool) -> None:
    case = {name: values[0] for name, values in FACTORS.items()}
    case |= {"ranks": ranks, "expert": expert, "compile": "aot_eager", "recompute": recompute}
    rank_pool.run(follow, case, reference("loss"), ranks=ranks, timeout_s=120)


def start(case: Case, model: nn.Module) -> Engine:
    layout = {name: case[name] for name in ("expert", "zero", "pipe", "context", "recompute", "transport")}
    if "compile" in case:
        layout["compile"] = case["compile"]
    if case["groups"] > 1:
        layout["shard"] = data_ranks(case) * case["context"] // case["groups"]
    if case["tensor"] is not None:
        layout |= {"tensor": 2, "sequence_parallel": case["tensor"] == "sequence"}
    config = {
        "batch": {"micro": case["micro"]},
        "layout": layout,
        "optimizer": {"name": "adamw", "lr": 0.01, "clip_norm": 0.5},
    }
    return sixfold.initialize(model, config=config)


def share(engine: Engine, case: Case, step: int) -> dict[str, Tensor]:
    """This rank's samples."""
    ranks, tokens = engine.data_ranks, batch(step)
    sizes = [SAMPLES // ranks] * ranks
    if case["shares"] == "uneven":
        sizes = [SAMPLES - sum(range(1, ranks)), *range(1, ranks)]
    elif case["shares"] == "empty":
        sizes = [SAMPLES, *[0] * (ranks - 1)]
    return {"tokens": tokens.split(sizes)[(engine.data_rank + step) % ranks]}


def follow(case: Case, expected: tuple[dict[str, Tensor], list[float], list[float], list[Any]]) -> None:
    parameters, losses, norms, routing = expected
    engine = start(case, build(case["form"]))
    for step in range(STEPS):
        loss = engine.train_step(share(engine, case, step))
        assert loss == pytest.approx(losses[step], rel=1e-10)
        assert engine.last is not None
        assert engine.last.grad_norm == pytest.approx(norms[step], rel=1e-10)
    here = {part.down_proj.shape[0] for part in engine.module.modules() if isinstance(part, Experts)}
    num_experts = engine.module.config.experts.num_experts
    assert case["zero"] == 3 or min(here) == num_experts // case["expert"]
    widths = {part.down_proj.shape[2] for part in engine.module.modules() if isinstance(part, Experts)}
    assert case["zero"] == 3 or min(widths) == PLAIN.ffn_width // (1 if case["tensor"] is None else 2)
    assert engine.memory() == persistent_memory(engine.plan, 2)
    whole = engine.full_state_dict()
    # Compiled blocks that recompute tally twice, which changes no fraction.
    kept = [name for name in parameters if "compile" not in case or not name.endswith(("load", "bias_steps"))]
    far = {name: (whole[name] - parameters[name]).abs().max().item() for name in kept}
    assert max(far.values()) < 1e-10, far
    known = engine.routing()
    assert case["pipe"] > 1 or list(known.values()) == routing
    assert all(each in routing for each in known.values())
    engine.close()


class InTurn(Router):
    """Tokens go to all experts in turn."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        experts, weights = super().forward(x)
        return torch.arange(experts.numel()).view(experts.shape) % self.config.num_experts, weights


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("recompute", [None, "full"])
def test_the_plan_says_what_goes_to_experts(recompute: str | None, num_ranks: int) -> None:
    case = {name: values[0] for name, values in FACTORS.items()}
    case |= {"expert": num_ranks, "ranks": num_ranks, "recompute": recompute}
    model = build("loss")
    for part in model.modules():
        if isinstance(part, Router):
            part.__class__ = InTurn
    engine = start(case, model)
    with noted_exchanges() as topics:
        engine.train_step({"tokens": batch(0)[: SAMPLES // 3]})
    sent = [topic.num_bytes for topic in topics if topic.op == "all-to-all"]
    layer = dispatch_traffic(
        engine.plan.geometry,
        choices=SAMPLES // 3 * LENGTH * 2,
        num_experts=4,
        width=16,
        dtype="fp64",
        num_forwards=1 if recompute is None else 2,
    )
    assert sum(sent) == 2 * layer > 0
    engine.close()


@pytest.mark.ranks(2)
def test_what_cannot_be_dealt_out_is_refused() -> None:
    config = {"layout": {"expert": 2}}
    with pytest.raises(ModelError, match="without stacked experts"):
        sixfold.initialize(Decoder(PLAIN), config=config)
    odd = Decoder(replace(PLAIN, experts=ExpertsConfig(3)))
    with pytest.raises(PlanError, match=r"(?s)3 experts in model\.layers\.0.*one of 1, 3"):
        sixfold.initialize(odd, config=config)
    engine = sixfold.initialize(build("loss"), config={**config, "batch": {"micro": 2}})
    with pytest.raises(ModelError, match="no tensors in the batch of replica 0"):
        engine.train_step({"tokens": batch(0)} if engine.data_rank else None)


@pytest.mark.ranks(4)
def test_a_rank_may_begin_without_samples_in_a_bare_tensor() -> None:
    """It serves those that try whether sequences can be cut."""
    layout = {"context": 2, "expert": 4}
    engine = sixfold.initialize(build("loss"), config={"layout": layout, "optimizer": {"lr": 0.01}})
    _, losses, _, _ = reference("loss")
    own = batch(0) if engine.data_rank else batch(0)[:0]
    assert engine.train_step(own) == pytest.approx(losses[0], rel=1e-10)
    engine.close()


@cache
def hugging_face(kind: str) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_experts_per_tok": 2,
    }
    if kind == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, head_dim=8))
    else:
        own = {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, **own, decoder_sparse_step=1))
    model.set_experts_implementation("eager")  # the grouped product knows no fp64
    return model.double()


def idle() -> Any:
    """Half of the experts never get a token."""
    model = deepcopy(hugging_face("mixtral"))

    def first_two(gate: nn.Module, given: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
        scores, weights, experts = output
        return scores, weights, torch.arange(2).expand(experts.shape)

    for name, part in model.named_modules():
        if name.endswith("gate"):
            part.register_forward_hook(first_two)
    return model


@pytest.mark.ranks(2)
@pytest.mark.parametrize("is_frozen", [False, True])
def test_experts_without_tokens_go_backward_with_the_others(is_frozen: bool) -> None:
    """Also where tokens need no gradient, so that only weights of experts say that there is a backward."""
    model = idle()
    if is_frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.0.mlp.experts" in name)
    follow_hugging_face(model, 0, (7, 5))


def labelled(step: int) -> dict[str, Tensor]:
    labels = batch(step).clone()
    labels[step % SAMPLES :, -2:] = -100
    return {"input_ids": batch(step), "labels": labels}


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize(("ranks", "zero", "sizes"), [(2, 0, (7, 5)), (4, 3, (3, 6, 3, 0)), (2, 2, (12, 0))])
def test_hugging_face_models_follow_one_process(
    kind: str, ranks: int, zero: int, sizes: tuple[int, ...], rank_pool: Pool
) -> None:
    rank_pool.run(follow_hugging_face, hugging_face(kind), zero, sizes, ranks=ranks, timeout_s=60)


def follow_hugging_face(model: Any, zero: int, sizes: tuple[int, ...]) -> None:
    plain = deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    config = {
        "layout": {"expert": 2, "zero": zero},
        "batch": {"micro": 4},
        "optimizer": {"name": "sgd", "lr": 0.5},
    }
    engine = sixfold.initialize(deepcopy(model), config=config)
    for step in range(STEPS):
        whole = labelled(step)
        optimizer.zero_grad()
        expected = plain(**whole, num_items_in_batch=(whole["labels"][:, 1:] != -100).sum()).loss
        expected.backward()
        optimizer.step()
        own = {name: field.split(sizes)[engine.data_rank] for name, field in whole.items()}
        assert engine.train_step(own) == pytest.approx(float(expected.detach()), rel=3e-6)
    found = engine.full_state_dict()
    for name, number in plain.state_dict().items():
        assert (found[name] - number).abs().max().item() < 1e-5, name
    engine.close()


BALANCED: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {"zero": 3, "recompute": "full"}),
    (2, {"expert": 2}),
    (4, {"expert": 2, "tensor": 2, "zero": 1}),
    (2, {"tensor": 2, "sequence_parallel": True}),
]


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_the_balancing_loss_of_a_model_depends_on_no_cut(kind: str, rank_pool: Pool, tmp_path: Path) -> None:
    """Its own form, with the load of the update before; padding counts for nothing; it survives a save."""
    for ranks, layout in BALANCED:
        rank_pool.run(follow_balanced, kind, layout, tmp_path, ranks=ranks, timeout_s=60)


def padded(step: int) -> dict[str, Tensor]:
    fields = {name: field[:, :LENGTH] for name, field in labelled(step).items()}
    mask = torch.ones_like(fields["input_ids"])
    mask[: SAMPLES // 2, -1:] = 0
    return fields | {"attention_mask": mask, "labels": fields["labels"].masked_fill(mask == 0, -100)}


def balanced_loss(model: Any, step: int, load: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss without its balance, the balance, and the load of this batch: choices of a token."""
    fields = padded(step)
    items = (fields["labels"][:, 1:] != -100).sum()
    output = model(**fields, num_items_in_batch=items, output_router_logits=True)
    own = model(**fields, num_items_in_batch=items, output_router_logits=False).loss
    keep = fields["attention_mask"].flatten() > 0
    scores = torch.cat([each.view(-1, 4)[keep] for each in output.router_logits])
    shares = scores.softmax(-1)
    chosen = torch.nn.functional.one_hot(shares.topk(2, -1).indices, 4).sum(1).to(shares)
    now = chosen.mean(0)
    torch.testing.assert_close(
        output.aux_loss.to(shares), 4 * (now * shares.mean(0)).sum(), rtol=1e-5, atol=0
    )
    return own, 4 * (load * shares.mean(0)).sum(), now


def follow_balanced(kind: str, layout: dict[str, Any], folder: Path) -> None:
    model = hugging_face(kind)
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.3
    plain = deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    config = {"layout": layout, "batch": {"micro": 4}, "optimizer": {"name": "sgd", "lr": 0.5}}
    engine, load = sixfold.initialize(deepcopy(model), config=config), torch.zeros(4)
    stacked = [p for name, p in engine.module.named_parameters() if name.endswith("experts.down_proj")]
    assert {each.shape[-1] for each in stacked} == {8 // layout.get("tensor", 1)}
    with pytest.raises(ModelError, match="written-out"):
        engine(**labelled(0))
    for step in range(STEPS):
        optimizer.zero_grad()
        own, balance, load = balanced_loss(plain, step, load)
        (own + 0.3 * balance).backward()
        optimizer.step()
        if step == 2:
            engine.save(folder / "saved")
            engine.close()
            engine = sixfold.initialize(deepcopy(model), config=config)
            engine.load(folder / "saved")
        mine = {
            name: field.chunk(engine.data_ranks)[engine.data_rank] for name, field in padded(step).items()
        }
        if step == 1:
            engine.rehearse({name: field.flip(1) for name, field in mine.items()})
        assert engine.train_step(mine) == pytest.approx(float(own.detach()), rel=3e-6)
    found = engine.full_state_dict()
    for name, number in plain.state_dict().items():
        assert (found[name] - number).abs().max().item() < 1e-5, name
    (known,) = engine.routing().values()
    assert known.load == pytest.approx([float(each) / 2 for each in load])
    engine.close()
