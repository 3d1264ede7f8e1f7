"""The engine's two loops and what users do around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sixfold
from sixfold.base.errors import ConfigError, ModelError, StateError
from sixfold.engine import Engine
from sixfold.plan import PRESETS, cut_units
from tests.ranks import plain, rows

STEPS = 4


def start(name: str, dtype: torch.dtype = torch.float64, **config: Any) -> Engine:
    task = plain.TASKS[name]
    config = {"optimizer": {"lr": 1e-2}, "batch": {"micro": 2}, **config}
    return sixfold.initialize(task.build().to(dtype), config=config, loss_fn=task.loss_fn)


def share(engine: Engine, name: str, step: int, dtype: torch.dtype = torch.float64) -> plain.Batch:
    places = plain.cuts(plain.NUM_SAMPLES, engine.data_ranks, "even", step)[engine.data_rank]
    return plain.rows(plain.cast(plain.TASKS[name].batch(step), dtype), places)


def weights(engine: Engine) -> dict[str, Tensor]:
    return engine.full_state_dict()


def check_equal(one: dict[str, Tensor], other: dict[str, Tensor], bound: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert float((tensor.double() - other[name].double()).abs().max()) <= bound, name


def straight(name: str, loop: Callable[[Engine, int], object], **config: Any) -> dict[str, Tensor]:
    """The weights after a few steps of `loop`."""
    engine = start(name, **config)
    for step in range(STEPS):
        loop(engine, step)
    engine.close()
    return weights(engine)


def by_train_step(name: str, engine: Engine, step: int) -> None:
    engine.train_step(share(engine, name, step))


def parts(engine: Engine, name: str, step: int) -> Iterator[plain.Batch]:
    """Micro-batches of two samples, as `start` configures them."""
    whole = share(engine, name, step)
    size = len(next(iter(whole.values())))
    for first in range(0, size, 2):
        yield plain.rows(whole, range(first, min(first + 2, size)))


def by_hand(name: str, engine: Engine, step: int) -> None:
    task = plain.TASKS[name]
    for part in parts(engine, name, step):
        engine.backward(plain.written_out_loss(engine, task, part), weight=task.weight(part))
    engine.step()


@pytest.mark.ranks(1, 2)
def test_written_out_loop_draws_the_same_dropout() -> None:
    one = straight("dropout", partial(by_train_step, "dropout"))
    other = straight("dropout", partial(by_hand, "dropout"))
    check_equal(one, other, 1e-10)


@pytest.mark.ranks(1, 2)
def test_backwards_of_one_forward_add() -> None:
    def twice(engine: Engine, step: int) -> None:
        for part in parts(engine, "decoder", step):
            total, count = engine(**part)
            engine.backward(0.25 * total / count, weight=float(count), retain_graph=True)
            engine.backward(0.75 * total / count)
        engine.step()
        assert engine.last is not None
        assert engine.last.weight == plain.NUM_SAMPLES * 10

    check_equal(straight("decoder", partial(by_train_step, "decoder")), straight("decoder", twice), 1e-10)


@pytest.mark.ranks(1, 2)
def test_two_losses_and_two_engines_share_a_process() -> None:
    """A pair of models trained in turns, one of them with a loss that flows through the other."""

    def models() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(2)
        return nn.Linear(3, 4).double(), nn.Linear(4, 1).double()

    torch.manual_seed(9)
    noise = torch.randn(STEPS, plain.NUM_SAMPLES, 3, dtype=torch.float64)

    maker, judge = models()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (maker, judge)]
    for step in range(STEPS):
        for optimizer, sign in zip(optimizers, (1.0, -1.0), strict=True):
            for each in optimizers:
                each.zero_grad()
            (sign * judge(torch.tanh(maker(noise[step]))).mean()).backward()
            optimizer.step()

    first, second = (
        sixfold.initialize(model, config={"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}})
        for model in models()
    )
    mine = plain.cuts(plain.NUM_SAMPLES, first.data_ranks, "even", 0)[first.data_rank]
    for step in range(STEPS):
        x = noise[step][mine.start : mine.stop]
        first.backward(second.module(torch.tanh(first(x))).mean())
        first.step()
        with torch.no_grad():
            made = torch.tanh(first.module(x))
        second.backward(-second(made).mean())
        second.step()
    assert plain.farthest(first.full_state_dict(), maker) < 1e-12
    assert plain.farthest(second.full_state_dict(), judge) < 1e-12


def evaluate(engine: Engine) -> None:
    whole = share(engine, "dropout", 40)
    engine.eval_step(whole)
    with torch.no_grad():
        engine(**whole)


def drop_gradients_of_the_optimizer(engine: Engine) -> None:
    engine.optimizer.zero_grad(set_to_none=True)


@pytest.mark.ranks
@pytest.mark.parametrize(("zero", "num_ranks"), rows.presets(1, 2))
@pytest.mark.parametrize("intrude", [evaluate, drop_gradients_of_the_optimizer])
def test_what_one_may_do_in_the_middle_of_accumulation(intrude: Callable[[Engine], None], zero: int) -> None:
    def disturbed(engine: Engine, step: int) -> None:
        task = plain.TASKS["dropout"]
        intrude(engine)
        for part in parts(engine, "dropout", step):
            engine.backward(plain.written_out_loss(engine, task, part), weight=task.weight(part))
            intrude(engine)
        engine.step()
        intrude(engine)

    layout = {"zero": zero}
    expected = straight("dropout", partial(by_hand, "dropout"), layout=layout)
    check_equal(expected, straight("dropout", disturbed, layout=layout))


@pytest.mark.ranks(1, 2)
def test_gradients_that_users_drop_come_home_again() -> None:
    """`zero_grad` of the module takes the views away; before an update and within it."""

    def disturbed(engine: Engine, step: int) -> None:
        engine.module.zero_grad(set_to_none=True)
        engine.train_step(share(engine, "recommender", step))
        for parameter in engine.module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.ones_like(parameter)  # a stray gradient belongs to no update

    def restarted(engine: Engine, step: int) -> None:
        task = plain.TASKS["recommender"]
        for part in parts(engine, "recommender", step):
            engine.backward(plain.written_out_loss(engine, task, part), weight=0.0)
        engine.module.zero_grad(set_to_none=True)  # what was accumulated so far is not wanted
        by_hand("recommender", engine, step)

    expected = straight("recommender", partial(by_train_step, "recommender"))
    check_equal(expected, straight("recommender", disturbed))
    check_equal(expected, straight("recommender", restarted), 1e-10)


@pytest.mark.ranks(1, 2)
def test_a_users_own_scheduler_is_left_alone() -> None:
    model = plain.TASKS["decoder"].build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    engine = sixfold.initialize(model, config={}, optimizer=optimizer)
    assert engine.optimizer is optimizer
    rates = []
    for step in range(3):
        before = weights(engine)
        engine.train_step(share(engine, "decoder", step, torch.float32))
        rates.append(optimizer.param_groups[0]["lr"])
        grad = engine.module.get_parameter("model.norm.weight").grad
        moved = before["model.norm.weight"] - weights(engine)["model.norm.weight"]
        assert grad is not None
        assert torch.allclose(moved, rates[-1] * grad, rtol=1e-3, atol=1e-7)
        scheduler.step()
    assert rates == [0.4, 0.2, 0.1]


@pytest.mark.ranks
@pytest.mark.parametrize(("zero", "num_ranks"), rows.presets(1, 3))
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_edits_under_gathered_hold_on_every_rank(compute: str, zero: int) -> None:
    engine = start("recommender", torch.float32, precision={"compute": compute}, layout={"zero": zero})
    engine.train_step(share(engine, "recommender", 0, torch.float32))
    before = weights(engine)
    with engine.gathered() as module:
        assert module is engine.module
        if engine.mesh.rank == 0:
            module.get_parameter("rare.bias")[1] = 4.0
        module.get_parameter("frozen.weight").fill_(0.5)
    after = weights(engine)
    assert after["rare.bias"][1] == 4.0
    with engine.gathered() as module:
        assert float(module.get_parameter("rare.bias")[1]) == 4.0
    assert float(after["frozen.weight"].min()) == 0.5
    untouched = before.keys() - {"rare.bias", "frozen.weight"}
    check_equal({name: before[name] for name in untouched}, {name: after[name] for name in untouched})
    assert torch.equal(before["rare.bias"][2:], after["rare.bias"][2:])  # with full precision
    engine.train_step(share(engine, "recommender", 1, torch.float32))
    assert 3.5 < float(weights(engine)["rare.bias"][1]) < 4.5  # training goes on from the edit


@pytest.mark.ranks(2)
def test_full_state_dict_is_the_module_s_own_on_the_cpu() -> None:
    for name in ("recommender", "gpt2", "conv"):
        engine = start(name, torch.float32, batch={})
        engine.train_step(share(engine, name, 0, torch.float32))
        whole, own = engine.full_state_dict(), engine.module.state_dict()
        check_equal(whole, own)
        next(iter(whole.values())).fill_(7.0)
        assert float(next(iter(own.values())).flatten()[0]) != 7.0  # a copy


@pytest.mark.ranks(1, 2)
def test_an_update_that_was_begun_is_ended_first() -> None:
    engine = start("decoder")
    batch = share(engine, "decoder", 0)
    total, count = engine(**batch)
    engine.backward(total / count, weight=float(count))

    def gathered() -> None:
        with engine.gathered():
            pass

    forbidden: list[Callable[[], object]] = [
        partial(engine.train_step, batch),
        partial(engine.rehearse, batch),
        partial(engine.save, "nowhere"),
        partial(engine.load, "nowhere"),
        engine.gradients,
        gathered,
    ]
    for attempt in forbidden:
        with pytest.raises(StateError, match=r"1 backward\(s\) without engine.step"):
            attempt()
    engine.step()
    engine.train_step(batch)


@pytest.mark.ranks
@pytest.mark.parametrize(("zero", "num_ranks"), rows.presets(1, 2))
def test_rehearsal_changes_nothing(zero: int) -> None:
    """Also where ranks see unequally much, so that their reductions end at different times."""
    for name in ("recommender", "decoder"):
        engine, other = start(name, layout={"zero": zero}), start(name, layout={"zero": zero})
        for step in range(2):
            batch = share(engine, name, step)
            engine.rehearse(batch if engine.data_rank == 0 else None)
            engine.train_step(batch)
            other.train_step(batch)
        check_equal(weights(engine), weights(other))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("zero", PRESETS)
def test_collectives_keep_their_order_when_ranks_use_different_parameters(
    zero: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of many units, half of which a rank does not use: every unit is still summed with itself."""

    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ways = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(4))
            self.ways.double()

        def forward(self, x: Tensor, used: Tensor) -> Tensor:
            for way in used[0].tolist():
                x = torch.tanh(self.ways[way](x))
            return x.square().mean()

    monkeypatch.setattr(cut_units, "__defaults__", (64,))  # bytes: one unit per layer
    torch.manual_seed(0)
    config = {"optimizer": {"name": "sgd", "lr": 1e-9}, "layout": {"zero": zero}}
    engine = sixfold.initialize(Forked(), config=config)
    assert len(engine.state.units) == 4
    used = torch.tensor([[0, 2, 3], [3, 1, 2]])
    x = torch.randn(2, 1, 4, dtype=torch.float64)
    reference = Forked()
    reference.load_state_dict(engine.full_state_dict())
    for rank in range(2):
        (reference(x[rank], used[rank : rank + 1]) / 2).backward()
    mine = engine.data_rank
    for _ in range(2):
        engine.train_step({"x": x[mine], "used": used[mine : mine + 1]})
        for name, gradient in engine.gradients().items():
            expected = reference.get_parameter(name).grad
            assert expected is not None
            assert torch.allclose(gradient, expected, rtol=1e-7, atol=1e-12), name


