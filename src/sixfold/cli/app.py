"""The commands of `sixfold` and their options.

Help texts and option checks live here and must stay free of heavy imports; each command loads its own
module when it runs. Errors of Sixfold are printed once and become the exit code.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sixfold import __version__
from sixfold.base.errors import EXIT_INTERRUPTED, SixfoldError
from sixfold.cli.groups import ckpt, configuration, data
from sixfold.cli.options import (
    AsJson,
    ConfigFile,
    Drawing,
    DryJson,
    DryRun,
    Into,
    Overrides,
    Preset,
    Target,
    folder_or_url,
    only_when_dry,
    path,
)

app = typer.Typer(
    name="sixfold",
    help="Train PyTorch models too large or too slow for one device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data, name="data")
app.add_typer(ckpt, name="ckpt")
app.add_typer(configuration, name="config")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sixfold {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    config: ConfigFile = None,
    overrides: Overrides = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", parser=path, metavar="FOLDER", help="Go on with the run in this folder."),
    ] = None,
    into: Into = None,
    preset: Preset = None,
    dry_run: DryRun = False,
    as_json: DryJson = False,
    handed: Annotated[Path | None, typer.Option("--handed", parser=path, hidden=True)] = None,
) -> None:
    """Train a language model on text, on every rank of this machine.

    Without options: a small decoder on the source files of this Python, in about three minutes.
    """
    from sixfold.cli.train import run_train
    from sixfold.train.job import Request

    only_when_dry(as_json, dry_run)
    request = Request(config, tuple(overrides or ()), resume, into, preset, handed)
    raise typer.Exit(run_train(request, dry_run=dry_run, as_json=as_json))


@app.command()
def plan(
    config: ConfigFile = None,
    overrides: Overrides = None,
    preset: Preset = None,
    ranks: Annotated[
        int | None,
        typer.Option("--ranks", "-n", min=1, help="Ranks of the run. Unset: as train would start."),
    ] = None,
    timeline: Drawing = None,
    as_json: AsJson = False,
) -> None:
    """Show what a training run would be: its layout, what ranks would hold, how an update would go."""
    from sixfold.cli.output import check_drawing
    from sixfold.train.job import Request, resolve

    check_drawing(timeline)
    resolved = resolve(Request(config, tuple(overrides or ()), preset=preset))
    # Slow to load; what is mistyped has been told by then.
    from sixfold.cli.plan import show_plan

    raise typer.Exit(show_plan(resolved, ranks=ranks, timeline=timeline, as_json=as_json))


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def run(
    script: Annotated[
        list[str],
        typer.Argument(metavar="SCRIPT.PY [ARGS]", help="Your script, or -m MODULE, and its arguments."),
    ],
    ranks: Annotated[
        int | None,
        typer.Option("--ranks", "-n", min=1, help="Ranks on this machine. Unset: one per GPU or core."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Compute threads per rank. Unset: cores / ranks.")
    ] = None,
    into: Into = None,
    dry_run: DryRun = False,
    as_json: DryJson = False,
) -> None:
    """Run your own script on every rank of this machine."""
    from sixfold.cli.run import run_script

    only_when_dry(as_json, dry_run)
    raise typer.Exit(
        run_script(script, ranks=ranks, threads=threads, into=into, dry_run=dry_run, as_json=as_json)
    )


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(parser=folder_or_url, metavar="CHECKPOINT")],
    target: Target,
    copy: Annotated[bool, typer.Option("--copy", help="Copy even where files could be linked.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make a folder with the model alone, as Hugging Face tools read it."""
    from sixfold.cli.ckpt import export_model

    raise typer.Exit(export_model(checkpoint, target, copy=copy, dry_run=dry_run, as_json=as_json))


@app.command()
def doctor(
    self_test: Annotated[
        bool, typer.Option("--self-test/--no-self-test", help="Let a few ranks exchange numbers.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Look at this machine: devices, backends, links, limits, versions; one-line fixes."""
    from sixfold.cli.doctor import examine

    raise typer.Exit(examine(self_test=self_test, as_json=as_json))


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(parser=path, metavar="RUN", help="Run folder.")],
    prompts: Annotated[
        list[str],
        typer.Option("--prompt", "-p", metavar="TEXT", help="Beginning; may be given several times."),
    ],
    num_tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="At most so many new ones.")] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", min=0.0, help="0 takes the likeliest token.")
    ] = 0.7,
    top_k: Annotated[
        int | None, typer.Option("--top-k", "-k", min=1, help="Sample among the likeliest alone.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the draws.")] = 0,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", parser=path, metavar="FOLDER", help="Unset: the newest of the run."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Let the model of a run continue texts; each ends with its document."""
    from sixfold.train.folder import checkpoint_of

    checkpoint_of(run, checkpoint)  # before a tensor library is loaded
    from sixfold.cli.generate import generate as continue_texts
    from sixfold.train.completion import Sampling

    raise typer.Exit(
        continue_texts(
            run,
            prompts,
            num_tokens=num_tokens,
            how=Sampling(temperature, top_k, seed),
            checkpoint=checkpoint,
            as_json=as_json,
        )
    )


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(parser=path, metavar="RUN", help="Run folders.")],
    into: Annotated[
        Path | None,
        typer.Option(
            "--into",
            parser=path,
            metavar="FILE",
            help="File to write. Unset: report.html in the run folder; of several runs, here.",
        ),
    ] = None,
    timeline: Drawing = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Tell of one run, or compare several, in one HTML file: curves, time, layout, settings."""
    from sixfold.cli.report import report as write_report

    raise typer.Exit(write_report(runs, into=into, timeline=timeline, dry_run=dry_run, as_json=as_json))


def main() -> None:
    """Entry point of the `sixfold` command."""
    try:
        app()
    except SixfoldError as error:
        typer.echo(f"sixfold: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
