"""Timelines as files: a trace for Chrome's viewer and Perfetto, and one self-contained HTML page.

Called by commands and reports with simulated or measured timelines, or both on one scale. Text in, text
out: no plotting library, no network, and nothing is written to disk here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape

from sixfold.base.units import milliseconds_text
from sixfold.program import INPUT_PARTS, PASSES, Instruction, Op
from sixfold.simulate.timeline import LANES, Event, Timeline

_WIDTH, _LEFT, _ROW, _GAP = 1200, 240, 22, 8
"""Pixels: of the drawing, of its captions, of a lane, between ranks."""
_VISIBLE = 0.5
"""Pixels from which on a box is more than a shade of its edge."""


def chrome_trace(timelines: Mapping[str, Timeline]) -> str:
    """Trace Event Format (JSON): a process for each rank of each timeline, a thread for each lane.

    Args:
        timelines: by name, "predicted" and "measured" say.
    """
    events: list[dict[str, object]] = []
    for place, (name, timeline) in enumerate(timelines.items()):
        for rank in range(timeline.num_ranks):
            # Ranks lie together, each with all its timelines.
            process = rank * len(timelines) + place
            events.append(_name("process_name", process, 0, f"rank {rank} {name}"))
            events += [_name("thread_name", process, thread, lane) for thread, lane in enumerate(LANES)]
        for event in timeline.events:
            instruction = event.instruction
            events.append(
                {
                    "ph": "X",
                    "name": str(instruction),
                    "cat": instruction.op.value,
                    "pid": event.rank * len(timelines) + place,
                    "tid": LANES.index(event.lane),
                    "ts": event.start * 1e6,
                    "dur": (event.stop - event.start) * 1e6,
                    "args": {"stage": instruction.stage, "micro": instruction.micro},
                }
            )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, object]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}


def html_page(timelines: Mapping[str, Timeline], title: str = "Timeline") -> str:
    """One HTML file with `lanes`, and the figures of each timeline below."""
    facts = "".join(
        f"<h2>{escape(name)}</h2><pre>{escape(str(timeline))}</pre>" for name, timeline in timelines.items()
    )
    return _PAGE.format(title=escape(title), drawing=lanes(timelines), facts=facts)


def lanes(timelines: Mapping[str, Timeline]) -> str:
    """An SVG with every rank's lanes, the timelines of a rank above each other on one time scale.

    An instruction tells its times when the pointer rests on it. Lanes in which nothing is wide enough to be
    seen are left out.
    """
    until = max((timeline.makespan for timeline in timelines.values()), default=0.0) or 1.0
    scale = (_WIDTH - _LEFT) / until
    drawn: list[str] = []
    y = _GAP
    for rank in range(max((timeline.num_ranks for timeline in timelines.values()), default=0)):
        for name, timeline in timelines.items():
            for lane in LANES:
                events = [each for each in timeline.events if (each.rank, each.lane) == (rank, lane)]
                events = [each for each in events if each.stop > each.start]
                if any((each.stop - each.start) * scale >= _VISIBLE for each in events):
                    caption = escape(f"rank {rank} {name} {lane}")
                    drawn.append(f'<text fill="#555" x="4" y="{y + _ROW - 7}">{caption}</text>')
                    drawn += [_box(each, y, scale) for each in events]
                    y += _ROW
        y += _GAP
    drawn += [_tick(part * until, y, scale) for part in (0.0, 0.25, 0.5, 0.75, 1.0)]
    y += _ROW
    body = "\n".join(drawn)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y}" width="100%" '
        f'font-family="sans-serif" font-size="11">\n{body}\n</svg>'
    )


def _tick(seconds: float, y: int, scale: float) -> str:
    x = _LEFT + seconds * scale
    anchor = "end" if x > _WIDTH - 20 else "middle"
    return (
        f'<text fill="#555" x="{x:.2f}" y="{y + _ROW - 9}" text-anchor="{anchor}">'
        f"{milliseconds_text(seconds)}</text>"
    )


def _box(event: Event, y: int, scale: float) -> str:
    x, width = _LEFT + event.start * scale, (event.stop - event.start) * scale
    instruction = event.instruction
    told = f"{instruction}: {event.start:.6g} s to {event.stop:.6g} s, {event.stop - event.start:.6g} s"
    box = f'x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_ROW - 3}" stroke="#fff" stroke-width="0.5"'
    place = f'x="{x + 3:.2f}" y="{y + _ROW - 8}" pointer-events="none"'
    label = f"<text {place}>{_label(instruction)}</text>" if width > 14 else ""
    fill = _FILLS.get(instruction.op, "#bbb")
    return f'<g><title>{escape(told)}</title><rect fill="{fill}" {box}/>{label}</g>'


def _label(instruction: Instruction) -> str:
    number = instruction.micro if instruction.op in PASSES else instruction.stage
    return "" if number is None else str(number)


_FILLS = {
    Op.FORWARD: "#8fbce8",
    **dict.fromkeys(INPUT_PARTS, "#f0b673"),
    Op.BACKWARD_WEIGHT: "#93d693",
    Op.STEP: "#e88f8f",
}
"""All else is grey."""
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px sans-serif; }}
</style></head><body><h1>{title}</h1>
{drawing}
{facts}
</body></html>
"""
