"""Which piece of a parameter a rank has, and where its elements lie in the whole."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sixfold.base.errors import PlanError
from sixfold.plan import Geometry, ParameterFacts, Place, cut_units, placed

Spans = tuple[tuple[int, int], ...]


@st.composite
def places(draw: st.DrawFn) -> Place:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))

    def spans(size: int) -> Spans:
        ends = sorted(draw(st.sets(st.integers(0, size), min_size=2, max_size=min(4, size + 1))))
        return tuple(zip(ends[::2], ends[1::2], strict=False))

    return Place(shape, tuple(spans(size) if draw(st.booleans()) else () for size in shape), ("tensor",))


def elements(place: Place) -> list[int]:
    """Of the whole, in the order of the piece: by counting."""
    kept = [
        [index for start, stop in (spans or ((0, size),)) for index in range(start, stop)]
        for spans, size in zip(place.spans, place.shape, strict=True)
    ]
    found = [0]
    for size, indices in zip(place.shape, kept, strict=True):
        found = [before * size + index for before in found for index in indices]
    return found


@given(places(), st.data())
def test_runs_are_the_elements_in_order(place: Place, data: st.DataObject) -> None:
    numel = prod(place.piece)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    runs = list(place.runs(start, stop))
    assert [first + i for first, _, count in runs for i in range(count)] == elements(place)[start:stop]
    assert [mine + i for _, mine, count in runs for i in range(count)] == list(range(start, stop))


def test_a_cut_along_the_first_dim_is_one_run_for_each_span() -> None:
    place = Place((8, 5), (((0, 2), (4, 6)), ()), ("tensor",))
    assert list(place.runs(0, 20)) == [(0, 0, 10), (20, 10, 10)]


def test_units_hold_one_kind_of_piece() -> None:
    facts = [ParameterFacts(name, (8, 4), "fp32", trainable=True) for name in "abcd"]
    half = Place((8, 4), (((0, 4),), ()), ("tensor",))
    expert = Place((8, 4), (((0, 2),), ()), ("expert",))
    mine = placed(facts, {"b": half, "c": Place((8, 4), partial=("tensor",)), "d": expert})
    assert [each.shape for each in mine] == [(8, 4), (4, 4), (8, 4), (2, 4)]
    units = cut_units(mine, num_slices=4, num_pieces=4, cut_apart={("expert",): (2, 2)})
    assert [(unit.cut, unit.partial, unit.num_slices) for unit in units] == [
        ((), (), 4),
        (("tensor",), (), 4),
        ((), ("tensor",), 4),
        (("expert",), (), 2),
    ]


def test_a_whole_matrix_is_not_cut() -> None:
    facts = [ParameterFacts("a", (8, 4), "fp32", trainable=True, whole=True)]
    with pytest.raises(PlanError, match="one rank"):
        placed(facts, {"a": Place((8, 4), (((0, 4),), ()), ("tensor",))})
    placed(facts, {"a": Place((8, 4), partial=("tensor",))})


def test_replicas_of_experts_are_those_at_one_place() -> None:
    geometry = Geometry((("pipe", 1), ("data", 4), ("context", 1), ("tensor", 2)), shard=4, expert=2)
    assert geometry.num_replicas() == 4
    assert geometry.num_replicas(("expert",)) == geometry.num_parts(("shard",), ("expert",)) == 2
    assert [geometry.coordinate(rank, "expert") for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    # Two along tensor and two along data hold the same half.
    assert geometry.num_holders(("shard",)) == 2
    assert geometry.num_holders((), ("tensor",)) == 4
    assert geometry.num_holders((), ("tensor", "expert")) == 2