class Stack(nn.Module):
    """Blocks that are run plainly, recomputed, or compiled."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(6, 1)
        self.runs: list[Callable[[Tensor], Tensor]] = [
            torch.compile(block, backend="aot_eager") if how == "compiled" else block for block in self.blocks
        ]

    def forward(self, x: Tensor) -> Tensor:
        for run in self.runs:
            if self.how.startswith("recomputed"):
                x = checkpoint(run, x.requires_grad_(), use_reentrant=self.how.endswith("reentrant"))
            else:
                x = run(x)
        return self.head(x).square().mean()  # type: ignore[no-any-return]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("how", "zero", "num_ranks"),
    [
        *(("compiled", 0, ranks) for ranks in (1, 2)),
        *(("recomputed", *each) for each in rows.presets(1, 2)),
        *(("recomputed reentrant", *each) for each in rows.presets(1, 2)),
    ],
)
def test_recomputed_and_compiled_blocks_follow_one_process(how: str, zero: int) -> None:
    def build(kind: str) -> nn.Module:
        torch.manual_seed(0)
        return Stack(kind).double()

    x = torch.randn(
        STEPS, plain.NUM_SAMPLES, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    reference = build("plain")
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    for step in range(STEPS):
        optimizer.zero_grad()
        reference(x[step]).backward()
        optimizer.step()
    config = {"optimizer": {"lr": 1e-2}, "batch": {"micro": 3}, "layout": {"zero": zero}}
    engine = sixfold.initialize(build(how), config=config)
    mine = plain.cuts(plain.NUM_SAMPLES, engine.data_ranks, "uneven", 1)[engine.data_rank]
    for step in range(STEPS):
        engine.train_step(x[step][mine.start : mine.stop].clone())
    assert plain.farthest(engine.full_state_dict(), reference) < 1e-10
    torch.compiler.reset()


@pytest.mark.ranks(2)
def test_a_gradient_after_its_reduction_is_refused() -> None:
    """Reentrant recomputation of a shared block hands out two gradients in one backward."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = checkpoint(self.block, x.requires_grad_(), use_reentrant=True)
            return x.mean()

    # The error lives in autograd's graph for a while; shared memory would be called left behind.
    engine = sixfold.initialize(Shared(), config={"layout": {"transport": "network"}})
    with pytest.raises(StateError, match="after its unit was handed to the reduction"):
        engine.train_step(torch.ones(2, 4))
    # torch never frees a graph that fails inside reentrant recomputation, nor the gradients it leads to.
    engine.module.zero_grad()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("zero", PRESETS)
