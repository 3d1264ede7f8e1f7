"""Documents that a function of the user's gives, written down so that they can be read again.

Called by `sixfold data build` for sources that are plugins. Everything after it sees a JSON-lines file like
any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from sixfold.base.errors import DataError
from sixfold.base.plugins import is_known, load_plugin


def spool(names: Iterable[str], folder: Path, field: str) -> tuple[str, ...]:
    """The sources with a file in place of each that is a function; others stay as they are.

    Args:
        folder: where the files go; made when needed.
        field: the key under which a row holds its text.

    Raises:
        DataError: a function gave something else than texts.
        ConfigError: it cannot be loaded.
    """
    return tuple(
        name
        if Path(name).expanduser().exists() or not is_known("source", name)
        else _write(name, folder, field)
        for name in names
    )


def _write(name: str, folder: Path, field: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name.rpartition(':')[2]}.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for number, text in enumerate(load_plugin("source", name)()):
            if not isinstance(text, str):
                raise DataError(
                    f"document {number} of the source {name} is a {type(text).__name__}",
                    rule="a source is a function without arguments that yields the text of each document",
                    fix="yield str, one for each document",
                )
            lines.write(json.dumps({field: text}) + "\n")
    return str(file)
