"""The page of a report: figures, comparison, curves, time, layout, settings and samples of runs.

Called by the command line with what `story` has read. It makes text that stands alone: styles and pictures
are in it, nothing is fetched, nothing runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from sixfold.base.units import bytes_text, count_text, duration_text, milliseconds_text
from sixfold.config.problems import show
from sixfold.config.schema import flat
from sixfold.monitor.report.curves import MOST_POINTS, colour, curves
from sixfold.monitor.report.loads import loads
from sixfold.monitor.report.picture import layout
from sixfold.monitor.report.story import SPENT, Story, differing
from sixfold.simulate import lanes

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2430; max-width: 1080px; margin: 2rem auto;
padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2.2rem; border-bottom: 1px solid #d5dae2 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #e8ebf0 }
th { font-weight: 600 } code, pre { font: 13px/1.45 ui-monospace, monospace } pre { overflow-x: auto;
background: #f4f6f9; padding: .7rem; border-radius: 4px; white-space: pre-wrap }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 1rem }
.curves svg { width: 100% } figure { margin: 0 } figcaption { font-weight: 600 }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em }
.time { display: flex; height: 1.5rem; border-radius: 4px; overflow: hidden; background: #e8ebf0 }
svg { max-width: 100%; height: auto; font: 11px system-ui, sans-serif } .rank { fill: #fff; stroke: #9aa4b2 }
.name { font-weight: 600 } .origin { color: #667085 }
"""
_SPENT = {
    "compute_s": ("compute", "#2563a8"),
    "exchange_s": ("exposed communication", "#c2571a"),
    "data_s": ("data", "#2b8a4e"),
    "host_s": ("host", "#8a94a3"),
}


