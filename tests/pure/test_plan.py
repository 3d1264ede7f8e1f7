"""What is decided: geometry, batches, units, precision, learning rate."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sixfold.base.errors import PlanError
from sixfold.base.units import bytes_text, item_bytes
from sixfold.config import Config, load
from sixfold.plan import (
    REPLICAS,
    BatchPlan,
    LearningRate,
    LossScaling,
    ParameterFacts,
    Place,
    StagePlan,
    cut_units,
    decide,
    decide_batch,
    decide_geometry,
    decide_learning_rate,
    decide_precision,
    exchange_memory,
    persistent_memory,
)
from sixfold.plan.geometry import MESH_AXES, Geometry
from sixfold.plan.units import ALIGN


def config(**sections: Any) -> Config:
    return load(values=sections).config


# Geometry.


@given(st.lists(st.integers(1, 4), min_size=4, max_size=4))
def test_every_rank_has_one_place(degrees: list[int]) -> None:
    geometry = Geometry(tuple(zip(MESH_AXES, degrees, strict=True)))
    assert geometry.world_size == math.prod(degrees)
    places = {
        tuple(geometry.coordinate(rank, axis) for axis in MESH_AXES) for rank in range(geometry.world_size)
    }
    assert len(places) == geometry.world_size
    assert all(0 <= value < degree for place in places for value, degree in zip(place, degrees, strict=True))


def test_neighbours_in_rank_differ_in_the_last_axis() -> None:
    geometry = Geometry(tuple(zip(MESH_AXES, (2, 2, 2, 2), strict=True)))
    assert [geometry.coordinate(rank, "tensor") for rank in range(4)] == [0, 1, 0, 1]
    assert [geometry.coordinate(rank, "pipe") for rank in (0, 7, 8, 15)] == [0, 0, 1, 1]


@given(st.integers(1, 64))
def test_data_takes_all_ranks_that_are_left(world_size: int) -> None:
    geometry = decide_geometry(config().layout, world_size)
    assert geometry.degree("data") == geometry.world_size == world_size
    assert [geometry.coordinate(rank, "data") for rank in range(world_size)] == list(range(world_size))


@pytest.mark.parametrize(
    ("layout", "said", "fix"),
    [
        ({"expert": 3}, "layout.expert = 3 with 4 data ranks", "layout.expert = 1"),
        ({"data": 3}, "= 3 ranks, but 4 are running", "layout.data = 4"),
        ({"data": 8}, "= 8 ranks, but 4 are running", "layout.data = 4"),
        ({"shard": 3, "zero": 3}, "layout.shard = 3 with 4 data ranks", "layout.shard = 4"),
        ({"zero": 3, "optimizer": "whole"}, "optimizer whole", 'layout.optimizer = "group"'),
        ({"zero": 3, "parameters": "all"}, "parameters cut over shard+data", 'layout.optimizer = "all"'),
        ({"zero": 0, "gradients": "group"}, "gradients cut over shard", 'layout.optimizer = "group"'),
        ({"zero": 2, "optimizer": "all"}, "gradients cut over shard", 'layout.optimizer = "group"'),
    ],
)
def test_layouts_that_cannot_be_carried_out_are_refused(layout: dict[str, Any], said: str, fix: str) -> None:
    with pytest.raises(PlanError) as caught:
        decide(config(layout=layout), FACTS, world_size=4)
    assert said in caught.value.given
    assert fix in caught.value.fix
    changes = re.findall(r'layout\.(\w+) = (\d+|"\w+")', caught.value.fix)
    works = layout | {key: json.loads(value) for key, value in changes}
    decide(config(layout=works), FACTS, world_size=4)


# Batches.


@given(st.integers(1, 200), st.integers(1, 16), st.none() | st.integers(1, 50))
def test_shares_divide_the_batch_in_order_and_evenly(size: int, data_ranks: int, micro: int | None) -> None:
    asked = config(
        batch={"global": size} if micro is None or micro > size else {"global": size, "micro": micro}
    )
    plan = decide_batch(asked.batch, data_ranks=data_ranks, sequence_length=8)
    shares = [plan.share(rank) for rank in range(data_ranks)]
    assert [place for share in shares for place in share] == list(range(size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for rank, share in enumerate(shares):
        assert plan.num_micro(rank) == math.ceil(len(share) / plan.micro)
    assert plan.micro <= max(map(len, shares))


def test_batches_in_tokens_and_their_derivation() -> None:
    plan = decide_batch(config(batch={"tokens": 4096, "micro": 3}).batch, data_ranks=3, sequence_length=256)
    assert plan == BatchPlan(size=16, micro=3, data_ranks=3)
    assert str(plan) == "16 samples / 3 data ranks = 6 or 5 a rank = 2 micro-batch(es) of at most 3"
    with pytest.raises(PlanError, match="neither global nor tokens"):
        decide_batch(config().batch, data_ranks=1, sequence_length=256)


# Units.

DTYPES = st.sampled_from(["fp32", "bf16", "fp64", "uint8"])


@st.composite
def modules(draw: st.DrawFn) -> list[ParameterFacts]:
    # Blocks are runs of neighbours, as in a module; what lies outside of them comes first.
    drawn = draw(st.lists(st.integers(-1, 5), max_size=25))
    blocks = [None if block < 0 else block for block in sorted(drawn)]
    return [
        ParameterFacts(
            name=f"p{place}",
            shape=tuple(draw(st.lists(st.integers(0, 9), max_size=3))),
            dtype=draw(DTYPES),
            trainable=draw(st.booleans()),
            group=draw(st.integers(0, 2)),
            block=None if block is None else f"blocks.{block}",
        )
        for place, block in enumerate(blocks)
    ]


@given(modules(), st.integers(1, 4000))
def test_units_hold_every_parameter_once_and_one_kind(facts: list[ParameterFacts], target: int) -> None:
    units = cut_units(facts, target)
    by_name = {each.name: each for each in facts}
    assert sorted(slot.name for unit in units for slot in unit.slots) == sorted(by_name)
    for unit in units:
        assert unit.numel % ALIGN == 0
        for slot in unit.slots:
            own = by_name[slot.name]
            assert (own.dtype, own.trainable) == (unit.dtype, unit.trainable)
            assert (own.shape, own.group) == (slot.shape, slot.group)
            assert slot.offset % ALIGN == 0
        for slot, following in pairwise(unit.slots):
            assert slot.offset + slot.numel <= following.offset
        assert unit.slots[-1].offset + unit.slots[-1].numel <= unit.numel


@given(modules(), st.integers(1, 4000))
def test_segments_tile_a_unit_by_group(facts: list[ParameterFacts], target: int) -> None:
    for unit in cut_units(facts, target):
        segments = unit.segments()
        assert segments[0][1] == 0
        assert segments[-1][2] == unit.numel
        assert all(one[2] == other[1] for one, other in pairwise(segments))
        groups = [group for group, _, _ in segments]
        assert groups == sorted(set(groups))
        for slot in unit.slots:
            _, start, stop = next(run for run in segments if run[0] == slot.group)
            assert start <= slot.offset <= slot.offset + slot.numel <= stop


@given(modules(), st.integers(1, 4000))
def test_blocks_stay_together_and_units_stay_small(facts: list[ParameterFacts], target: int) -> None:
    by_name = {each.name: each for each in facts}
    homes: dict[object, set[int]] = {}
    for number, unit in enumerate(cut_units(facts, target)):
        members = [by_name[slot.name] for slot in unit.slots]
        pieces = {each.block if each.block is not None else each.name for each in members}
        size = sum(each.numel for each in members) * item_bytes(unit.dtype)
        for each in members:
            if each.block is not None:
                homes.setdefault((each.block, each.dtype, each.trainable), set()).add(number)
        if len(pieces) > 1:
            # Only the block that came last may reach over the target, since it stays in one piece.
            last = max(facts.index(each) for each in members)
            rest = [each for each in members if each.block is None or each.block != facts[last].block]
            assert size <= target or sum(each.numel for each in rest) * item_bytes(unit.dtype) <= target
    assert all(len(numbers) == 1 for numbers in homes.values())


# Precision and the whole plan.

FACTS = [
    ParameterFacts("embed", (100, 8), "fp32", True),
    ParameterFacts("base", (8, 8), "bf16", False),
    ParameterFacts("scale", (8,), "fp64", True),
    ParameterFacts("codes", (16,), "uint8", False),
]


@pytest.mark.parametrize(
    ("asked", "own", "types"),
    [
        ({}, "fp32", ("fp32", "fp32", "fp32", "fp32", "fp32")),
        ({}, "fp64", ("fp64", "fp64", "fp64", "fp64", "fp64")),
        ({"compute": "bf16"}, "fp32", ("bf16", "fp32", "fp32", "fp32", "fp32")),
        ({"compute": "bf16", "grad": "bf16"}, "fp32", ("bf16", "fp32", "bf16", "bf16", "fp32")),
        (
            {"compute": "bf16", "grad": "bf16", "reduce": "fp32"},
            "fp32",
            ("bf16", "fp32", "bf16", "fp32", "fp32"),
        ),
        ({"master": "bf16", "storage": "bf16"}, "bf16", ("bf16", "bf16", "fp32", "fp32", "bf16")),
    ],
)
def test_number_types_follow_one_rule(asked: dict[str, str], own: str, types: tuple[str, ...]) -> None:
    plan = decide_precision(config(precision=asked).precision, own)
    assert (plan.compute, plan.storage, plan.grad, plan.reduce, plan.master) == types


def test_losses_are_scaled_where_a_gradient_is_in_fp16() -> None:
    for asked in ({"compute": "fp16"}, {"grad": "fp16"}, {"reduce": "fp16"}):
        plan = decide(config(precision=asked), FACTS, world_size=1)
        assert plan.loss_scaling == LossScaling(65536.0, growth_steps=2000)
        assert "from 65536, doubled after 2000 finite updates" in str(plan)
    own = [ParameterFacts("weight", (2, 2), "fp16", True), ParameterFacts("base", (2, 2), "fp32", False)]
    asked = config(precision={"loss_scale": 8.0})
    assert decide(asked, own, world_size=1).loss_scaling == LossScaling(8.0)
    frozen = [ParameterFacts("weight", (2, 2), "fp32", True), ParameterFacts("base", (2, 2), "fp16", False)]
    assert decide(config(), frozen, world_size=1).loss_scaling == LossScaling()
    with pytest.raises(PlanError, match="loss_scale = 8 for a model without fp16"):
        decide(asked, frozen, world_size=1)


def test_a_plan_prints_what_is_decided() -> None:
    plan = decide(config(precision={"compute": "bf16"}), FACTS, world_size=2)
    text = str(plan)
    assert "2: data 2" in text
    assert "808 trained, 80 frozen" in text
    assert "compute bf16, gradients fp32 (reduced in fp32), master fp32" in text
    assert "parameters whole, gradients whole, optimizer whole" in text
    kinds = {(unit.dtype, unit.trainable) for unit in plan.units}
    assert kinds == {("bf16", True), ("bf16", False), ("uint8", False)}
    assert [plan.precision_of(unit) is None for unit in plan.units if unit.dtype == "uint8"] == [True]


@pytest.mark.parametrize(("dtype", "size"), [("int64", 8), ("uint16", 2), ("complex128", 16), ("bool", 1)])
def test_what_is_never_trained_takes_the_room_of_its_own_type(dtype: str, size: int) -> None:
    facts = [*FACTS, ParameterFacts("table", (64, 1024), dtype, False)]
    without, plan = (decide(config(), each, world_size=1) for each in (FACTS, facts))
    taken = [persistent_memory(each, num_moments=0).parameters for each in (without, plan)]
    assert taken[1] - taken[0] == 64 * 1024 * size
    assert f"{bytes_text(taken[1])} in" in str(plan)
    cut = [decide(config(layout={"zero": 3}), each, world_size=2) for each in (FACTS, facts)]
    assert exchange_memory(cut[1]) - exchange_memory(cut[0]) == 32 * 1024 * size


@given(modules(), st.integers(1, 4000), st.integers(1, 4), st.integers(1, 3))
def test_slices_are_equal_and_tile_a_unit(
    facts: list[ParameterFacts], target: int, num_slices: int, num_groups: int
) -> None:
    whole = cut_units(facts, target)
    for unit, uncut in zip(
        cut_units(facts, target, num_slices=num_slices, num_pieces=num_slices * num_groups),
        whole,
        strict=True,
    ):
        assert unit.slots == uncut.slots
        assert 0 <= unit.numel - uncut.numel < ALIGN * num_slices * num_groups
        slices = [unit.slice_of(index) for index in range(num_slices)]
        assert (slices[0][0], slices[-1][1]) == (0, unit.numel)
        assert all(one[1] == other[0] for one, other in pairwise(slices))
        assert {(stop - start) % (ALIGN * num_groups) for start, stop in slices} == {0}
        assert len({stop - start for start, stop in slices}) == 1
        inside = {place for slot in unit.slots for place in range(slot.offset, slot.offset + slot.numel)}
        gaps = {place for start, stop in unit.gaps for place in range(start, stop)}
        assert inside | gaps == set(range(unit.numel))
        assert not inside & gaps


@given(modules(), st.integers(1, 4000), st.integers(1, 8), st.integers(1, 3))
def test_whole_parameters_lie_in_one_slice_each(
    facts: list[ParameterFacts], target: int, num_slices: int, num_copies: int
) -> None:
    facts = [replace(each, whole=each.dtype != "fp64") for each in facts]
    units = cut_units(facts, target, num_slices=num_slices, num_pieces=num_slices * num_copies)
    by_name = {each.name: each for each in facts}
    assert sorted(slot.name for unit in units for slot in unit.slots) == sorted(by_name)
    for unit in units:
        assert {by_name[slot.name].whole for slot in unit.slots} == {unit.whole}
        assert unit.numel % (ALIGN * num_slices * num_copies) == 0
        taken = [(slot.offset, slot.offset + slot.numel) for slot in unit.slots]
        assert all(one[1] <= other[0] for one, other in pairwise(taken))
        assert [piece[1:] for piece in unit.segments()][-1:] == [(unit.segments()[-1][1], unit.numel)]
        gaps = {place for start, stop in unit.gaps for place in range(start, stop)}
        assert gaps | {place for start, stop in taken for place in range(start, stop)} == set(
            range(unit.numel)
        )
        if not unit.whole:
            continue
        slices = [unit.slice_of(index) for index in range(num_slices)]
        for start, stop in taken:
            assert sum(begin <= start and stop <= end for begin, end in slices) >= 1
        # Graham's bound: equal shares and the largest parameter.
        padded = [-(-slot.numel // ALIGN) * ALIGN for slot in unit.slots]
        bound = sum(padded) / num_slices + max(padded) + ALIGN * num_copies
        assert unit.numel / num_slices <= bound


@pytest.mark.parametrize(
    ("num_slices", "num_units", "padding"), [(2, 14, 0), (3, 28, 0.04), (8, 5, 0.02), (64, 1, 0.35)]
)
def test_a_transformers_matrices_are_shared_out(num_slices: int, num_units: int, padding: float) -> None:
    """28 layers with grouped attention, as of a model of 1.5 G parameters."""
    shapes = ((1536, 1536), (256, 1536), (256, 1536), (1536, 1536), *((8960, 1536),) * 2, (1536, 8960))
    facts = [
        ParameterFacts(f"{layer}.{place}", shape, "bf16", True, block=str(layer), whole=True)
        for layer in range(28)
        for place, shape in enumerate(shapes)
    ]
    units = cut_units(facts, num_slices=num_slices, num_pieces=num_slices)
    padded, numel = sum(unit.numel for unit in units), sum(each.numel for each in facts)
    assert len(units) == num_units
    assert padded <= numel * (1 + padding)  # 84 equal large matrices over 64 ranks: some rank has two


@given(modules(), st.integers(1, 4000))
def test_units_that_come_and_go_hold_whole_blocks_and_nothing_else(
    facts: list[ParameterFacts], target: int
) -> None:
    by_name = {each.name: each for each in facts}
    units = cut_units(facts, target, by_block=True)
    assert sorted(slot.name for unit in units for slot in unit.slots) == sorted(by_name)
    for unit in units:
        blocks = [by_name[slot.name].block for slot in unit.slots]
        assert unit.blocks == tuple(sorted({block for block in blocks if block is not None}))
        assert (None in blocks) == (not unit.blocks)
    for unit in cut_units(facts, target):
        assert unit.blocks == ()


def test_the_plan_says_over_how_many_ranks_state_is_cut() -> None:
    for layout, said in (({"zero": 2}, "groups of 4 ranks"), ({"zero": 1, "shard": 2}, "groups of 2 ranks")):
        plan = decide(config(layout=layout), FACTS, world_size=4)
        assert said in str(plan)
        assert {unit.num_slices for unit in plan.units} == {plan.geometry.shard}
    assert "groups" not in str(decide(config(), FACTS, world_size=4))


def test_the_plan_says_of_how_many_ranks_each_has_a_summand() -> None:
    layout = {"data": 2, "context": 2, "tensor": 2, "pipe": 2, "expert": 2}
    stages = StagePlan((range(1), range(1, 2)), (0.5, 0.5), ((0,), (1,)), ((0, 1),))
    facts = [
        ParameterFacts("plain", (4,), "fp32", trainable=True),
        ParameterFacts("norm", (4,), "fp32", trainable=True, place=Place((4,), partial=("tensor",))),
        ParameterFacts("cut", (2,), "fp32", trainable=True, place=Place((4,), (((0, 2),),), ("tensor",))),
        ParameterFacts("expert", (2,), "fp32", trainable=True, place=Place((4,), (((0, 2),),), ("expert",))),
        ParameterFacts("tied", (4,), "fp32", trainable=True, tied=(0, 1)),
    ]
    plan = decide(config(layout=layout), facts, 16, stages)
    found = {unit.slots[0].name: plan.summands(unit) for unit in plan.units}
    assert found == {
        "plain": {REPLICAS: 4},
        "norm": {REPLICAS: 4, "tensor": 2},
        "cut": {REPLICAS: 4},
        "expert": {REPLICAS: 2},
        "tied": {REPLICAS: 4, "pipe": 2},
    }


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_cutting_divides_the_bytes_of_the_row(compute: str) -> None:
    facts = [ParameterFacts("weight", (128, 64), "fp32", True)]
    numel, width = 128 * 64, {"fp32": 4, "bf16": 2}[compute]
    rows: list[tuple[dict[str, Any], tuple[int, int, int]]] = [
        ({"zero": 0}, (1, 1, 1)),
        ({"zero": 1}, (1, 1, 4)),
        ({"zero": 2}, (1, 4, 4)),
        ({"zero": 3}, (4, 4, 4)),
        ({"zero": 3, "shard": 2}, (2, 2, 2)),
        ({"zero": 3, "shard": 2, "gradients": "all", "optimizer": "all"}, (2, 4, 4)),
        ({"zero": 1, "shard": 2, "optimizer": "all"}, (1, 1, 4)),
    ]
    for layout, (parameters, gradients, optimizer) in rows:
        asked = config(layout=layout, precision={"compute": compute})
        memory = persistent_memory(decide(asked, facts, world_size=4), num_moments=2)
        assert memory.parameters == width * numel // parameters
        assert memory.gradients == 4 * numel // gradients
        assert memory.master == (4 * numel // optimizer if compute == "bf16" else 0)
        assert memory.optimizer == 8 * numel // optimizer
        assert memory.total == memory.parameters + memory.gradients + memory.master + memory.optimizer
        assert "gradients" in str(memory)


# Learning rate.


@given(
    st.sampled_from(["linear", "cosine"]),
    st.integers(0, 30),
    st.floats(0, 1),
    st.integers(1, 200),
)
def test_learning_rate_rises_then_falls_to_its_end(shape: str, warmup: int, final: float, steps: int) -> None:
    rate = LearningRate(shape, warmup, final, warmup + steps)
    factors = [rate.factor(step) for step in range(warmup + steps)]
    assert factors[:warmup] == [(step + 1) / warmup for step in range(warmup)]
    falling = factors[warmup:]
    assert falling[0] == pytest.approx(1.0)
    assert all(one >= other - 1e-12 for one, other in pairwise(falling))
    if steps > 1:
        assert falling[-1] == pytest.approx(final, abs=1e-12)
    assert rate.factor(warmup + steps + 10) == pytest.approx(
        final if steps > 1 else rate.factor(warmup + steps)
    )


def test_learning_rate_formulas() -> None:
    assert [LearningRate("linear", 0, 0.2, 5).factor(step) for step in range(5)] == pytest.approx(
        [1.0, 0.8, 0.6, 0.4, 0.2]
    )
    middle = LearningRate("cosine", 2, 0.0, 7).factor(4)
    assert middle == pytest.approx(0.5)
    assert LearningRate().factor(10**6) == 1.0


def test_a_schedule_that_ends_must_know_where() -> None:
    rate = decide_learning_rate(
        config(lr_schedule={"name": "linear", "warmup_steps": 2}, train={"minutes": 1.0})
    )
    assert rate.moves
    assert rate.factor(1) == 1.0
    with pytest.raises(PlanError, match="without a number of steps"):
        rate.factor(2)
    assert rate.ending_at(4).factor(3) == 0.0
    assert not decide_learning_rate(config()).moves
    assert decide_learning_rate(config(lr_schedule={"warmup_steps": 1})).moves
