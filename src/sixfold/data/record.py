"""What `corpus.json` says: the facts of a corpus and of each of its files.

Written by `build` when everything else is there, read by `Corpus`. Plain data; it opens no file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from sixfold.data.tokenizer import Vocabulary

FORMAT = 2
"""Counts up when the content of a corpus folder changes for the same text and settings."""

RECORD, TOKENIZER = "corpus.json", "tokenizer.json"
TRAIN, HELD_OUT = "train", "held_out"
"""Beginnings of the names of token files: `train-0.bin` is what the first source trains on."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileRecord(_Record):
    """Size and checksum of one file."""

    num_bytes: int
    crc32: int


class PartRecord(_Record):
    """One source: its name, and what of it trains and is held out."""

    name: str
    num_train_tokens: int
    num_held_out_tokens: int
    num_train_bytes: int
    num_held_out_bytes: int
    num_train_documents: int
    num_undecodable: int
    num_duplicates: int
    held_out_names: list[str]


class CorpusRecord(_Record):
    """The whole of `corpus.json`."""

    format: int
    settings: dict[str, Any]
    vocab_size: int
    document_mark: int
    token_bytes: int
    parts: list[PartRecord]
    compressors: dict[str, float]
    files: dict[str, FileRecord]

    @classmethod
    def of(
        cls,
        settings: dict[str, object],
        vocabulary: Vocabulary,
        parts: list[PartRecord],
        compressors: dict[str, float],
        files: dict[str, FileRecord],
    ) -> CorpusRecord:
        """The record of what was built."""
        return cls(
            format=FORMAT,
            settings=settings,
            vocab_size=vocabulary.size,
            document_mark=vocabulary.mark,
            token_bytes=vocabulary.dtype.itemsize,
            parts=parts,
            compressors=compressors,
            files=files,
        )
