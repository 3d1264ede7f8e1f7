"""500 spoilt configurations: none is accepted, each error names the key and the line."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from sixfold.base.errors import ConfigError
from sixfold.config import load
from sixfold.config.schema import LEAVES
from tests.pure.config_cases import (
    ADDED,
    CONFLICTS,
    FULL,
    OPTIONAL,
    OUT_OF_RANGE,
    Mutant,
    dotted,
    misspell,
    mutants,
    render,
    rows,
    wrong_types,
)

MUTANTS = list(mutants(500, seed=20))


@pytest.mark.parametrize("suffix", [".toml", ".yaml", ".json"])
def test_the_unspoilt_file_is_legal_and_full(tmp_path: Path, suffix: str) -> None:
    text, lines = render(rows(), suffix, random.Random(1))
    file = tmp_path / f"full{suffix}"
    file.write_text(text)
    resolved = load(file)
    assert resolved.config == load(values=dotted()).config
    for number, row in enumerate(rows()):
        assert resolved.origins[row.path] == f"{file}:{lines[number]}"
    absent = {path for path, _, _ in ADDED}
    assert {path for path, origin in resolved.origins.items() if origin == "default"} == absent


def test_the_cases_cover_the_tree() -> None:
    ranged = {path for path, leaf in LEAVES.items() if "=" in leaf.takes or ">" in leaf.takes}
    added = {path for path, _, _ in ADDED}
    assert ranged - added == set(OUT_OF_RANGE)
    assert {path for path, leaf in LEAVES.items() if leaf.default is None} - added == OPTIONAL
    assert {mutant.kind for mutant in MUTANTS} >= {"duplicate key", "syntax", "null"}
    assert len(MUTANTS) == 500
    assert len({mutant.text for mutant in MUTANTS}) > 450


@pytest.mark.parametrize("part", range(20))
def test_no_mutant_is_accepted(tmp_path: Path, part: int) -> None:
    for number, mutant in enumerate(MUTANTS[part::20]):
        file = tmp_path / f"mutant{number}{mutant.suffix}"
        file.write_text(mutant.text)
        message = _refusal(file, mutant)
        for name in mutant.names:
            assert name in message, f"{mutant}: {name!r} is not in\n{message}"
        assert re.search(rf"{re.escape(str(file))}:{mutant.line}\b", message), (
            f"{mutant}: not line {mutant.line} in\n{message}\n{mutant.text}"
        )
        if mutant.single:
            assert "problems in the configuration" not in message, f"{mutant}: follow-up faults\n{message}"


def _refusal(file: Path, mutant: Mutant) -> str:
    try:
        load(file)
    except ConfigError as error:
        return str(error)
    raise AssertionError(f"accepted: {mutant}\n{mutant.text}")


def test_no_mutant_of_a_dictionary_or_an_override_is_accepted() -> None:
    draw = random.Random(5)
    full = dotted()
    spoilt = [(path, value) for path, values in OUT_OF_RANGE.items() for value in values]
    for path, value in full.items():
        spoilt += [(path, wrong) for wrong in wrong_types(1.0 if path == "optimizer.clip_norm" else value)]
    for path, value in full.items():
        section, _, key = path.rpartition(".")
        wrong_key = misspell(key, draw)
        if wrong_key not in FULL[section]:
            spoilt.append((f"{section}.{wrong_key}".lstrip("."), value))
    assert len(spoilt) > 250
    for path, value in spoilt:
        with pytest.raises(ConfigError) as caught:
            load(values=full | {path: value})
        assert path in caught.value.given
        assert "(values)" in caught.value.given
        if not isinstance(value, dict):
            text = str(value).lower() if isinstance(value, bool) else repr(value)
            with pytest.raises(ConfigError) as caught:
                load(values=full, overrides=[f"{path}={text}"])
            assert path in caught.value.given
            assert "(--set)" in caught.value.given


@pytest.mark.parametrize(("path", "value", "other"), [*CONFLICTS, *ADDED])
def test_conflicts_name_both_paths_and_the_fix_works(path: str, value: object, other: str) -> None:
    base = dotted() | ({"precision.compute": "fp32"} if path == "precision.master" else {})
    with pytest.raises(ConfigError) as caught:
        load(values=base | {path: value})
    assert path in str(caught.value)
    assert other in str(caught.value)
    change = re.match(r"set (\S+) = ([^\s,]+)", caught.value.fix)
    if change:  # a fix in the form "set a.b = c" is tried
        load(values=base | {path: value}, overrides=[f"{change[1]}={change[2]}"])
