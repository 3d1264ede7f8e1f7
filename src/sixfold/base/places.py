"""Whose line is it: the user's, this package's or a library's; and a line as people write it.

Failures, the record of exchanges and the hang watcher all name the user's own line where there is one.
It reads file names and frames only and keeps no frame.
"""

from __future__ import annotations

import os
import sysconfig
from functools import cache
from pathlib import Path
from types import FrameType

PACKAGE = str(Path(__file__).parents[1])
_LIBRARIES = tuple(
    os.path.join(path, "")
    for path in {
        PACKAGE,
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    }
)


def is_library(file: str) -> bool:
    """Whether a source file belongs to Python, to an installed package or to this one."""
    installed = f"{os.sep}site-packages{os.sep}" in file or f"{os.sep}dist-packages{os.sep}" in file
    return installed or file.startswith(("<frozen", *_LIBRARIES))


@cache
def place_text(file: str, line: int) -> str:
    """`file:line`, relative where the file lies below the current folder."""
    short = os.path.relpath(file) if file.startswith(os.getcwd() + os.sep) else file
    return f"{short}:{line}"


@cache
def _rank_of(file: str, besides: str) -> int:
    """2 for a user's file, 1 for one of this package outside the room `besides`, 0 for all others."""
    if not is_library(file):
        return 2
    own = os.path.join(PACKAGE, "")
    return int(file.startswith(own) and not file.startswith(os.path.join(PACKAGE, besides, "")))


def place_of(frame: FrameType | None, besides: str = "") -> str:
    """The nearest line of the user at or below `frame`, else the nearest of this package, else `frame`'s.

    Args:
        besides: a room of this package whose lines do not count.
    """
    first, ours = frame, None
    while frame is not None:
        rank = _rank_of(frame.f_code.co_filename, besides)
        if rank == 2:
            return place_text(frame.f_code.co_filename, frame.f_lineno)
        if rank and ours is None:
            ours = frame
        frame = frame.f_back
    told = ours or first
    return place_text(told.f_code.co_filename, told.f_lineno) if told is not None else "no Python line"
