"""The vocabulary that a run keeps in its folder, so that its model can be used without its text.

Written by the loop, read by `sixfold generate` and where the run is resumed; `transformers` reads the same
two files.
"""

from __future__ import annotations

import json
from pathlib import Path

from sixfold.base.errors import DataError
from sixfold.data.corpus import Corpus
from sixfold.data.record import TOKENIZER
from sixfold.data.tokenizer import Vocabulary, load_vocabulary
from sixfold.train.folder import write_file

_SETTINGS = "tokenizer_config.json"


def keep_vocabulary(folder: Path, corpus: Corpus) -> None:
    """Write it into a run folder; see `write_file`."""
    mark = corpus.vocabulary.tokenizer.id_to_token(corpus.document_mark)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": mark, "bos_token": mark}
    write_file(folder / _SETTINGS, json.dumps(settings, indent=1).encode())
    write_file(folder / TOKENIZER, (corpus.folder / TOKENIZER).read_bytes())


def is_kept(folder: Path, corpus: Corpus) -> bool:
    """Whether ids mean in a corpus what they mean in a run folder; also where nothing is kept there yet."""
    try:
        own = vocabulary_of(folder)
    except DataError:
        return True  # it is about to be written
    now = corpus.vocabulary
    return (own.mark, own.tokenizer.to_str()) == (now.mark, now.tokenizer.to_str())


def vocabulary_of(folder: Path) -> Vocabulary:
    """Read it again.

    Raises:
        DataError: it is not there.
    """
    try:
        mark = json.loads((folder / _SETTINGS).read_text())["eos_token"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{folder} holds no vocabulary: {error}",
            rule=f"a run keeps its vocabulary in {TOKENIZER} and {_SETTINGS}",
            fix=f"resume the run for one update, which writes them: sixfold train --resume {folder}",
        ) from error
    unmarked = load_vocabulary(folder / TOKENIZER, 0)
    number = unmarked.tokenizer.token_to_id(mark)
    if number is None:
        raise DataError(
            f"{folder / TOKENIZER} has no entry {mark!r}",
            rule=f"{_SETTINGS} names the entry that marks a document",
            fix="put the two files back as the run wrote them",
        )
    return Vocabulary(unmarked.tokenizer, number)
