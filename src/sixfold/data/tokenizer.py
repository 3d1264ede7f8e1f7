"""Vocabularies: any text becomes ids and comes back as the same text.

A byte-level BPE is trained by `build` on the training part only, or one of Hugging Face is taken over; an
opened `Corpus` loads it again. The document mark is an entry of its own that no text can produce, not even
text that spells it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sixfold.base.errors import DataError
from sixfold.config.tree import DataConfig

DOCUMENT_MARK = "<|document|>"
"""Stands before every document, in vocabularies that are trained here."""
DEFAULT_SIZE = 4096
TRAINED = ("bpe", "bytes")
BYTES = 257
"""Entries of a vocabulary of bytes: each of them, and the mark."""
# What published vocabularies call the end of a document; it stands between documents just as well.
_KNOWN_MARKS = (DOCUMENT_MARK, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class Vocabulary:
    """A tokenizer of the `tokenizers` package, and which of its entries marks a document.

    Attributes:
        size: entries, the highest id plus one.
        mark: id of the document mark.
        dtype: the narrowest type that holds an id.
    """

    def __init__(self, tokenizer: Tokenizer, mark: int) -> None:
        # Not part of the saved file: text that spells the mark is encoded as ordinary text.
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer
        self.mark = mark
        self.size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.dtype = np.dtype("<u2") if self.size <= 2**16 else np.dtype("<u4")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; never the mark."""
        return [each.ids for each in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never the mark."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; marks show as they are written, broken characters as U+FFFD."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return text


def make_tokenizer(config: DataConfig, texts: Iterable[str]) -> Tokenizer:
    """What `data.tokenizer` asks for: trained on `texts`, or taken over.

    Raises:
        DataError: there is no tokenizer where it points.
    """
    if config.tokenizer in (None, "bpe"):
        return train_tokenizer(texts, config.vocab_size or DEFAULT_SIZE)
    if config.tokenizer == "bytes":
        return train_tokenizer((), BYTES)
    fix = "set data.tokenizer to a tokenizer.json or the folder that holds one"
    assert config.tokenizer is not None, "that is bpe"
    return _read(tokenizer_file(config.tokenizer), fix)


def mark_of(config: DataConfig, tokenizer: Tokenizer) -> int:
    """Which entry stands before every document.

    Raises:
        DataError: the tokenizer has none that could.
    """
    names = list(_KNOWN_MARKS)
    if config.tokenizer is not None and config.tokenizer not in TRAINED:
        own = _end_of_text(tokenizer_file(config.tokenizer).with_name("tokenizer_config.json"))
        names = [own, *names] if own is not None else names
    found = [tokenizer.token_to_id(name) for name in names]
    mark = next((each for each in found if each is not None), None)
    if mark is None:
        raise DataError(
            f"data.tokenizer = {config.tokenizer!r} has no entry that can mark a document",
            rule="the mark is the eos_token of tokenizer_config.json beside it, or one of "
            + ", ".join(_KNOWN_MARKS),
            fix='write {"eos_token": "..."} into tokenizer_config.json beside the tokenizer',
        )
    return int(mark)


def tokenizer_file(name: str) -> Path:
    """The file that `data.tokenizer` points at.

    Raises:
        DataError: there is none.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        path /= "tokenizer.json"
    if not path.is_file():
        raise DataError(
            f"data.tokenizer = {name!r}: there is no file {path}",
            rule='data.tokenizer is "bpe", "bytes", a tokenizer.json, or the folder that holds one',
            fix='set data.tokenizer = "bpe", or name an existing file',
        )
    return path


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
    return tokenizer


def load_vocabulary(path: Path, mark: int) -> Vocabulary:
    """The vocabulary of a corpus; DataError if the file is none."""
    return Vocabulary(_read(path, f"remove {path.parent}; it is built again from the text"), mark)


def _end_of_text(path: Path) -> str | None:
    """The eos_token of a tokenizer_config.json, if there is one."""
    try:
        token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError):
        return None
    return token.get("content") if isinstance(token, dict) else token


def _read(path: Path, fix: str) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception for whatever is wrong with a file
        raise DataError(
            f"{path} cannot be loaded as a tokenizer: {error}",
            rule="a tokenizer.json is what the tokenizers package wrote",
            fix=fix,
        ) from error
