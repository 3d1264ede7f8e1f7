"""Byte-level BPE: any text becomes ids and comes back as the same text.

Trained by `corpus` on the training part only, loaded by an opened `Corpus`. The document mark is an
entry of its own that no text can produce, not even text that spells it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sixfold.base.errors import DataError

DOCUMENT_MARK = "<|document|>"
"""Stands before every document."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` entries (256 bytes, the document mark, merges).

    The same texts in the same order give the same tokenizer; a small corpus has fewer merges to offer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[DOCUMENT_MARK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _marks_only_by_hand(tokenizer)


def mark_id(tokenizer: Tokenizer) -> int:
    """Id of the document mark."""
    mark = tokenizer.token_to_id(DOCUMENT_MARK)
    if mark is None:
        raise AssertionError(f"training puts {DOCUMENT_MARK} into every vocabulary")
    return mark


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in `path`; DataError if the file is none."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception for whatever is wrong with a file
        raise DataError(
            f"{path} cannot be loaded as a tokenizer: {error}",
            rule="a prepared corpus holds the tokenizer that made its tokens",
            fix=f"remove {path.parent}; it is built again from the text",
        ) from error
    return _marks_only_by_hand(tokenizer)


def _marks_only_by_hand(tokenizer: Tokenizer) -> Tokenizer:
    # Not part of the saved file: text that spells the mark is encoded as ordinary text.
    tokenizer.encode_special_tokens = True
    return tokenizer
