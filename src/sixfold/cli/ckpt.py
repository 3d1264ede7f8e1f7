"""`sixfold ckpt` and `sixfold export`: looking at checkpoints and handing them on.

Called by `app`. Everything is done by the checkpoint room; here it is put into words, or into one JSON
document where --json was given. A tensor library is loaded once there are tensors to look at: what is
mistyped is told before, and manifests alone are enough to list and to remove.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import typer

from sixfold.base.errors import EXIT_DONE, EXIT_USAGE, CheckpointError
from sixfold.base.units import bytes_text
from sixfold.checkpoint.finding import CHECKPOINTS, find, survey
from sixfold.checkpoint.retention import Keep, prune, removable
from sixfold.cli.output import print_json
from sixfold.train.folder import held, run_around

_DIFFER = 1
"""Exit code of `diff` where the two are not equal, as of the system's own."""


def list_checkpoints(folder: Path, *, as_json: bool) -> int:
    """What lies in a folder."""
    found = survey(folder)
    if as_json:
        print_json([{**vars(each), "path": str(each.path)} for each in found])
        return EXIT_DONE
    for each in found:
        if each.problem is None:
            part = f"   only {each.only}" if each.only else ""
            typer.echo(f"{each.path}   update {each.step}   {bytes_text(each.num_bytes or 0)}{part}")
        else:
            typer.echo(f"{each.path}   not complete: {each.problem}")
    return EXIT_DONE


def verify(folder: Path, *, as_json: bool) -> int:
    """Read every byte of one checkpoint, or of all in a folder."""
    found = survey(folder)
    from sixfold.checkpoint.ranges import Ranges

    rows: list[dict[str, Any]] = []
    for each in found:
        problem = each.problem
        if problem is None:
            try:
                Ranges(*find(each.path)).verify()
            except CheckpointError as error:
                problem = error.given
        rows.append({"path": str(each.path), "problem": problem})
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            typer.echo(f"{row['path']}   {row['problem'] or 'every byte as it was saved'}")
    return EXIT_USAGE if any(row["problem"] for row in rows) else EXIT_DONE


def diff(first: Path, second: Path, *, as_json: bool) -> int:
    """In what two checkpoints differ, whatever layouts wrote them."""
    pair = find(first), find(second)
    from sixfold.checkpoint.inspecting import differences
    from sixfold.checkpoint.reading import Saved

    found = differences(*(Saved(*each) for each in pair))
    if as_json:
        print_json([vars(each) for each in found])
    else:
        for each in found:
            if each.largest is not None:
                typer.echo(f"{each.what}   {each.first}   differs by up to {each.largest:.3g}")
            else:
                typer.echo(f"{each.what}   {each.first} -> {each.second}")
        typer.echo(f"{len(found)} difference(s)")
    return _DIFFER if found else EXIT_DONE


def collect(folder: Path, *, keep: Keep, dry_run: bool, as_json: bool) -> int:
    """Remove checkpoints that are not to be kept, and what broken saves left."""
    inside = folder / CHECKPOINTS
    parent = inside if inside.is_dir() else folder
    survey(parent)
    run = run_around(folder)
    # A run under way removes checkpoints itself, and writes one perhaps.
    with held(run) if run is not None and not dry_run else nullcontext():
        leftovers, surplus = removable(parent, keep)
        if not dry_run:
            prune(parent, keep)
    paths = [str(path) for path in (*leftovers, *surplus)]
    if as_json:
        print_json({"removed": [] if dry_run else paths, "would_remove": paths if dry_run else []})
    else:
        for path in paths:
            typer.echo(f"{'would remove' if dry_run else 'removed'} {path}")
    return EXIT_DONE


def export_model(checkpoint: Path, target: Path, *, copy: bool, dry_run: bool, as_json: bool) -> int:
    """The model alone, as a Hugging Face folder."""
    found = find(checkpoint)
    from sixfold.checkpoint.exporting import export, export_files
    from sixfold.checkpoint.reading import Saved

    saved = Saved(*found)
    names = export_files(saved) if dry_run else export(saved, target, link=not copy)
    if as_json:
        print_json({"folder": str(target), "files": list(names)})
    else:
        typer.echo("\n".join(str(target / name) for name in names))
    return EXIT_DONE


def import_checkpoint(source: Path, target: Path, *, dry_run: bool, as_json: bool) -> int:
    """A foreign checkpoint in native form."""
    from sixfold.checkpoint.importing import import_folder, kind_of

    kind = kind_of(source)
    num_tensors = None if dry_run else import_folder(source, target)
    if as_json:
        print_json({"kind": kind, "folder": str(target), "num_tensors": num_tensors})
    else:
        typer.echo(f"{source} is {kind}" + ("" if dry_run else f"; {num_tensors} tensors in {target}"))
    return EXIT_DONE
