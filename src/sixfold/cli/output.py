"""What commands have in common in how they show things: JSON documents, pages and progress.

Used by the modules of single commands. It computes nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import typer

from sixfold.base.errors import DataError
from sixfold.simulate import Timeline, chrome_trace, html_page


def print_json(value: object) -> None:
    """One document, indented."""
    typer.echo(json.dumps(value, indent=1, default=str))


@contextmanager
def progress_bar(*, shown: bool = True) -> Iterator[Callable[[str, float], None]]:
    """A bar for each phase on a terminal, a line for each elsewhere; a function of (phase, part done)."""
    if not shown:
        yield lambda phase, part: None
        return
    if not sys.stderr.isatty():
        yield _as_lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<16}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        tasks = {}

        def show(phase: str, part: float) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, total=1.0)
            progress.update(tasks[phase], completed=part)

        yield show


def _as_lines() -> Callable[[str, float], None]:
    said: set[str] = set()

    def show(phase: str, part: float) -> None:
        if phase not in said:
            said.add(phase)
            typer.echo(f"corpus      {phase} ...", err=True)

    return show


_DRAWINGS: dict[str, Callable[[Mapping[str, Timeline], str], str]] = {
    ".html": html_page,
    ".json": lambda timelines, title: chrome_trace(timelines),
}


def check_drawing(file: Path | None) -> None:
    """Refuse a file for `--timeline` that ends in something else than what can be drawn.

    Raises:
        DataError: it does.
    """
    if file is not None and file.suffix.lower() not in _DRAWINGS:
        raise DataError(
            f"--timeline {file} ends in {file.suffix!r}",
            rule="a timeline is a page (.html), or a trace for Chrome's viewer and Perfetto (.json)",
            fix=f"name it {file.with_suffix('.html').name}" if file.name else "name it timeline.html",
        )


def write_timelines(file: Path, timelines: Mapping[str, Timeline], title: str) -> None:
    """Draw timelines into the file that `--timeline` names, which `check_drawing` has passed.

    Raises:
        DataError: it cannot be written.
    """
    write_page(file, _DRAWINGS[file.suffix.lower()](timelines, title), what="a timeline", option="--timeline")


def write_page(file: Path, text: str, *, what: str, option: str) -> None:
    """Write `text` into `file`.

    Args:
        what: the page is, for an error.
        option: that names the file.

    Raises:
        DataError: it cannot be written.
    """
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{file} cannot be written: {error.strerror}",
            rule=f"{what} is one new file",
            fix=f"give {option} a file in a folder that can be written",
        ) from error
