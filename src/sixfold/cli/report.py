"""`sixfold report`: runs as one HTML file.

Called by `app`. The monitor room reads and draws; here the file is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from sixfold.base.errors import EXIT_DONE
from sixfold.cli.output import print_json, write_page
from sixfold.monitor.report.page import page
from sixfold.monitor.report.story import read_story

FILE_NAME = "report.html"


def report(runs: Sequence[Path], *, into: Path | None, dry_run: bool, as_json: bool) -> int:
    """Write the report, beside the run where it is of one, else into the working directory."""
    stories = [read_story(folder) for folder in runs]
    file = into or (runs[0] / FILE_NAME if len(runs) == 1 else Path(FILE_NAME))
    text = page(stories)
    if not dry_run:
        write_page(file, text, what="a report", option="--into")
    if as_json:
        runs_told = {str(story.folder): {**story.summary(), "spent": story.spent()} for story in stories}
        print_json({"file": None if dry_run else str(file), "runs": runs_told})
    else:
        typer.echo(
            f"{'would write ' if dry_run else ''}{file}   {len(text.encode())} bytes, {len(runs)} run(s)"
        )
    return EXIT_DONE