def test_a_gradient_that_is_not_finite_is_refused_everywhere_and_named(zero: int) -> None:
    model = nn.ModuleDict({"fine": nn.Linear(2, 1), "sick": nn.Linear(2, 1, bias=False)})

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            return (self.parts["fine"](x) + self.parts["sick"](x.sqrt())).mean()

    engine = sixfold.initialize(Both(), config={"layout": {"zero": zero}})
    before = weights(engine)
    with pytest.raises(ModelError, match=r"1 parameter\(s\) are not finite, first: parts.sick.weight"):
        engine.train_step(torch.full((2, 2), -1.0 if engine.data_rank == 1 else 1.0))
    check_equal(before, weights(engine))
    engine.train_step(torch.ones(2, 2))
    assert engine.num_steps == 1


@pytest.mark.ranks(1)
def test_optimizers_that_do_not_fit_are_refused() -> None:
    model = nn.Linear(2, 2)
    used = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    used.step()
    with pytest.raises(StateError, match="already has state"):
        sixfold.initialize(model, config={}, optimizer=used)
    with pytest.raises(StateError, match=r"misses 1 of its trainable ones \(bias\)"):
        sixfold.initialize(model, config={}, optimizer=torch.optim.SGD([model.weight], lr=1))
    stranger = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(1))], lr=1)
    with pytest.raises(StateError, match=r"holds 1 tensor\(s\) that are not parameters"):
        sixfold.initialize(model, config={}, optimizer=stranger)
    with pytest.raises(ConfigError, match="configured beside"):
        sixfold.initialize(model, config={"optimizer": {"lr": 0.1}}, optimizer=torch.optim.AdamW)
    # Clipping is no setting of the optimizer; frozen parameters in its groups do no harm.
    model.bias.requires_grad_(False)
    engine = sixfold.initialize(
        model,
        config={"optimizer": {"clip_norm": 1.0}},
        optimizer=torch.optim.SGD(model.parameters(), lr=1),
        loss_fn=lambda output, batch: output.mean(),
    )
    bias = model.bias.clone()
    engine.train_step((torch.ones(1, 2),))
    assert torch.equal(model.bias, bias)


