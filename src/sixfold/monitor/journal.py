"""The metrics file of a run: one JSON object a line, each step once, readable while it grows.

The training loop writes records; reports and people read them with `read_records` or any tool that
knows JSON lines. A write that fails is reported once and never stops the run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from sixfold.base.errors import DataError

FILE_NAME = "metrics.jsonl"

_log = logging.getLogger(__name__)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file in order, of no file none; lines cut short by a kill are left out.

    Raises:
        DataError: it cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}",
            rule="the metrics of a run are a file of JSON lines in its folder",
            fix=f"make it readable, or move {path} away",
        ) from error
    records = []
    for line in content.splitlines():
        # A line torn by a kill may end inside a character or inside a number.
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(_plain(record), allow_nan=False).encode() + b"\n"


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are written as the text that `float()` reads back."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Journal:
    """Appends records to `metrics.jsonl` in a run folder.

    Args:
        folder: the run folder; made when missing.
        resume_step: the step the run goes on from. Records of later steps are dropped, because the
            run is about to write them again; records without a step are kept.
        warn: told once why writing failed.
    """

    def __init__(
        self, folder: Path, resume_step: int = 0, warn: Callable[[str], None] = _log.warning
    ) -> None:
        self.path = Path(folder) / FILE_NAME
        self._warn = warn
        self._warned = False
        self._file: BinaryIO | None = None
        self._end = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._keep_until(resume_step)
            # Unbuffered: a record is in the file when write() returns, and nothing is left to fail
            # later, when the file is closed.
            self._file = self.path.open("ab", buffering=0)
            self._end = self._file.tell()
        except (OSError, DataError) as error:
            self._failed(error)

    def _keep_until(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = [record for record in read_records(self.path) if record.get("step", step) <= step]
        # Replaced as a whole: a kill in between leaves the old file or the new one.
        temporary = self.path.with_suffix(".tmp")
        temporary.write_bytes(b"".join(map(_line, kept)))
        os.replace(temporary, self.path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record of JSON values, complete in the file on return."""
        if self._file is None:
            return
        try:
            line = _line(record)
            written = self._file.write(line)
            if written != len(line):
                raise OSError(f"only {written} of {len(line)} bytes were written")
            self._end += len(line)
        except (OSError, TypeError, ValueError) as error:
            # Half a line would spoil the next one, should there be room again.
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            self._failed(error)

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _failed(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            reason = error.given if isinstance(error, DataError) else error
            self._warn(f"metrics are not written to {self.path}: {reason}; training goes on")
