"""Held-out bits per byte, with a model that needs one nat for every token."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sixfold.config import load
from sixfold.data.corpus import prepare
from sixfold.engine import Engine
from sixfold.train.evaluate import bits_per_byte


class OneNat:
    """What the evaluation asks of an engine."""

    data_rank, data_ranks = 0, 1

    def eval_step(self, batch: dict[str, Any]) -> SimpleNamespace:
        return SimpleNamespace(loss=1.0, weight=batch["tokens"][:, 1:].numel())


@pytest.mark.parametrize("are_told_apart", [True, False])
def test_every_source_counts_in_the_whole(are_told_apart: bool, tmp_path: Path) -> None:
    """Also where two have one name, as in corpora that were built before names were made unique."""
    for folder, words in (("a", 2), ("b", 30)):
        (tmp_path / folder).mkdir()
        rows = "".join(json.dumps({"text": f"{folder}{n} " * words}) + "\n" for n in range(6))
        (tmp_path / folder / "train.jsonl").write_text(rows)
    values = {
        "data.sources": [str(tmp_path / folder / "train.jsonl") for folder in "ab"],
        "data.tokenizer": "bytes",
        "data.held_out_documents": 2,
        "data.cache": str(tmp_path / "cache"),
    }
    config = load(values=values).config
    corpus = prepare(config.data)
    names = ["a/train.jsonl", "b/train.jsonl"]
    if not are_told_apart:
        names = ["train.jsonl"]
        parts = [part.model_copy(update={"name": "train.jsonl"}) for part in corpus.record.parts]
        corpus.record = corpus.record.model_copy(update={"parts": parts})
    measured = bits_per_byte(cast(Engine, OneNat()), corpus, config)
    tokens = sum(len(part.held_out) - 1 for part in corpus.parts)
    assert measured[""] == pytest.approx(tokens / math.log(2) / corpus.num_held_out_bytes)
    assert list(measured) == ["", *names]
