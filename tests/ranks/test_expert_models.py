"""Experts of Hugging Face models dealt out to ranks: the numbers of one process, their balancing loss too."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sixfold
from sixfold.base.errors import ModelError
from sixfold.testing import Pool
from tests.ranks.test_expert import LENGTH, SAMPLES, STEPS, VOCABULARY, batch


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
    follow_hugging_face(model, 0, (7, 5), descended(model))


def labelled(step: int) -> dict[str, Tensor]:
    labels = batch(step).clone()
    labels[step % SAMPLES :, -2:] = -100
    return {"input_ids": batch(step), "labels": labels}


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize(("ranks", "zero", "sizes"), [(2, 0, (7, 5)), (4, 3, (3, 6, 3, 0)), (2, 2, (12, 0))])
def test_hugging_face_models_follow_one_process(
    kind: str, ranks: int, zero: int, sizes: tuple[int, ...], rank_pool: Pool
) -> None:
    model = hugging_face(kind)
    rank_pool.run(follow_hugging_face, model, zero, sizes, hugging_face_descended(kind), ranks=ranks)


Descended = tuple[list[float], dict[str, Tensor]]


def descended(model: nn.Module) -> Descended:
    """Losses and parameters of plain torch."""
    model = deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(STEPS):
        fields = labelled(step)
        optimizer.zero_grad()
        loss = model(**fields, num_items_in_batch=(fields["labels"][:, 1:] != -100).sum()).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, model.state_dict()


@cache
def hugging_face_descended(kind: str) -> Descended:
    return descended(hugging_face(kind))


def follow_hugging_face(model: Any, zero: int, sizes: tuple[int, ...], expected: Descended) -> None:
    losses, parameters = expected
    config = {
        "layout": {"expert": 2, "zero": zero},
        "batch": {"micro": 4},
        "optimizer": {"name": "sgd", "lr": 0.5},
    }
    engine = sixfold.initialize(deepcopy(model), config=config)
    for step in range(STEPS):
        own = {name: field.split(sizes)[engine.data_rank] for name, field in labelled(step).items()}
        assert engine.train_step(own) == pytest.approx(losses[step], rel=3e-6)
    found = engine.full_state_dict()
    for name, number in parameters.items():
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
    model = deepcopy(hugging_face(kind))
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.3
    expected = balanced(model)
    for ranks, layout in BALANCED:
        rank_pool.run(follow_balanced, model, layout, expected, tmp_path, ranks=ranks)


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


def balanced(model: Any) -> tuple[Descended, Tensor]:
    """Losses without the balance, and parameters of plain torch; the load of its last batch."""
    model, load = deepcopy(model), torch.zeros(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        own, balance, load = balanced_loss(model, step, load)
        (own + 0.3 * balance).backward()
        optimizer.step()
        losses.append(float(own.detach()))
    return (losses, model.state_dict()), load


def follow_balanced(
    model: Any, layout: dict[str, Any], expected: tuple[Descended, Tensor], folder: Path
) -> None:
    (losses, parameters), load = expected
    config = {"layout": layout, "batch": {"micro": 4}, "optimizer": {"name": "sgd", "lr": 0.5}}
    engine = sixfold.initialize(deepcopy(model), config=config)
    stacked = [p for name, p in engine.module.named_parameters() if name.endswith("experts.down_proj")]
    assert {each.shape[-1] for each in stacked} == {8 // layout.get("tensor", 1)}
    with pytest.raises(ModelError, match="written-out"):
        engine(**labelled(0))
    for step in range(STEPS):
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
        assert engine.train_step(mine) == pytest.approx(losses[step], rel=3e-6)
    found = engine.full_state_dict()
    for name, number in parameters.items():
        assert (found[name] - number).abs().max().item() < 1e-5, name
    (known,) = engine.routing().values()
    assert known.load == pytest.approx([float(each) / 2 for each in load])
    engine.close()
