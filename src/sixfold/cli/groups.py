"""The groups of commands: `sixfold data`, `ckpt` and `config`, with their options.

Added by `app`. As there, each command loads its own module when it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sixfold.cli.options import (
    AsJson,
    ConfigFile,
    DryRun,
    Folder,
    Overrides,
    Preset,
    Target,
    folder_or_url,
    folder_to_make,
    path,
)

data = typer.Typer(help="Make corpora, and look at what a run sees of them.", no_args_is_help=True)


@data.command("build")
def data_build(
    into: Annotated[
        Path, typer.Option("--into", parser=folder_to_make, metavar="FOLDER", help="Corpus folder to make.")
    ],
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE", help="Folders of text files, .jsonl or .parquet files, or functions."
        ),
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    workers: Annotated[
        int | None, typer.Option("--workers", "-j", min=1, help="Processes. Unset: one per core.")
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make a corpus of tokens that `sixfold train --set data.path=FOLDER` learns from.

    Options of the section data say how, for example --set data.tokenizer=bytes. A build that was broken
    off goes on where it was.
    """
    from sixfold.cli.data import build

    raise typer.Exit(
        build(
            sources or [],
            into,
            config=config,
            overrides=overrides or [],
            workers=workers,
            dry_run=dry_run,
            as_json=as_json,
        )
    )


@data.command("inspect")
def data_inspect(
    target: Annotated[
        Path | None,
        typer.Argument(
            parser=path, metavar="FOLDER", help="Run folder or corpus. Unset: as `train` would do."
        ),
    ] = None,
    step: Annotated[
        int | None, typer.Option("--step", help="Show the samples of this update. Unset: the corpus.")
    ] = None,
    num_samples: Annotated[int, typer.Option("--samples", min=1, help="How many of them.")] = 4,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte of the corpus first.")] = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show a corpus, or the text that an update of a run will see, or saw."""
    from sixfold.cli.data import inspect

    raise typer.Exit(
        inspect(
            target,
            config=config,
            overrides=overrides or [],
            step=step,
            num_samples=num_samples,
            verify=verify,
            as_json=as_json,
        )
    )


ckpt = typer.Typer(help="Look at checkpoints, compare them, clear up.", no_args_is_help=True)


@ckpt.command("ls")
def ckpt_ls(folder: Folder, as_json: AsJson = False) -> None:
    """List the checkpoints in a folder or a run folder, what is not complete first."""
    from sixfold.cli.ckpt import list_checkpoints

    raise typer.Exit(list_checkpoints(folder, as_json=as_json))


@ckpt.command("verify")
def ckpt_verify(folder: Folder, as_json: AsJson = False) -> None:
    """Read every byte of a checkpoint, or of all in a folder, and compare checksums."""
    from sixfold.cli.ckpt import verify

    raise typer.Exit(verify(folder, as_json=as_json))


@ckpt.command("diff")
def ckpt_diff(
    first: Annotated[Path, typer.Argument(parser=folder_or_url, metavar="FIRST")],
    second: Annotated[Path, typer.Argument(parser=folder_or_url, metavar="SECOND")],
    as_json: AsJson = False,
) -> None:
    """Tell in which tensors and counters two checkpoints differ; the exit code is 1 if they do."""
    from sixfold.cli.ckpt import diff

    raise typer.Exit(diff(first, second, as_json=as_json))


@ckpt.command("gc")
def ckpt_gc(
    folder: Folder,
    keep_last: Annotated[int, typer.Option("--keep-last", min=1, help="Newest checkpoints that stay.")],
    keep_every: Annotated[
        int | None, typer.Option("--keep-every", min=1, help="Those after a multiple of this stay too.")
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Remove older checkpoints and what broken saves left. Not while a run saves into the folder."""
    from sixfold.checkpoint.retention import Keep
    from sixfold.cli.ckpt import collect

    raise typer.Exit(collect(folder, keep=Keep(keep_last, keep_every), dry_run=dry_run, as_json=as_json))


@ckpt.command("import")
def ckpt_import(
    source: Annotated[Path, typer.Argument(parser=path, metavar="SOURCE", help="Foreign folder.")],
    target: Target,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint from a folder of Hugging Face, torch.distributed.checkpoint or DeepSpeed."""
    from sixfold.cli.ckpt import import_checkpoint

    raise typer.Exit(import_checkpoint(source, target, dry_run=dry_run, as_json=as_json))


configuration = typer.Typer(
    help="Show what a configuration comes to, check files, list the options.", no_args_is_help=True
)
ConfigOrRun = Annotated[
    Path | None,
    typer.Argument(parser=path, metavar="FILE", help="Configuration file or run folder. Unset: the recipe."),
]


@configuration.command("show")
def config_show(
    file: ConfigOrRun = None, preset: Preset = None, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Show every value with its origin, as `sixfold train` would take it."""
    from sixfold.cli.config import show

    raise typer.Exit(show(file, preset=preset, overrides=overrides or [], as_json=as_json))


@configuration.command("check")
def config_check(
    files: Annotated[list[Path], typer.Argument(parser=path, metavar="FILE")],
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option("--ranks", "-n", min=1, help="Also try to lay it out over so many ranks.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what is wrong with configuration files; all of it at once."""
    from sixfold.cli.config import check

    raise typer.Exit(check(files, overrides=overrides or [], ranks=ranks, as_json=as_json))


@configuration.command("schema")
def config_schema(as_json: AsJson = False) -> None:
    """List all options with their help; with --json the JSON schema that editors use."""
    from sixfold.cli.config import schema

    raise typer.Exit(schema(as_json=as_json))
