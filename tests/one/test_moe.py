"""Experts: products of groups, choice, capacity, balance; what no cut of a batch may change."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import sixfold
from sixfold.base.errors import ConfigError, ModelError
from sixfold.config import load
from sixfold.mesh import Pending
from sixfold.mesh.scratch import Scratch
from sixfold.models import grouped, moe
from sixfold.models.choices import Order
from sixfold.models.decoder import Decoder, DecoderConfig, num_flops
from sixfold.models.grouped import fed_forward, is_groupable
from sixfold.models.moe import Experts, ExpertsConfig, MixtureOfExperts, Router, within_capacity
from sixfold.parallel import change_forwards
from sixfold.parallel.expert import axis as expert_axis


def decoder(seed: int = 0, **changes: object) -> Decoder:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 31,
        "context_length": 8,
        "width": 16,
        "num_layers": 2,
        "num_heads": 2,
        "ffn_width": 8,
    }
    experts = ExpertsConfig(**({"num_experts": 4} | changes))
    return Decoder(DecoderConfig.derive(**sizes, experts=experts)).double()


def tokens(batch: int, seed: int = 1) -> Tensor:
    return torch.randint(31, (batch, 9), generator=torch.Generator().manual_seed(seed))


def routers(model: torch.nn.Module) -> list[Router]:
    return [part for part in model.modules() if isinstance(part, Router)]


def test_counts_travel_from_where_the_tokens_are() -> None:
    """A backend for GPUs takes no tensors of the host."""

    class Told(Exception):
        pass

    class Group:
        num_ranks = 2

        def all_to_all(self, sent: list[Tensor], arriving: list[Tensor]) -> None:
            raise Told({each.device.type for each in (*sent, *arriving)})

    tokens, choices = torch.zeros(3, 4), torch.zeros(3, 1, dtype=torch.long)
    layer = Experts(4, 4, 2)
    layer.down_proj.data = layer.gate_up_proj.data = torch.zeros(1, 8, 4)
    forward = expert_axis._dealing(Experts.forward, Group(), 2)  # type: ignore[arg-type]
    with pytest.raises(Told, match="meta"):
        forward(layer, tokens.to("meta"), choices, choices)


def test_shared_experts_run_while_tokens_are_on_their_way() -> None:
    """There, and their gradients on the way back."""
    events: list[str] = []

    class Coming(Pending):
        def wait(self) -> None:
            events.append("wait")

    class Group:
        """Two ranks, of which the other one neither has tokens nor gets any."""

        num_ranks, place, scratch = 2, 0, Scratch(torch.device("cpu"))

        def all_to_all(self, sent: Sequence[Tensor], arriving: Sequence[Tensor]) -> Pending:
            arriving[0].copy_(sent[0])
            arriving[1].zero_()
            return self.deal(sent, ())

        def deal(self, sent: Sequence[Tensor], arriving: Sequence[Sequence[Tensor]]) -> Pending:
            events.append("start")
            return Coming()

    def beside() -> None:
        events.append("beside")
        made.append(2 * rows)
        made[0].register_hook(lambda gradient: events.append("beside"))

    made: list[Tensor] = []

    layer, rows = Experts(4, 4, 1), torch.ones(3, 4, requires_grad=True)
    forward = expert_axis._dealing(Experts.forward, Group(), 2)  # type: ignore[arg-type]
    out = forward(layer, rows, torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1), beside)
    exchange, hidden = ["start", "wait"], ["start", "beside", "wait"]
    assert events == exchange + hidden + exchange  # numbers of tokens; there; back
    events.clear()
    (out + made[0]).sum().backward()
    assert events == exchange + hidden


@pytest.mark.parametrize("layout", [{"context": 2}, {"tensor": 2, "sequence_parallel": True}], ids=str)
def test_a_limited_capacity_wants_whole_samples(layout: dict[str, object]) -> None:
    """Said of the configuration, and of a model that brings its experts along."""
    option = [*layout][-1]
    with pytest.raises(ModelError, match=rf"layout\.{option} = .*limited capacity"):
        sixfold.initialize(decoder(capacity_factor=1.0), config={"layout": layout})
    with pytest.raises(ConfigError) as refused:
        load(values={"layout": layout, "model": {"num_experts": 4, "expert_capacity": 1.0}})
    assert f"layout.{option}" in refused.value.fix


def one_by_one(rows: Tensor, gate_up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
    """As autograd has it."""
    made = []
    for expert, piece in enumerate(rows.split(counts)):
        gate, up = (piece @ gate_up[expert].T).chunk(2, -1)
        made.append((F.silu(gate) * up) @ down[expert].T)
    return torch.cat(made)


def weights_and_rows(num_rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = (num_rows, 16), (4, 16, 16), (4, 16, 8)
    return tuple(torch.randn(shape).div(2).to(dtype).requires_grad_() for shape in shapes)


@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [0, 0, 10, 0], [0, 0, 0, 0]])
def test_experts_feed_their_rows_forward(counts: list[int]) -> None:
    given = weights_and_rows(sum(counts), torch.float64)
    found, expected = fed_forward(*given, counts), one_by_one(*given, counts)
    gradient = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad(each, given, gradient) for each in (found, expected))
    torch.testing.assert_close((found, *ours), (expected, *theirs), rtol=1e-13, atol=1e-14)
    for number, frozen in enumerate(given):
        frozen.requires_grad_(False)
        others = [each for each in given if each.requires_grad]
        left = torch.autograd.grad(fed_forward(*given, counts), others, gradient)
        expected_of_others = [each for place, each in enumerate(ours) if place != number]
        assert all(torch.equal(*pair) for pair in zip(left, expected_of_others, strict=True))
        frozen.requires_grad_()


@pytest.mark.parametrize("dtype", grouped.GROUPED_DTYPES)
def test_the_product_of_torch_gives_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    given, results = weights_and_rows(24, dtype), []
    for is_chosen in (False, True):
        monkeypatch.setattr(grouped, "is_groupable", lambda rows, weight, chosen=is_chosen: chosen)
        made = fed_forward(*given, [7, 0, 16, 1])
        results.append((made, *torch.autograd.grad(made, given, torch.ones(24, 16).to(dtype) / 8)))
    bounds = {"rtol": 2e-2, "atol": 2e-2} if dtype != torch.float32 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(results[0], results[1], **bounds)
    monkeypatch.undo()
    rows, weight, _ = given
    assert not is_groupable(rows, weight), "on a CPU it is no faster"
    assert not is_groupable(rows.double().to("meta"), weight.double().to("meta"))
    assert is_groupable(rows.to("meta"), weight.to("meta"))


def test_gating_is_that_of_torch() -> None:
    packed = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    gate, up = packed.chunk(2, -1)
    expected, found = F.silu(gate) * up, grouped.gated(packed)
    assert torch.equal(found, expected)
    weight = torch.randn(5, 4, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(each, packed, weight)[0] for each in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


def test_rows_come_back_to_their_tokens() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    experts = torch.tensor([[1, 0], [4, 4], [3, 4], [1, 3], [0, 1], [3, 0]])
    order, counted = Order.by_expert(experts, 4), experts < 4
    assert order.counts == [3, 3, 0, 3]
    assert torch.equal(order.take(x)[:3], x[[0, 4, 5]])
    found = order.put_back(order.take(x).square(), weights)
    expected = x.square() * (weights * counted).sum(1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    gradient = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad(each, (x, weights), gradient) for each in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)
    nobody = Order.by_expert(torch.full((2, 2), 4), 4)
    assert torch.equal(
        nobody.put_back(nobody.take(x[:2]), weights[:2]), torch.zeros(2, 3, dtype=torch.float64)
    )


def test_a_layer_is_the_weighted_sum_of_its_experts() -> None:
    torch.manual_seed(0)
    layer = MixtureOfExperts(16, 8, ExpertsConfig(5, num_choices=3, num_shared=2)).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    expected = torch.zeros_like(x)
    scores = (x @ layer.gate.weight.T).softmax(-1)
    top = scores.topk(3, -1)
    for place in [(b, t) for b in range(2) for t in range(7)]:
        for weight, expert in zip(top.values[place], top.indices[place], strict=True):
            gate, up = (layer.experts.gate_up_proj[expert] @ x[place]).chunk(2)
            made = layer.experts.down_proj[expert] @ (F.silu(gate) * up)
            expected[place] += weight / top.values[place].sum() * made
    assert layer.shared_experts is not None
    torch.testing.assert_close(layer(x), expected + layer.shared_experts(x), rtol=1e-12, atol=1e-12)


def test_capacity_counts_within_a_sample_and_earlier_tokens_first() -> None:
    config = ExpertsConfig(3, num_choices=1, capacity_factor=1.0)
    experts = torch.tensor([0, 0, 0, 2, 1, 0, 1, 2, 2, 2, 2, 2])[:, None]
    kept = within_capacity(experts, 2, config).flatten()
    assert kept.tolist() == [True, True, False, True, True, False, True, True, True, False, False, False]
    x = torch.randn(4, 6, 16, dtype=torch.float64)
    torch.manual_seed(0)
    layer = MixtureOfExperts(16, 8, ExpertsConfig(3, capacity_factor=0.5)).double()
    whole = layer(x)
    torch.testing.assert_close(whole[1:2], layer(x[1:2]), rtol=1e-13, atol=1e-13)
    changed = x.clone()
    changed[:, 4] += 1
    torch.testing.assert_close(layer(changed)[:, :4], whole[:, :4], rtol=1e-13, atol=1e-13)
    layer.gate.end_update(layer.gate.tally)
    assert layer.gate.last is not None
    assert 0 < layer.gate.last.dropped < 1


def test_penalties_add_their_gradient_to_that_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the loss is scaled, and where blocks are recomputed."""
    model = decoder(balance="loss", balance_rate=0.3, z_weight=0.2)
    for router in routers(model):
        router.load.copy_(torch.tensor([5, 1, 0, 2]))
    parameters = list(model.parameters())
    ours = [torch.autograd.grad(model(tokens(3))[0] * 0.7, parameters)]
    forget = change_forwards(model, ["model.layers.0", "model.layers.1"], "full", None)
    ours.append(torch.autograd.grad(model(tokens(3))[0] * 0.7, parameters))
    forget()

    given: list[Tensor] = []
    monkeypatch.setattr(
        moe, "with_penalty", lambda weights, penalties, router: given.append(penalties.sum()) or weights
    )
    written_out = model(tokens(3))[0] + sum(given)
    expected = torch.autograd.grad(written_out * 0.7, parameters)
    assert len(given) == 2
    for gradients in ours:
        torch.testing.assert_close(gradients, expected, rtol=1e-11, atol=1e-13)