def page(stories: Sequence[Story]) -> str:
    """The whole HTML file."""
    title = stories[0].name if len(stories) == 1 else f"{len(stories)} runs"
    sections = [
        _section("Figures", _figures(stories)),
        _section("What differs", _comparison(stories)) if len(stories) > 1 else "",
        _section("Curves", _curves(stories)),
        _section("Where the time of an update went", _times(stories)),
        _section("Load of experts", _loads(stories)),
        _section("One update on every rank", _lanes(stories)),
        _section("Layout", _layouts(stories)),
        _section("Samples", _samples(stories)),
        _section("Settings", _settings(stories)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Sixfold: {escape(title)}</title>"
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>'
        f"{''.join(sections)}</body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>\n" if body else ""


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _key(number: int, story: Story) -> str:
    return _patch(colour(number), story.name)


def _patch(fill: str, words: str) -> str:
    return f'<span class="key" style="background:{fill}"></span>{escape(words)}'


def _names(stories: Sequence[Story]) -> list[str]:
    return ["", *(_key(number, story) for number, story in enumerate(stories))]


def _figures(stories: Sequence[Story]) -> str:
    summaries = [story.summary() for story in stories]
    rows = [
        [escape(name), *(_figure(name, each[name]) for each in summaries)]
        for name in summaries[0]
        if any(each[name] is not None for each in summaries)
    ]
    compressors = {
        name: bits for story in stories for name, bits in story.facts.get("compressors", {}).items()
    }
    beside = ", ".join(f"{escape(name)} {bits:.3f}" for name, bits in compressors.items())
    note = f"<p>Bits per byte of general compressors on held-out bytes: {beside}.</p>" if beside else ""
    return _table(_names(stories), rows) + note


def _figure(name: str, value: float | int | None) -> str:
    if value is None:
        return "-"
    if "bytes" in name:
        return bytes_text(value)
    if "seconds" in name:
        return duration_text(value)
    if name == "utilisation":
        return f"{value:.1%}"
    return f"{value:.4f}" if isinstance(value, float) and value < 100 else count_text(value)


def _comparison(stories: Sequence[Story]) -> str:
    rows = differing(stories)
    if not rows:
        return "<p>Nothing: all settings are the same.</p>"
    return _table(
        _names(stories), ([f"<code>{path}</code>", *map(_value, row)] for path, row in rows.items())
    )


def _value(value: object) -> str:
    return "unset" if value is None else f"<code>{escape(show(value))}</code>"


def _curves(stories: Sequence[Story]) -> str:
    keys = " &nbsp; ".join(_key(number, story) for number, story in enumerate(stories))
    drawn = "".join(
        f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" for title, svg in curves(stories)
    )
    note = (
        f"<p>Where a run has more than {MOST_POINTS} updates, the bold line goes through medians of "
        "neighbours and the faint one through every update.</p>"
        if any(len(story.updates) > MOST_POINTS for story in stories)
        else ""
    )
    return f'<p>{keys}</p><div class="curves">{drawn}</div>{note}'


def _times(stories: Sequence[Story]) -> str:
    rows = []
    for number, story in enumerate(stories):
        spent = story.spent()
        if not spent:
            continue
        bar = "".join(
            f'<div style="width:{part:.4%};background:{_SPENT[name][1]}" title="{_SPENT[name][0]}"></div>'
            for name, part in spent.items()
        )
        words = " &nbsp; ".join(
            _patch(_SPENT[name][1], f"{_SPENT[name][0]} {spent[name]:.1%}") for name in SPENT
        )
        rows.append(f'<p>{_key(number, story)}<br>{words}</p><div class="time">{bar}</div>')
    note = (
        "<p>On rank 0, updates after the first. Exposed communication is time in which the rank stood still "
        "for others; host is what the library does around the instructions of a step. On a GPU, kernels run "
        "behind the host, and their time shows wherever the host waits for them.</p>"
    )
    return "".join(rows) + note if rows else ""


def _loads(stories: Sequence[Story]) -> str:
    drawn = []
    for number, story in enumerate(stories):
        if story.loads:
            step, by_router = story.loads[-1]
            drawn.append(f"<p>{_key(number, story)}: update {step}</p>{loads(by_router)}")
    note = (
        "<p>Choices that fell on each expert (across) of each layer (down): white is an equal share, orange "
        "more, blue less; behind them the least and the most of a layer, an equal share being 1. In a "
        "pipeline these are layers of the first rank's stages.</p>"
    )
    return "".join(drawn) + note if drawn else ""


def _lanes(stories: Sequence[Story]) -> str:
    drawn = []
    for number, story in enumerate(stories):
        if story.recorded is None:
            continue
        spans = story.makespans()
        words = ", ".join(f"{name} {milliseconds_text(spans[name])}" for name in ("measured", "simulated"))
        told = f"{_key(number, story)}: update {story.recorded[0]}, {words}, {spans['off']:+.1%}"
        drawn.append(f"<p>{told}</p>{lanes(story.lanes())}")
    note = (
        "<p>The ranks of the first pipeline, by their places in it. Simulated: the same schedule where each "
        "pass takes the median of its kind and messages arrive at once. Numbers are micro-batches; forwards "
        "are blue, backwards or their input parts orange, weight parts green, the step red.</p>"
    )
    return "".join(drawn) + note if drawn else ""


def _layouts(stories: Sequence[Story]) -> str:
    return "".join(
        f"<p>{_key(number, story)}</p>{layout(story.facts)}<pre>{escape(story.facts['plan'])}\n"
        f"batch       {escape(story.facts['batch'])}</pre>"
        for number, story in enumerate(stories)
        if story.facts
    )


def _samples(stories: Sequence[Story]) -> str:
    return "".join(
        f"<p>{_key(number, story)}</p><pre>{escape(story.sample)}</pre>"
        for number, story in enumerate(stories)
        if story.sample
    )


def _settings(stories: Sequence[Story]) -> str:
    texts = []
    for number, story in enumerate(stories):
        values = flat(story.resolved.config)
        rows = (
            [
                f"<code>{path}</code>",
                _value(value),
                f'<span class="origin">{escape(story.resolved.origins[path])}</span>',
            ]
            for path, value in values.items()
        )
        table = _table(("option", "value", "origin"), rows)
        texts.append(f"<details><summary>{_key(number, story)}</summary>{table}</details>")
    return "".join(texts)
