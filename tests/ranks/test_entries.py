"""How often an update enters the library's Python: a bound for each unit and parameter, in every preset."""

from __future__ import annotations

import pytest
import torch

import sixfold
from sixfold.models.decoder import Decoder, DecoderConfig
from sixfold.testing.entries import bound, entries, fewest_entries
from tests.ranks import plain


def called_here() -> list[int]:
    return [sum(range(number)) for number in range(3)]


def test_counts_only_the_library() -> None:
    model = torch.nn.Linear(2, 2)
    assert entries(called_here).total() == 0
    counts = entries(
        lambda: sixfold.plan.cut_units(sixfold.parallel.module_facts(model, blocks=()).parameters)
    )
    assert counts["plan/units.py cut_units"] == 1
    assert counts["parallel/facts.py module_facts"] == 1


@pytest.mark.ranks(2)
@pytest.mark.parametrize("transport", ["host", "network"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_an_update_stays_within_the_bound(zero: int, transport: str) -> None:
    torch.manual_seed(0)
    with plain.small_units():
        model = Decoder(
            DecoderConfig.derive(vocab_size=64, context_length=8, width=32, num_layers=5, num_heads=2)
        )
        engine = sixfold.initialize(model, config={"layout": {"zero": zero, "transport": transport}})
    tokens = torch.randint(64, (2, 9))
    most, num_units = bound(engine), len(engine.state.units)
    counts = fewest_entries(
        lambda: engine.train_step(tokens), is_enough=lambda fewest: engine.mesh.largest(fewest) <= most
    )
    engine.close()
    assert num_units > 4
    assert counts.total() <= most, counts.most_common(12)
