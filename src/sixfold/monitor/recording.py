"""The recorded update of a run: what every rank of its first pipeline did when, in one small file.

Written by the training loop, read by reports. A write that fails is told and never stops the run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from sixfold.base.errors import DataError, ProgramError
from sixfold.simulate import Timeline

FILE_NAME = "timeline.json"


def write_recording(folder: Path, step: int, timeline: Timeline, warn: Callable[[str], None]) -> None:
    """Write the times of update `step` into a run folder, in place of another one's."""
    file = folder / FILE_NAME
    draft = file.with_suffix(".tmp")
    try:
        draft.write_text(json.dumps({"step": step, "events": timeline.rows()}))
        os.replace(draft, file)  # reports are made while the run goes on, or was killed
    except OSError as error:
        warn(f"the recorded update is not written to {file}: {error}; training goes on")


def read_recording(folder: Path) -> tuple[int, Timeline] | None:
    """The update that the run in a folder has recorded, and its times; None where it has not yet.

    Raises:
        DataError: the file is damaged.
    """
    file = folder / FILE_NAME
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text())
        return int(found["step"]), Timeline.of_rows(found["events"])
    except (ValueError, KeyError, TypeError, ProgramError) as error:
        raise DataError(
            f"{file} cannot be read: {error}",
            rule="it holds the times of one update, as the run wrote them",
            fix=f"remove it; the report then leaves the update out, and sixfold train --resume {folder} "
            "records another",
        ) from error
