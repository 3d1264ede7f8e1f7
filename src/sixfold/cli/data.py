"""`sixfold data`: text into a corpus, and what a run sees of it.

Called by `app`. The data room builds and the training room tells what comes when; here it is put into
words, or into one JSON document where --json was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from sixfold.base.errors import EXIT_DONE, ConfigError, DataError
from sixfold.base.units import bytes_text, count_text
from sixfold.cli.output import print_json, progress_bar
from sixfold.config import Resolved, load
from sixfold.config.resolved import CONFIG
from sixfold.config.tree import DataConfig
from sixfold.data.corpus import Corpus, prepare, prepare_at
from sixfold.data.record import RECORD
from sixfold.data.sources import find_sources
from sixfold.data.spool import is_function, spooled
from sixfold.train.job import RECIPE
from sixfold.train.preview import Preview, preview


def build(
    sources: Sequence[str],
    into: Path,
    *,
    config: Path | None,
    overrides: Sequence[str],
    workers: int | None,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Make a corpus in `into`."""
    values = {"data.sources": list(sources)} if sources else {}
    asked = load(config, values=values, overrides=overrides).config.data
    if dry_run:
        _show_sources(asked, as_json=as_json)
        return EXIT_DONE
    try:
        with spooled(asked.sources or (), into, asked.text_field) as named:
            if named:
                asked = asked.model_copy(update={"sources": named})
            with progress_bar(shown=not as_json) as progress:
                corpus = prepare_at(into, asked, on_progress=progress, workers=workers)
    except KeyboardInterrupt:
        typer.echo("\nstopped; the same command goes on from what is done", err=True)
        raise
    _show_corpus(corpus, as_json=as_json)
    return EXIT_DONE


def _show_sources(asked: DataConfig, *, as_json: bool) -> None:
    """What would be read; functions are not run."""
    functions = [name for name in asked.sources or () if is_function(name)]
    if functions:
        files = tuple(name for name in asked.sources or () if name not in functions)
        asked = asked.model_copy(update={"sources": files})
    found = [
        (str(each.folder), len(each.files), sum(file.num_bytes for file in each.files))
        for each in find_sources(asked)
    ]
    if as_json:
        rows = [*found, *((name, None, None) for name in functions)]
        print_json([dict(zip(("source", "files", "bytes"), row, strict=True)) for row in rows])
        return
    for folder, num_files, num_bytes in found:
        typer.echo(f"{folder}   {num_files} files   {bytes_text(num_bytes)}")
    for name in functions:
        typer.echo(f"{name}   a function, not run")


def inspect(
    target: Path | None,
    *,
    config: Path | None,
    overrides: Sequence[str],
    step: int | None,
    num_samples: int,
    verify: bool,
    as_json: bool,
) -> int:
    """A corpus, or the decoded samples of one update."""
    run_folder = target if target is not None and (target / CONFIG).is_file() else None
    resolved = _resolve(target, run_folder, config, overrides)
    asked = resolved.config
    with progress_bar(shown=not as_json) as progress:
        corpus = prepare(asked.data, on_progress=progress)
    if verify:
        corpus.verify()
    if step is None:
        _show_corpus(corpus, as_json=as_json)
    else:
        _show_preview(preview(asked, corpus, step, run_folder), corpus, num_samples, as_json=as_json)
    return EXIT_DONE


def _resolve(
    target: Path | None, run_folder: Path | None, config: Path | None, overrides: Sequence[str]
) -> Resolved:
    if run_folder is not None:
        if config is not None:
            raise ConfigError(
                f"{run_folder} together with --config {config}",
                rule="a run has its own configuration",
                fix="drop --config; single values can be changed with --set",
            )
        own = run_folder / CONFIG
        return load(own, overrides=overrides).recall(own.read_text(), own)
    if target is None:
        return load(config, overrides=overrides, recipe=RECIPE)
    if not (target / RECORD).is_file():
        raise DataError(
            f"{target} holds neither {CONFIG} nor {RECORD}",
            rule="what is inspected is a run folder, or a corpus that `sixfold data build` made",
            fix="name such a folder, or leave it out and give --config or --set as for `sixfold train`",
        )
    return load(config, values={"data.path": str(target)}, overrides=overrides, recipe=RECIPE)


def _show_corpus(corpus: Corpus, *, as_json: bool) -> None:
    if as_json:
        print_json({"folder": str(corpus.folder), **corpus.record.model_dump()})
        return
    typer.echo(f"corpus      {corpus.folder}")
    typer.echo(f"vocabulary  {corpus.vocab_size} entries, document mark {corpus.document_mark}")
    for part in corpus.record.parts:
        typer.echo(
            f"source      {part.name}: {count_text(part.num_train_tokens)} training tokens of "
            f"{part.num_train_documents} documents ({bytes_text(part.num_train_bytes)}); "
            f"{len(part.held_out_names)} held out ({bytes_text(part.num_held_out_bytes)}); "
            f"left out: {part.num_duplicates} copies, {part.num_undecodable} not UTF-8"
        )
    for name, bits in corpus.compressors.items():
        typer.echo(f"{name:<12}{bits:.3f} bits per byte of the held-out text")


def _show_preview(found: Preview, corpus: Corpus, num_samples: int, *, as_json: bool) -> None:
    texts = [corpus.decode(row.tolist()) for row in found.samples[:num_samples]]
    if as_json:
        print_json(
            {
                "step": found.step,
                "is_past": found.is_past,
                "first_sample": found.first,
                "num_samples": len(found.samples),
                "samples": [
                    {"number": found.first + n, "source": found.sources[n], "text": text}
                    for n, text in enumerate(texts)
                ],
            }
        )
        return
    tense = "saw" if found.is_past else "will see"
    typer.echo(f"step {found.step} {tense} samples {found.first} to {found.first + len(found.samples) - 1}")
    for number, text in enumerate(texts):
        typer.echo(f"\n--- sample {found.first + number} of {found.sources[number]}\n{text}")
    if len(texts) < len(found.samples):
        typer.echo(f"\n{len(found.samples) - len(texts)} more; --samples {len(found.samples)} shows all")
