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

app = typer.Typer(
    name="sixfold",
    help="Train PyTorch models too large or too slow for one device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sixfold {__version__}")
        raise typer.Exit


def _path(text: str) -> Path:
    """A path that was given; an empty one would silently mean the working directory."""
    if not text:
        raise typer.BadParameter("the path is empty; name one, or leave the option out")
    return Path(text)


Into = Annotated[
    Path | None,
    typer.Option(
        "--into",
        parser=_path,
        metavar="FOLDER",
        help="Run folder to make. Unset: a new one named after the time, under train.folder or runs/.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done; start and write nothing.")]


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", parser=_path, metavar="FILE", help="Configuration file: TOML, YAML or JSON."
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
Folder = Annotated[Path, typer.Argument(parser=_path, metavar="FOLDER")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Target = Annotated[Path, typer.Argument(parser=_path, metavar="TARGET", help="Folder to make.")]
DryJson = Annotated[bool, typer.Option("--json", help="With --dry-run: print one JSON document.")]


def _only_when_dry(as_json: bool, dry_run: bool) -> None:
    """What ranks print while they run is no document; their metrics are in the run folder."""
    if as_json and not dry_run:
        raise typer.BadParameter("--json goes with --dry-run; a run writes metrics.jsonl into its folder")


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
        typer.Option("--resume", parser=_path, metavar="FOLDER", help="Go on with the run in this folder."),
    ] = None,
    into: Into = None,
    preset: Preset = None,
    dry_run: DryRun = False,
    as_json: DryJson = False,
) -> None:
    """Train a language model on text, on every rank of this machine.

    Without options: a small decoder on the source files of this Python, in about three minutes.
    """
    from sixfold.cli.train import run_train
    from sixfold.train.job import Request

    _only_when_dry(as_json, dry_run)
    request = Request(config, tuple(overrides or ()), resume, into, preset)
    raise typer.Exit(run_train(request, dry_run=dry_run, as_json=as_json))


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def run(
    script: Annotated[
        list[str],
        typer.Argument(metavar="SCRIPT.PY [ARGS]...", help="Your script, or -m MODULE, and its arguments."),
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

    _only_when_dry(as_json, dry_run)
    raise typer.Exit(
        run_script(script, ranks=ranks, threads=threads, into=into, dry_run=dry_run, as_json=as_json)
    )


data = typer.Typer(help="Make corpora, and look at what a run sees of them.", no_args_is_help=True)
app.add_typer(data, name="data")


@data.command("build")
def data_build(
    into: Annotated[
        Path, typer.Option("--into", parser=_path, metavar="FOLDER", help="Corpus folder to make.")
    ],
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SOURCE]...", help="Folders of text files, .jsonl or .parquet files, or functions."
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
            parser=_path, metavar="[FOLDER]", help="Run folder or corpus. Unset: as `train` would do."
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
app.add_typer(ckpt, name="ckpt")


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
    first: Annotated[Path, typer.Argument(parser=_path, metavar="FIRST")],
    second: Annotated[Path, typer.Argument(parser=_path, metavar="SECOND")],
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
    from sixfold.checkpoint import Keep
    from sixfold.cli.ckpt import collect

    raise typer.Exit(collect(folder, keep=Keep(keep_last, keep_every), dry_run=dry_run, as_json=as_json))


@ckpt.command("import")
def ckpt_import(
    source: Annotated[Path, typer.Argument(parser=_path, metavar="SOURCE", help="Foreign folder.")],
    target: Target,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint from a Hugging Face folder or one of torch.distributed.checkpoint."""
    from sixfold.cli.ckpt import import_checkpoint

    raise typer.Exit(import_checkpoint(source, target, dry_run=dry_run, as_json=as_json))


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(parser=_path, metavar="CHECKPOINT")],
    target: Target,
    copy: Annotated[bool, typer.Option("--copy", help="Copy even where files could be linked.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make a folder with the model alone, as Hugging Face tools read it."""
    from sixfold.cli.ckpt import export_model

    raise typer.Exit(export_model(checkpoint, target, copy=copy, dry_run=dry_run, as_json=as_json))


configuration = typer.Typer(
    help="Show what a configuration comes to, check files, list the options.", no_args_is_help=True
)
app.add_typer(configuration, name="config")
ConfigOrRun = Annotated[
    Path | None,
    typer.Argument(
        parser=_path, metavar="[FILE]", help="Configuration file or run folder. Unset: the recipe."
    ),
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
    files: Annotated[list[Path], typer.Argument(parser=_path, metavar="FILE...")],
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
    run: Annotated[Path, typer.Argument(parser=_path, metavar="RUN", help="Run folder.")],
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
        typer.Option("--checkpoint", parser=_path, metavar="FOLDER", help="Unset: the newest of the run."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Let the model of a run continue texts; each ends with its document."""
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
    runs: Annotated[list[Path], typer.Argument(parser=_path, metavar="RUN...", help="Run folders.")],
    into: Annotated[
        Path | None,
        typer.Option(
            "--into",
            parser=_path,
            metavar="FILE",
            help="File to write. Unset: report.html in the run folder; of several runs, here.",
        ),
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Tell of one run, or compare several, in one HTML file: curves, time, layout, settings."""
    from sixfold.cli.report import report as write_report

    raise typer.Exit(write_report(runs, into=into, dry_run=dry_run, as_json=as_json))


def main() -> None:
    """Entry point of the `sixfold` command."""
    try:
        app()
    except SixfoldError as error:
        typer.echo(f"sixfold: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