@pytest.mark.ranks(1, 2)
def test_any_other_optimizer_sees_whole_parameters() -> None:
    """One that normalises by a parameter's own norm would differ on a flat run of several."""

    class Lars(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 0.1})

        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["norm"] = parameter.norm().detach().clone()
                    scale = parameter.norm() / (parameter.grad.norm() + 1e-9)
                    parameter.data.add_(parameter.grad, alpha=-group["lr"] * float(scale))

    task = plain.TASKS["decoder"]
    reference = task.build().double()
    optimizer = Lars(reference.parameters())
    engine = sixfold.initialize(task.build().double(), config={}, optimizer=Lars)
    for step in range(STEPS):
        optimizer.zero_grad()
        task.loss(reference, task.batch(step)).backward()
        optimizer.step()
        engine.train_step(share(engine, "decoder", step))
    assert plain.farthest(engine.full_state_dict(), reference) < 1e-10
    assert engine.bound.state_specs()["model.norm.weight"]["norm"][0] == ()


@pytest.mark.ranks(1)
def test_settings_of_the_optimizer_reach_it() -> None:
    config = {
        "optimizer": {"name": "adamw", "lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-5, "weight_decay": 0.3}
    }
    engine = sixfold.initialize(nn.Linear(2, 2), config=config)
    group = engine.optimizer.param_groups[0]
    assert (group["lr"], tuple(group["betas"]), group["eps"], group["weight_decay"]) == (
        0.02,
        (0.8, 0.9),
        1e-5,
        0.3,
    )
    assert type(engine.optimizer) is torch.optim.AdamW
