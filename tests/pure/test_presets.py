"""One dial: from a number of parameters to the sizes of the reference model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sixfold.base.errors import ConfigError
from sixfold.config import load
from sixfold.config.presets import num_parameters, preset, target_of


@given(st.floats(5, 1000), st.sampled_from(["m", "b"]))
def test_every_size_is_met_nearly_and_legal(number: float, unit: str) -> None:
    name = f"{number:.3f}{unit}"
    values = preset(name)
    config = load(preset=name).config
    target = target_of(name)
    assert target is not None
    assert num_parameters(config.model.width, config.model.num_layers) == pytest.approx(target, rel=0.15)
    assert 20 < config.model.width / config.model.num_layers < 200
    assert config.optimizer.lr == values["optimizer.lr"]


def test_larger_models_learn_slower_and_files_go_over_it() -> None:
    rates = [float(str(preset(name)["optimizer.lr"])) for name in ("10m", "125m", "1b")]
    assert rates == sorted(rates, reverse=True)
    resolved = load(preset="125m", overrides=["optimizer.lr=1e-4"])
    assert resolved.origins["model.width"] == "--preset 125m"
    assert resolved.config.optimizer.lr == 1e-4


@pytest.mark.parametrize("name", ["big", "125", "0m", "1k", "-3m", "9999b", ""])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="use --preset 10m, 125m or 1b"):
        load(preset=name)
