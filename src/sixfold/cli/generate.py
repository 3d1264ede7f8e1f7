"""`sixfold generate`: the model of a run continues texts, shown as they come.

Called by `app`. The training room loads and continues; here it is printed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from sixfold.base.errors import EXIT_DONE
from sixfold.cli.output import print_json
from sixfold.train.completion import Sampling, continuations, load_run


def generate(
    run: Path,
    prompts: Sequence[str],
    *,
    num_tokens: int,
    how: Sampling,
    checkpoint: Path | None,
    as_json: bool,
) -> int:
    """All prompts are continued at once; the first is shown as it comes, the others behind it."""
    module, vocabulary = load_run(run, checkpoint)
    texts = list(prompts)
    shown = _Shown(prompts, is_quiet=as_json)
    for news in continuations(module, vocabulary, prompts, num_tokens, how):
        texts = [text + new for text, new in zip(texts, news, strict=True)]
        shown.update(texts)
    shown.finish(texts)
    if as_json:
        print_json([{"prompt": p, "text": text} for p, text in zip(prompts, texts, strict=True)])
    return EXIT_DONE


class _Shown:
    """Writes the first text at once; what comes of the others waits until it is their turn."""

    def __init__(self, prompts: Sequence[str], *, is_quiet: bool) -> None:
        self._is_quiet = is_quiet
        self._length = 0
        self.update(prompts)

    def update(self, texts: Sequence[str]) -> None:
        if not self._is_quiet:
            sys.stdout.write(texts[0][self._length :])
            sys.stdout.flush()
        self._length = len(texts[0])

    def finish(self, texts: Sequence[str]) -> None:
        if not self._is_quiet:
            typer.echo("")
            for text in texts[1:]:
                typer.echo(f"---\n{text}")
