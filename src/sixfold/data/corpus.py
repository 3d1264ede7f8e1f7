"""Prepared corpora: text becomes memory-mapped token shards once, and is found again by its content.

`prepare` is called by train and the command line, by any number of processes at once; `Corpus` is what
everybody reads. A corpus folder appears by one rename when it is complete, and nothing in it changes
afterwards: everything in `corpus.json` follows from the text and settings its name is a hash of.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError
from tokenizers import Tokenizer

from sixfold.base.errors import DataError
from sixfold.config.tree import DataConfig
from sixfold.data.sources import (
    Document,
    Listed,
    Progress,
    Selection,
    list_files,
    read_text,
    select,
    source_folder,
    training_sample,
)
from sixfold.data.tokenizer import load_tokenizer, mark_id, train_tokenizer

FORMAT = 1
"""Counts up when the content of a corpus folder changes for the same text and settings."""

Shard = npt.NDArray[np.uint16]
# Two bytes a token: data.vocab_size ends at 65,536 entries.
_TOKEN = np.dtype("<u2")

_RECORD, _TOKENIZER, _TRAIN, _HELD_OUT = "corpus.json", "tokenizer.json", "train.bin", "held_out.bin"
# Merges learned from this much text serve the rest as well, and training takes seconds.
_TOKENIZER_SAMPLE_BYTES = 16_000_000
_BATCH_CHARS = 4_000_000
_PIECE_CHARS = 1_000_000


class _FileRecord(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    num_bytes: int
    crc32: int


class CorpusRecord(BaseModel):
    """What `corpus.json` says."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: int
    vocab_size: int
    document_mark: int
    num_train_tokens: int
    num_held_out_tokens: int
    num_train_bytes: int
    num_held_out_bytes: int
    num_train_documents: int
    num_undecodable: int
    num_duplicates: int
    held_out_names: list[str]
    compressors: dict[str, float]
    files: dict[str, _FileRecord]


class Corpus:
    """An opened corpus folder.

    Attributes:
        folder: where it lies.
        vocab_size: entries of its vocabulary, `data.vocab_size` or fewer when the text offers fewer.
        document_mark: id of the mark that stands before every document, the first one included.
        train, held_out: token ids, memory-mapped, read-only, shape [tokens].
        num_train_bytes, num_held_out_bytes: UTF-8 bytes of text in each part, marks not counted.
        num_train_documents, num_held_out_documents: documents in each part.
        num_undecodable, num_duplicates: files that were left out because they are not UTF-8 text, or
            copies of another file.
        held_out_names: the held-out files, relative to the source folder.
        compressors: bits per byte of `gzip -9` and `xz -9` on the held-out bytes, by name.

    Raises:
        DataError: the folder is no corpus, or one of its files is missing or has the wrong size.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = record = _read_record(folder)
        for name, file in record.files.items():
            _check_size(folder / name, file.num_bytes)
        self.vocab_size = record.vocab_size
        self.document_mark = record.document_mark
        self.train = _map_tokens(folder / _TRAIN)
        self.held_out = _map_tokens(folder / _HELD_OUT)
        self.num_train_bytes = record.num_train_bytes
        self.num_held_out_bytes = record.num_held_out_bytes
        self.num_train_documents = record.num_train_documents
        self.num_held_out_documents = len(record.held_out_names)
        self.num_undecodable = record.num_undecodable
        self.num_duplicates = record.num_duplicates
        self.held_out_names = tuple(record.held_out_names)
        self.compressors = dict(record.compressors)

    def verify(self) -> None:
        """Read every file and compare its crc32 with the record; DataError names the one that differs."""
        for name, file in self.record.files.items():
            crc32 = _crc32(self.folder / name)
            if crc32 != file.crc32:
                raise _damaged(self.folder / name, f"crc32 {crc32:08x}, recorded {file.crc32:08x}")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the `tokenizers` package, loaded at first use."""
        return load_tokenizer(self.folder / _TOKENIZER)

    def encode(self, text: str) -> list[int]:
        """Token ids of any text; never contains the document mark."""
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; marks show as they are written, broken characters as U+FFFD."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return text