def test_penalties_are_sums_over_tokens_of_the_load_before(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []
    monkeypatch.setattr(
        moe, "with_penalty", lambda weights, penalties, router: given.append(penalties.sum()) or weights
    )
    torch.manual_seed(0)
    router = Router(16, ExpertsConfig(4, balance="loss", balance_rate=0.3, z_weight=0.2)).double()
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    router(x)
    router.end_update(torch.tensor([5, 1, 0, 2, 0, 4, 0, 0]))
    router(x)
    scores = x.flatten(0, 1) @ router.weight.T
    z = 0.2 * sum(row.exp().sum().log() ** 2 for row in scores)
    uneven = 0.3 * 4 * sum(row.softmax(0) @ torch.tensor([5, 1, 0, 2]).double() / 8 for row in scores)
    torch.testing.assert_close(given, [z, z + uneven])
    router.end_update(router.tally)
    assert router.last is not None
    assert router.last.penalty == pytest.approx(float((z + uneven).detach()) / 6, abs=1e-6)


def test_a_bias_moves_towards_equal_shares() -> None:
    model = decoder(balance="bias", balance_rate=0.05)
    imbalance = []
    for _ in range(60):
        model(tokens(8))
        for router in routers(model):
            router.end_update(router.tally)
        imbalance.append(max(router.last.imbalance for router in routers(model) if router.last))
    assert imbalance[-1] < 1.3 < imbalance[0]
    assert all(int(router.tally.sum()) == 0 for router in routers(model))
    assert all(len(set(router.bias_steps.tolist())) > 1 for router in routers(model))


def test_a_cut_batch_tallies_and_learns_the_same() -> None:
    settings = {
        "balance": "loss",
        "balance_rate": 0.3,
        "z_weight": 0.2,
        "capacity_factor": 1.0,
        "num_shared": 1,
    }
    found = []
    for sizes in ([6], [2, 1, 3]):
        model = decoder(**settings)
        for seed in (1, 2):
            model.zero_grad()
            for part in tokens(6, seed).split(sizes):
                loss, _ = model(part)
                (loss / 48).backward()
            for router in routers(model):
                router.end_update(router.tally)
        found.append(([p.grad for p in model.parameters()], [router.last for router in routers(model)]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-11, atol=1e-13)
    assert found[0][1] == found[1][1]


def test_nothing_is_tallied_outside_of_training() -> None:
    model = decoder()
    with torch.no_grad():
        model(tokens(2))
    model.eval()
    model(tokens(2))
    assert all(int(router.tally.sum()) == 0 for router in routers(model))


def test_only_updates_that_change_weights_move_the_balance() -> None:
    """Neither one that fp16 skips nor one that ends in an error."""
    config = {"precision": {"compute": "fp16", "initial_scale": 2.0**40}, "optimizer": {"lr": 0.01}}
    engine = sixfold.initialize(decoder(balance="bias").float(), config=config)
    engine.train_step(tokens(4))
    assert engine.num_skipped == 1
    bad = tokens(4)
    bad[:, -1] = 31  # a target alone, at which it ends when routers have chosen
    with pytest.raises(IndexError):
        engine.train_step(bad)
    found = routers(engine.module)
    assert [int(each.bias_steps.abs().sum() + each.tally.sum()) for each in found] == [0, 0]
    while engine.num_skipped == engine.num_steps:
        engine.train_step(tokens(4))
    assert all(int(each.bias_steps.abs().sum()) > 0 for each in found)
    assert all(sum(each.load.tolist()) == 4 * 8 * 2 for each in found)
    engine.close()


def test_operations_are_counted() -> None:
    model = decoder(num_shared=1).float()
    with FlopCounterMode(display=False) as counter:
        loss, _ = model(tokens(4))
        loss.backward()
    config = model.config
    attention = 6 * 4 * 8 * config.num_layers * 2 * 8 * config.width
    counted = counter.get_total_flops()
    assert abs(counted - num_flops(config, 4, 8)) <= attention


def test_experts_start_like_plain_feed_forward_parts() -> None:
    torch.manual_seed(0)
    experts = Experts(64, 128, 4)
    assert abs(float(experts.gate_up_proj.detach().std()) * 128**0.5 - 1) < 0.02
    assert abs(float(experts.down_proj.detach().std()) * 256**0.5 - 1) < 0.02
    with torch.device("meta"):
        meta = MixtureOfExperts(64, 128, ExpertsConfig(4))
    made = meta.to_empty(device="cpu")
    for part in made.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    assert int(made.gate.load.sum() + made.gate.bias_steps.sum() + made.gate.tally.sum()) == 0


@pytest.mark.parametrize("choices", [0, 5])
def test_more_choices_than_experts_are_refused(choices: int) -> None:
    with pytest.raises(ValueError, match="num_choices"):
        ExpertsConfig(4, num_choices=choices)
