"""Documents that a function of the user's gives, written down so that they can be read again.

Called by `sixfold data build` for sources that are plugins. Everything after it sees a JSON-lines file like
any other.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from sixfold.base.errors import DataError
from sixfold.base.plugins import is_known, load_plugin
from sixfold.base.processes import is_running


def is_function(name: str) -> bool:
    """Whether a source is a plugin: what exists as a file or folder is none."""
    return is_known("source", name) and not Path(name).expanduser().exists()


@contextmanager
def spooled(names: Sequence[str], into: Path, field: str) -> Iterator[tuple[str, ...]]:
    """The sources with a file in place of each that is a function, as long as the context lasts.

    Args:
        into: the corpus that is made of them; the files lie in a folder beside it.
        field: the key under which a row holds its text.

    Raises:
        DataError: a function gave something else than texts.
        ConfigError: it cannot be loaded.
    """
    if not any(map(is_function, names)):
        yield tuple(names)
        return
    into.parent.mkdir(parents=True, exist_ok=True)
    stem = f"{into.name}.spool-"
    for left in into.parent.glob(f"{glob.escape(stem)}*-*"):
        pid = left.name.removeprefix(stem).partition("-")[0]
        if pid.isdecimal() and not is_running(int(pid)):
            shutil.rmtree(left, ignore_errors=True)  # of a build that was killed
    with TemporaryDirectory(prefix=f"{stem}{os.getpid()}-", dir=into.parent) as spool:
        # Each in a folder of its own, since functions of several files may have one name.
        yield tuple(
            _write(name, Path(spool, str(number)), field) if is_function(name) else name
            for number, name in enumerate(names)
        )


def _write(name: str, folder: Path, field: str) -> str:
    folder.mkdir()
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
