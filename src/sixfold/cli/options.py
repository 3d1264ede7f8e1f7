"""Options that several commands have in common, as typer reads them from annotations.

Used by `app` and `groups`. It must stay free of heavy imports, since help is made of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def path(text: str) -> Path:
    """A path that was given; an empty one would silently mean the working directory."""
    if not text:
        raise typer.BadParameter("the path is empty; name one, or leave the option out")
    if "://" in text:
        raise typer.BadParameter("a URL where a local path is needed; name a folder or file of this machine")
    return Path(text)


def folder_or_url(text: str) -> Path:
    """The same, or a URL that fsspec knows."""
    if "://" not in text:
        return path(text)
    from sixfold.checkpoint.remote import folder_at

    return folder_at(text)


def folder_to_make(text: str) -> Path:
    """A folder to make. What becomes one lies beside it first, by its name, so `.` and `..` get theirs."""
    given = path(text)
    return given if given.name not in ("", "..") else given.resolve()


Into = Annotated[
    Path | None,
    typer.Option(
        "--into",
        parser=path,
        metavar="FOLDER",
        help="Run folder to make. Unset: a new one named after the time, under train.folder or runs/.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done; start and write nothing.")]


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", parser=path, metavar="FILE", help="Configuration file: TOML, YAML or JSON."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Set one value, e.g. optimizer.lr=1e-3."),
]
Preset = Annotated[
    str | None,
    typer.Option("--preset", metavar="SIZE", help="Size the model by its parameters: 10m, 125m, 1b."),
]
Folder = Annotated[Path, typer.Argument(parser=folder_or_url, metavar="FOLDER")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Target = Annotated[Path, typer.Argument(parser=folder_to_make, metavar="TARGET", help="Folder to make.")]
DryJson = Annotated[bool, typer.Option("--json", help="With --dry-run: print one JSON document.")]


Drawing = Annotated[
    Path | None,
    typer.Option(
        "--timeline",
        parser=path,
        metavar="FILE",
        help="Draw one update into this file: .html a page, .json a trace for Chrome's viewer and Perfetto.",
    ),
]


def only_when_dry(as_json: bool, dry_run: bool) -> None:
    """What ranks print while they run is no document; their metrics are in the run folder."""
    if as_json and not dry_run:
        raise typer.BadParameter("--json goes with --dry-run; a run writes metrics.jsonl into its folder")
