"""`sixfold report`: runs as one HTML file.

Called by `app`. The monitor room reads and draws; here the file is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from sixfold.base.errors import EXIT_DONE, DataError
from sixfold.cli.output import check_drawing, print_json, write_page, write_timelines
from sixfold.monitor.report.page import page
from sixfold.monitor.report.story import Story, read_story
from sixfold.simulate import Timeline

FILE_NAME = "report.html"


def report(
    runs: Sequence[Path], *, into: Path | None, timeline: Path | None, dry_run: bool, as_json: bool
) -> int:
    """Write the report, beside the run where it is of one, else into the working directory.

    Args:
        timeline: where the recorded updates are drawn besides.
    """
    check_drawing(timeline)
    stories = [read_story(folder) for folder in runs]
    file = into or (runs[0] / FILE_NAME if len(runs) == 1 else Path(FILE_NAME))
    text = page(stories)
    if timeline is not None:
        drawn = _recorded(stories)
        if not dry_run:
            write_timelines(timeline, drawn, "One update, measured and simulated")
    if not dry_run:
        write_page(file, text, what="a report", option="--into")
    if as_json:
        runs_told = {str(story.folder): _told(story) for story in stories}
        print_json({"file": None if dry_run else str(file), "runs": runs_told})
    else:
        typer.echo(
            f"{'would write ' if dry_run else ''}{file}   {len(text.encode())} bytes, {len(runs)} run(s)"
        )
    return EXIT_DONE


def _told(story: Story) -> dict[str, Any]:
    return {**story.summary(), "spent": story.spent(), "recorded update": story.makespans()}


def _recorded(stories: Sequence[Story]) -> dict[str, Timeline]:
    """The recorded updates of all runs by what is drawn, with the run's name where there are several."""
    for story in stories:
        if story.recorded is None:
            raise DataError(
                f"{story.folder} has recorded no update",
                rule="--timeline draws the update that a run records after its first ones",
                fix="leave --timeline out, or let the run go on for some updates",
            )
    named = len(stories) > 1
    return {
        f"{story.name} {name}" if named else name: timeline
        for story in stories
        for name, timeline in story.lanes().items()
    }
