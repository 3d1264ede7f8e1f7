"""A tiny corpus and tiny settings under which a whole training run takes about a second.

Used by tests of options, of the training loop and of the command line. Everything lies in the folder
that the test names.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import tomli_w

from sixfold.config.schema import nested

WORDS = (
    "def",
    "return",
    "class",
    "self",
    "value",
    "for",
    "in",
    "range",
    "if",
    "else",
    "print",
    "left",
    "right",
)


def write_corpus(folder: Path, num_files: int = 60) -> Path:
    """Small files of words in random order, half of them .py and half .txt; the same at every call."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_files):
        lines = (" ".join(draw.choices(WORDS, k=8)) for _ in range(20))
        name = f"file-{number:03d}.{('py', 'txt')[number % 2]}"
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def settings(folder: Path, **changes: object) -> dict[str, object]:
    """Settings by dotted path for a tiny run on the corpus in `folder`/text; `a__b` changes `a.b`."""
    return {
        "data.path": folder / "text",
        "data.include": ["*.py", "*.txt"],
        "data.vocab_size": 300,
        "data.sequence_length": 32,
        "data.held_out_documents": 4,
        "data.cache": folder / "cache",
        "model.width": 32,
        "model.num_layers": 2,
        "model.num_heads": 2,
        "model.num_kv_heads": 1,
        "batch.global": 6,
        "precision.compute": "fp32",
        "lr_schedule.warmup_steps": 2,
        "train.steps": 4,
        "train.sample_tokens": 4,
        "train.folder": folder / "runs",
        "monitor.peak_tflops": 1.0,
        **{path.replace("__", "."): value for path, value in changes.items()},
    }


def write_config(file: Path, values: Mapping[str, object]) -> Path:
    """The settings as a TOML file; None leaves a path out."""
    plain = {
        path: str(value) if isinstance(value, Path) else value
        for path, value in values.items()
        if value is not None
    }
    file.write_text(tomli_w.dumps(nested(plain)))
    return file