def prepare(config: DataConfig, *, on_progress: Progress | None = None) -> Corpus:
    """The corpus that `config` describes, built unless the cache has it.

    Safe when several processes call it at once: one builds, the others wait for it. The cache knows a
    corpus by the content of its files; names, sizes and times of change tell it when reading them
    again would find nothing new.

    Args:
        config: source, patterns, bounds, vocabulary; `sequence_length` does not matter here.
        on_progress: called with a phase and its done part while something is built.

    Raises:
        DataError: the source gives no corpus, the cache cannot be written, or what lies there is damaged.
    """
    progress = _no_progress if on_progress is None else on_progress
    folder = source_folder(config)
    listing = list_files(folder, config)
    cache = (config.cache or Path("~/.cache/sixfold")).expanduser() / "corpora"
    shortcut = cache / "known" / _signature(folder, listing, config)
    known = _known_entry(cache, shortcut)
    if known is not None:
        return Corpus(known)
    selection = select(folder, listing, config, progress)
    entry = cache / _content_key(selection, config)
    try:
        if not entry.exists():
            shortcut.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(entry.with_suffix(".lock")):
                if not entry.exists():
                    _build(entry, selection, config.vocab_size, progress)
    except OSError as error:
        raise DataError(
            f"the corpus cannot be written to {cache}: {error}",
            rule="prepared corpora are kept in data.cache",
            fix="free some space there, or set data.cache to a folder that can be written",
        ) from error
    with suppress(OSError):  # only a hint, and a shared cache may be read-only
        shortcut.write_text(entry.name)
    return Corpus(entry)


def _no_progress(phase: str, done: float) -> None:
    pass


def _signature(folder: Path, listing: list[Listed], config: DataConfig) -> str:
    files = [(listed.name, listed.num_bytes, listed.mtime_ns) for listed in listing]
    return _hash_of([str(folder.resolve()), config.max_mb, config.held_out_files, config.vocab_size, files])


def _content_key(selection: Selection, config: DataConfig) -> str:
    documents = sorted((*selection.train, *selection.held_out), key=lambda document: document.name)
    files = [(document.name, document.num_bytes, document.digest) for document in documents]
    left_out = [selection.num_undecodable, selection.num_duplicates]
    return _hash_of([config.held_out_files, config.vocab_size, left_out, files])


def _hash_of(value: object) -> str:
    # json escapes the lone surrogates that a strange file name holds.
    return hashlib.blake2b(json.dumps([FORMAT, value]).encode(), digest_size=16).hexdigest()


def _known_entry(cache: Path, shortcut: Path) -> Path | None:
    # A shortcut is only a hint: torn or outdated, it names no entry and the files are read.
    try:
        name = shortcut.read_text(errors="replace")
    except OSError:
        return None
    return cache / name if name and (cache / name / _RECORD).is_file() else None


def _build(entry: Path, selection: Selection, vocab_size: int, progress: Progress) -> None:
    """Make the corpus beside `entry` and move it there; the caller holds the entry's lock."""
    folder = entry.with_suffix(".building")
    shutil.rmtree(folder, ignore_errors=True)  # of a builder that was killed
    folder.mkdir()
    try:
        _fill(folder, selection, vocab_size, progress)
        Corpus(folder).verify()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # it may be what filled the disk
        raise
    _sync(folder)
    folder.rename(entry)
    _sync(entry.parent)


def _fill(folder: Path, selection: Selection, vocab_size: int, progress: Progress) -> None:
    """Write all files of a corpus into an empty folder, the record last."""
    progress("train tokenizer", 0.0)
    sample = training_sample(selection, _TOKENIZER_SAMPLE_BYTES)
    tokenizer = train_tokenizer((read_text(selection.folder, document) for document in sample), vocab_size)
    progress("train tokenizer", 1.0)
    mark = mark_id(tokenizer)
    num_train_bytes = sum(document.num_bytes for document in selection.train)
    num_held_out_bytes = sum(document.num_bytes for document in selection.held_out)
    files = {_TOKENIZER: _write(folder / _TOKENIZER, [tokenizer.to_str().encode()])}
    total = num_train_bytes + num_held_out_bytes
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress("tokenize", done / total)

    for name, documents in ((_TRAIN, selection.train), (_HELD_OUT, selection.held_out)):
        files[name] = _write(
            folder / name, _token_blocks(selection.folder, documents, tokenizer, mark, advance)
        )
    progress("compress", 0.0)
    compressors = _bits_per_byte(selection)
    progress("compress", 1.0)
    record = CorpusRecord(
        format=FORMAT,
        vocab_size=tokenizer.get_vocab_size(),
        document_mark=mark,
        num_train_tokens=files[_TRAIN].num_bytes // _TOKEN.itemsize,
        num_held_out_tokens=files[_HELD_OUT].num_bytes // _TOKEN.itemsize,
        num_train_bytes=num_train_bytes,
        num_held_out_bytes=num_held_out_bytes,
        num_train_documents=len(selection.train),
        num_undecodable=selection.num_undecodable,
        num_duplicates=selection.num_duplicates,
        held_out_names=[document.shown_name for document in selection.held_out],
        compressors=compressors,
        files=files,
    )
    _write(folder / _RECORD, [record.model_dump_json(indent=2).encode()])


