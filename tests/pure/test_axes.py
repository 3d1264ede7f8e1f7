"""Every axis that has a card has everything an axis needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from sixfold.base.axes import AXIS_NAMES, CARDS, AxisCard
from sixfold.config import LayoutConfig, load
from sixfold.plan.geometry import MESH_AXES, Geometry, decide_geometry

ROOT = Path(__file__).parents[2]
WORDS = {"all-reduce", "reduce-scatter", "all-gather", "all-to-all", "broadcast", "send", "receive"}


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
def test_a_card_has_all_its_parts(card: AxisCard) -> None:
    assert card.name in AXIS_NAMES
    assert CARDS[card.name] is card
    assert card.name in LayoutConfig.model_fields
    assert card.divides
    assert card.checkpoint
    assert card.collectives
    assert set(card.collectives) <= WORDS
    page = (ROOT / "docs" / card.page).read_text()
    assert card.name in page.splitlines()[0].lower()
    assert all(word in page for word in card.collectives)
    if card.name in MESH_AXES:
        geometry = Geometry(tuple((axis, 2 if axis == card.name else 1) for axis in MESH_AXES))
        assert geometry.world_size == geometry.degree(card.name) == 2
        assert [geometry.coordinate(rank, card.name) for rank in range(2)] == [0, 1]


@pytest.mark.parametrize("name", AXIS_NAMES)
def test_every_axis_has_its_card(name: str) -> None:
    layout = load(values={"layout": {"zero": 1, name: 2}}).config.layout
    assert CARDS[name].name == name
    assert decide_geometry(layout, 2).world_size == 2
