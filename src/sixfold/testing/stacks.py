"""Read the stacks that a rank dumped on SIGUSR1, and say in one phrase where it is.

Used by report.py to tell ranks that wait in a collective from the one that is elsewhere.
It never touches a process: pool.py asks for the dump.
"""

from __future__ import annotations

import linecache
import re
from dataclasses import dataclass
from pathlib import Path

_FRAME = re.compile(r'File "(?P<path>.*)", line (?P<line>\d+) in (?P<function>.*)')
_COLLECTIVES = "torch/distributed/distributed_c10d.py"
_HARNESS = str(Path(__file__).parent)
_OUTER = ("worker.py", "server.py")
_END = '"<string>", line 1 in <module>'  # the bottom frame of every rank; see server.command


@dataclass(frozen=True)
class Frame:
    path: str
    line: int
    function: str

    @property
    def place(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True)
class Where:
    """Where a rank is: `waits` names the collective it is blocked in, empty if it is in none."""

    waits: str
    innermost: Frame | None
    place: str

    def __str__(self) -> str:
        if self.waits:
            return f"waits in {self.waits} at {self.place}"
        function = f", in {self.innermost.function}" if self.innermost else ""
        return f"is elsewhere: {self.place}{function}"


def is_complete(dump: str) -> bool:
    return dump.rstrip().endswith(_END)


def threads(dump: str) -> list[list[Frame]]:
    """Frames per thread, innermost first, without those of the pool itself."""
    found: list[list[Frame]] = []
    for line in dump.splitlines():
        if "(most recent call first)" in line:
            found.append([])
        elif (match := _FRAME.search(line)) and found:
            found[-1].append(Frame(match["path"], int(match["line"]), match["function"]))
    return [_without_harness(frames) for frames in found]


def where(dump: str) -> Where:
    """Judge by the first thread that is inside a collective, else by the main thread (dumped last)."""
    all_threads = [frames for frames in threads(dump) if frames]
    for frames in all_threads:
        calls = [frame for frame in frames if frame.path.endswith(_COLLECTIVES)]
        if calls:
            return Where(calls[-1].function, frames[0], _user_place(frames))
        if ".wait(" in linecache.getline(frames[0].path, frames[0].line):
            return Where("wait()", frames[0], _user_place(frames))
    if not all_threads:
        return Where("", None, "no Python frame")
    return Where("", all_threads[-1][0], _user_place(all_threads[-1]))


def text(dump: str) -> str:
    """The frames of the test, outermost first, as a traceback prints them."""
    lines = []
    for frames in threads(dump):
        for frame in reversed(frames):
            lines.append(f'  File "{frame.path}", line {frame.line}, in {frame.function}')
            if source := linecache.getline(frame.path, frame.line).strip():
                lines.append(f"    {source}")
        lines.append("")
    return "\n".join(lines).rstrip()


def _without_harness(frames: list[Frame]) -> list[Frame]:
    for depth, frame in enumerate(frames):
        if frame.path.startswith(_HARNESS) and Path(frame.path).name in _OUTER:
            # The closing barrier is the pool's own: keep its frame, so that there is something to show.
            return frames[: depth + 1] if frame.function == "_close" else frames[:depth]
    return frames


def _user_place(frames: list[Frame]) -> str:
    """The innermost line outside torch, and the outermost one (the test's) where it is another."""
    outside = [frame for frame in frames if "/torch/" not in frame.path] or frames
    places = dict.fromkeys((outside[0].place, outside[-1].place))
    return ", called from ".join(places)
