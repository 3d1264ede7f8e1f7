"""Curves of runs over their updates, each a small picture in SVG.

Called by `page`. The only place that loads matplotlib; it draws what it is given and reads no file.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from statistics import median

from matplotlib import rc_context
from matplotlib.figure import Figure

from sixfold.monitor.report.story import Story

MOST_POINTS = 100
"""Updates that are drawn as they are. Of more a line is faint, with a bold one through medians of neighbours:
noise would hide one run behind another."""
COLOURS = ("#2563a8", "#c2571a", "#2b8a4e", "#8a3fa0", "#a8862b", "#3f7f8f", "#b03a5b", "#555555")
_CURVES = (
    ("loss", "training loss, nats", 1.0),
    ("lr", "learning rate", 1.0),
    ("grad_norm", "gradient norm", 1.0),
    ("tokens_per_s", "tokens per second", 1.0),
    ("mfu", "utilisation, %", 100.0),
    ("memory_bytes", "memory of rank 0, MiB", 2.0**-20),
    ("expert_imbalance", "busiest expert, equal share = 1", 1.0),
    ("expert_dropped", "choices without room, %", 100.0),
    ("expert_entropy", "entropy of routing, nats", 1.0),
    ("expert_penalty", "penalty on routing, nats", 1.0),
)


def colour(number: int) -> str:
    """Of the run with this number."""
    return COLOURS[number % len(COLOURS)]


def curves(stories: Sequence[Story]) -> list[tuple[str, str]]:
    """(title, SVG) of every curve that some run has."""
    drawn = []
    for name, title, factor in _CURVES:
        lines = [story.column(name) for story in stories]
        scaled = [(steps, [value * factor for value in values]) for steps, values in lines]
        if any(steps for steps, _ in scaled):
            drawn.append((title, _draw(title, scaled)))
    points = [list(zip(*story.evaluations, strict=True)) or [(), ()] for story in stories]
    if any(steps for steps, _ in points):
        lines = [(list(map(int, steps)), list(map(float, values))) for steps, values in points]
        drawn.insert(1, ("held-out bits per byte", _draw("held-out bits per byte", lines, marker="o")))
    return drawn


def _draw(title: str, lines: Sequence[tuple[list[int], list[float]]], marker: str = "") -> str:
    # Text stays text, so it is found by a search and drawn in the reader's own font.
    with rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9, "font.family": "sans-serif"}
    ):
        figure = Figure(figsize=(4.6, 2.5), layout="constrained")
        axes = figure.add_subplot()
        for number, (steps, values) in enumerate(lines):
            finite = [value if math.isfinite(value) else math.nan for value in values]
            alone = "o" if len(steps) == 1 else marker
            if len(steps) > MOST_POINTS:
                axes.plot(steps, finite, color=colour(number), linewidth=0.6, alpha=0.3)
                steps, finite = medians(steps, finite)
            axes.plot(steps, finite, color=colour(number), linewidth=1.3, marker=alone, markersize=4)
        axes.set_xlabel("update")
        axes.grid(visible=True, linewidth=0.4, alpha=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return _embedded(text.getvalue(), title)


def medians(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """Of at most `MOST_POINTS` runs of neighbours, each at its middle; nan where none of them is a number."""
    size = -(-len(steps) // MOST_POINTS)
    middles, found = [], []
    for start in range(0, len(steps), size):
        part = steps[start : start + size]
        numbers = [value for value in values[start : start + size] if not math.isnan(value)]
        middles.append(part[len(part) // 2])
        found.append(median(numbers) if numbers else math.nan)
    return middles, found


def _embedded(svg: str, title: str) -> str:
    """An SVG file as an element of a page: no prolog, no metadata, ids of its own."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    prefix = re.sub(r"\W+", "-", title)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', body)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", body)