def _token_blocks(
    folder: Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    mark: int,
    advance: Callable[[int], None],
) -> Iterator[bytes]:
    """Token ids as bytes, piece by piece, a mark before every document; reports the bytes of text."""
    for batch in _batches(_pieces(folder, documents)):
        texts = [text for _, text in batch]
        for (is_first, _), encoding in zip(batch, tokenizer.encode_batch_fast(texts), strict=True):
            ids = [mark, *encoding.ids] if is_first else encoding.ids
            yield np.array(ids, dtype=_TOKEN).tobytes()
        advance(sum(len(text.encode()) for text in texts))


def _pieces(folder: Path, documents: Iterable[Document]) -> Iterator[tuple[bool, str]]:
    """Each document as (is its first piece, text), cut at a line end where it is very long.

    What the tokenizer returns takes a hundred times the room of the text: pieces bound the memory.
    """
    for document in documents:
        text = read_text(folder, document)
        start = 0
        while start < len(text):
            end = text.find("\n", start + _PIECE_CHARS) + 1 or len(text)
            yield start == 0, text[start:end]
            start = end


def _batches(pieces: Iterable[tuple[bool, str]]) -> Iterator[list[tuple[bool, str]]]:
    batch: list[tuple[bool, str]] = []
    num_chars = 0
    for piece in pieces:
        batch.append(piece)
        num_chars += len(piece[1])
        if num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _bits_per_byte(selection: Selection) -> dict[str, float]:
    text = "".join(read_text(selection.folder, document) for document in selection.held_out).encode()
    packed = {"gzip -9": gzip.compress(text, 9, mtime=0), "xz -9": lzma.compress(text, preset=9)}
    return {name: 8 * len(content) / len(text) for name, content in packed.items()}


def _write(path: Path, blocks: Iterable[bytes]) -> _FileRecord:
    """Write blocks to disk for good."""
    num_bytes = crc32 = 0
    with path.open("wb") as file:
        for block in blocks:
            file.write(block)
            num_bytes += len(block)
            crc32 = zlib.crc32(block, crc32)
        file.flush()
        os.fsync(file.fileno())
    return _FileRecord(num_bytes=num_bytes, crc32=crc32)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_record(folder: Path) -> CorpusRecord:
    path = folder / _RECORD
    try:
        record = CorpusRecord.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise _damaged(path, str(error).replace("\n", " ")) from error
    if record.format != FORMAT:
        raise _damaged(path, f"format {record.format}, this version reads {FORMAT}")
    return record


def _check_size(path: Path, num_bytes: int) -> None:
    if not path.is_file():
        raise _damaged(path, "the file is missing")
    if path.stat().st_size != num_bytes:
        raise _damaged(path, f"{path.stat().st_size} bytes, recorded {num_bytes}")


def _map_tokens(path: Path) -> Shard:
    return np.memmap(path, dtype=_TOKEN, mode="r")


def _crc32(path: Path) -> int:
    with path.open("rb") as file:
        blocks = iter(lambda: file.read(1 << 20), b"")
        *_, crc32 = accumulate(blocks, lambda crc, block: zlib.crc32(block, crc), initial=0)
    return crc32


def _damaged(path: Path, what: str) -> DataError:
    return DataError(
        f"{path} is damaged: {what}",
        rule="every file of a prepared corpus is as corpus.json records it",
        fix=f"remove {path.parent}; it is built again from the text",
    )
