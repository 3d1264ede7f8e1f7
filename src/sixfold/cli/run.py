"""`sixfold run`: a user's own script on every rank of this machine.

Called by `app`. The script finds its place through `sixfold.initialize` or torch's own environment
variables; nothing of it is read here.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

import typer

from sixfold.base.errors import ConfigError
from sixfold.cli.output import print_json
from sixfold.launch import discover, launch, nodes
from sixfold.launch.resources import default_ranks, default_threads
from sixfold.train.folder import make_folder


def run_script(
    script: Sequence[str],
    *,
    ranks: int | None,
    threads: int | None,
    into: Path | None,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Returns the exit code."""
    if script[0] == "-m":
        _check_module(script[1:])
    elif not Path(script[0]).is_file():
        raise ConfigError(
            f"{script[0]} is not a file",
            rule="sixfold run takes a Python script, or -m and a module",
            fix="give the script's path, for example: sixfold run train.py --epochs 3",
        )
    place = discover(os.environ)
    if place is not None:
        raise ConfigError(
            f"sixfold run inside a rank (rank {place.rank} of {place.world_size}, from {place.source})",
            rule="ranks are started once, by one launcher",
            fix=f"start the script itself there: python {shlex.join(script)}",
        )
    node = nodes(os.environ)
    count = ranks or default_ranks(node)[0]
    command = [sys.executable, "-m", "sixfold.launch.script", *script]
    if dry_run and as_json:
        print_json({"ranks": count, "command": command})
        return 0
    if dry_run:
        typer.echo(f"{count} x {shlex.join(command)}")
        return 0
    return launch(
        command,
        ranks=count,
        run_folder=make_folder(into, Path("runs")),
        threads=threads or default_threads(count),
        node=node,
    )


def _check_module(arguments: Sequence[str]) -> None:
    name = arguments[0] if arguments else ""
    if not name or not _can_run(name):
        raise ConfigError(
            f"there is no module {name} to run (working directory {os.getcwd()})"
            if name
            else "-m without a module",
            rule="-m is followed by a module that python -m can run, and by its arguments",
            fix="give its dotted name, for example: sixfold run -m mypackage.train --epochs 3",
        )


def _can_run(name: str) -> bool:
    """Whether `python -m name` would find something; imports nothing of it."""
    top, *inner = name.split(".")
    # A rank has the working directory on its path, this command perhaps not.
    spec = PathFinder.find_spec(top, [os.getcwd()]) or (importlib.util.find_spec(top) if top else None)
    for part in inner:
        if spec is None or spec.submodule_search_locations is None:
            return False
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations)) if part else None
    if spec is None or spec.submodule_search_locations is None:
        return spec is not None
    return PathFinder.find_spec("__main__", list(spec.submodule_search_locations)) is not None
