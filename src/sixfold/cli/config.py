"""`sixfold config`: what a configuration comes to, whether files are right, and which options there are.

Called by `app`. The config room knows all of it; no tensor library is loaded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from sixfold.base.errors import EXIT_DONE, EXIT_INFEASIBLE, EXIT_USAGE, PlanError, SixfoldError
from sixfold.cli.output import print_json
from sixfold.config import Config, Resolved, describe, load
from sixfold.config.resolved import CONFIG
from sixfold.config.schema import flat
from sixfold.plan import decide_ranks
from sixfold.train.job import RECIPE


def show(file: Path | None, *, preset: str | None, overrides: Sequence[str], as_json: bool) -> int:
    """Every value with its origin, as `sixfold train` would take it."""
    resolved = _resolved(file, overrides, preset)
    if as_json:
        values = flat(resolved.config)
        print_json({path: {"value": values[path], "origin": resolved.origins[path]} for path in values})
    else:
        typer.echo(resolved.to_toml(), nl=False)
    return EXIT_DONE


def check(files: Sequence[Path], *, overrides: Sequence[str], ranks: int | None, as_json: bool) -> int:
    """Read each file and say what is wrong with it; with `ranks`, also whether so many can carry it out."""
    rows, code = [], EXIT_DONE
    for file in files:
        problem: str | None = None
        try:
            resolved = _resolved(file, overrides)
            if ranks is not None:
                decide_ranks(resolved.config, ranks)
        except SixfoldError as error:
            problem = str(error)
            code = EXIT_INFEASIBLE if isinstance(error, PlanError) and code != EXIT_USAGE else EXIT_USAGE
        rows.append({"file": str(file), "problem": problem})
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            typer.echo(f"{row['file']}: {row['problem'] or 'right'}")
    return code


def schema(*, as_json: bool) -> int:
    """Every option with what it takes, its default and its help; as JSON the schema that editors read."""
    if as_json:
        print_json(Config.model_json_schema(by_alias=True))
        return EXIT_DONE
    for path, takes, default, words in describe():
        shown = "unset" if default is None else default
        typer.echo(f"{path}   {takes}   (default: {shown})\n    {words}")
    return EXIT_DONE


def _resolved(file: Path | None, overrides: Sequence[str], preset: str | None = None) -> Resolved:
    if preset is None and file is not None and (file / CONFIG).is_file():
        own = file / CONFIG
        return load(own, overrides=overrides).recall(own.read_text(), own)
    return load(file, overrides=overrides, recipe=RECIPE, preset=preset)
