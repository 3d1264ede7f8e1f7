"""Prepared corpora: text becomes memory-mapped token files once, and is found again by its content.

`prepare` is called by train and the command line, by any number of processes at once; `Corpus` is what
everybody reads. A corpus folder appears by one rename when it is complete, and nothing in it changes
afterwards: everything in `corpus.json` follows from the text and settings its name is a hash of.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
from filelock import FileLock
from pydantic import ValidationError

from sixfold.base.errors import DataError
from sixfold.config.tree import DataConfig
from sixfold.data.build import build
from sixfold.data.record import FORMAT, HELD_OUT, RECORD, TOKENIZER, TRAIN, CorpusRecord, PartRecord
from sixfold.data.sources import Progress, Selection, Source, find_sources, places_of, select
from sixfold.data.tokenizer import DEFAULT_SIZE, TRAINED, Vocabulary, load_vocabulary, tokenizer_file

Tokens = npt.NDArray[np.unsignedinteger]


class Part:
    """What one source gives.

    Attributes:
        record: its facts.
        train, held_out: token ids, memory-mapped, read-only, shape [tokens].
    """

    def __init__(self, record: PartRecord, train: Tokens, held_out: Tokens) -> None:
        self.record, self.train, self.held_out = record, train, held_out


class Corpus:
    """An opened corpus folder.

    Attributes:
        folder: where it lies.
        record: all its facts.
        parts: what each source gives, in their order.
        vocab_size: entries of its vocabulary, `data.vocab_size` or fewer when the text offers fewer.
        document_mark: id of the mark that stands before every document, the first one included.
        compressors: bits per byte of `gzip -9` and `xz -9` on the held-out bytes, by name; none where
            those are too many.

    Raises:
        DataError: the folder is no corpus, or one of its files is missing or has the wrong size.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = record = _read_record(folder)
        for name, file in record.files.items():
            _check_size(folder / name, file.num_bytes)
        dtype = np.dtype(f"<u{record.token_bytes}")
        self.parts = tuple(
            Part(part, *(_map(folder / f"{kind}-{number}.bin", dtype) for kind in (TRAIN, HELD_OUT)))
            for number, part in enumerate(record.parts)
        )
        self.vocab_size = record.vocab_size
        self.document_mark = record.document_mark
        self.compressors = dict(record.compressors)

    @property
    def num_train_tokens(self) -> int:
        """Over all sources."""
        return sum(part.num_train_tokens for part in self.record.parts)

    @property
    def num_held_out_bytes(self) -> int:
        """UTF-8 bytes of held-out text over all sources, marks not counted."""
        return sum(part.num_held_out_bytes for part in self.record.parts)

    @property
    def num_held_out_documents(self) -> int:
        """Over all sources."""
        return sum(len(part.held_out_names) for part in self.record.parts)

    @property
    def num_bytes(self) -> int:
        """Of all its files."""
        return sum(file.num_bytes for file in self.record.files.values())

    @property
    def fingerprint(self) -> str:
        """The same for corpora of the same tokens and vocabulary, wherever they lie."""
        files = sorted(self.record.files.items())
        return _hash_of([(name, file.num_bytes, file.crc32) for name, file in files])

    def verify(self) -> None:
        """Read every file and compare its crc32 with the record; DataError names the one that differs."""
        for name, file in self.record.files.items():
            crc32 = _crc32(self.folder / name)
            if crc32 != file.crc32:
                raise _damaged(self.folder / name, f"crc32 {crc32:08x}, recorded {file.crc32:08x}")

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Loaded at first use."""
        return load_vocabulary(self.folder / TOKENIZER, self.document_mark)

    def encode(self, text: str) -> list[int]:
        """Token ids of any text; never contains the document mark."""
        return self.vocabulary.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; marks show as they are written, broken characters as U+FFFD."""
        return self.vocabulary.decode(ids)


def prepare(config: DataConfig, *, on_progress: Progress | None = None) -> Corpus:
    """The corpus that `config` describes, built unless it is there.

    Safe when several processes call it at once: one builds, the others wait for it. The cache knows a
    corpus by the content of its files; names, sizes and times of change tell it when reading them
    again would find nothing new.

    Args:
        config: sources, patterns, bounds, vocabulary; `sequence_length`, `weights` and `documents` do not
            matter here.
        on_progress: called with a phase and its done part while something is built.

    Raises:
        DataError: the sources give no corpus, the cache cannot be written, or what lies there is damaged.
    """
    progress = _no_progress if on_progress is None else on_progress
    built = built_corpus(config)
    if built is not None:
        return built
    sources = find_sources(config)
    cache = (config.cache or Path("~/.cache/sixfold")).expanduser() / "corpora"
    shortcut = cache / "known" / _signature(sources, config)
    known = _known_entry(cache, shortcut)
    if known is not None:
        return Corpus(known)
    selections = select(sources, config, progress)
    entry = cache / _content_key(selections, config)
    try:
        if not entry.exists():
            shortcut.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(entry.with_suffix(".lock")):
                if not entry.exists():
                    build(entry, selections, config, _settings(config), progress)
    except OSError as error:
        raise DataError(
            f"the corpus cannot be written to {cache}: {error}",
            rule="prepared corpora are kept in data.cache",
            fix="free some space there, or set data.cache to a folder that can be written",
        ) from error
    with suppress(OSError):  # only a hint, and a shared cache may be read-only
        shortcut.write_text(entry.name)
    return Corpus(entry)


def prepare_at(folder: Path, config: DataConfig, *, on_progress: Progress, workers: int | None) -> Corpus:
    """The corpus that `config` describes, in a folder of the user's choice; see `prepare`.

    A build that was broken off goes on from its finished pieces, as long as text and settings are the same.
    Its lock stays as well: somebody may be waiting for it, and is to exclude whoever comes later.

    Raises:
        DataError: the folder holds something else, or cannot be written.
    """
    if folder.exists() and not (folder / RECORD).exists():
        raise _occupied(folder, "is no corpus", "")  # perhaps all that somebody has written
    selections = select(find_sources(config), config, on_progress)
    settings = {**_settings(config), "key": _content_key(selections, config)}
    lock = folder.with_name(f"{folder.name}.lock")
    try:
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):
                if not folder.exists():
                    _build_at(folder, selections, config, settings, on_progress, workers)
                lock.unlink(missing_ok=True)  # nobody builds any more, whichever lock they hold
    except OSError as error:
        raise DataError(
            f"the corpus cannot be written to {folder}: {error}",
            rule="a corpus is built beside the folder it is to be and renamed when complete",
            fix="free some space there, or name a folder that can be written",
        ) from error
    corpus = Corpus(folder)
    if corpus.record.settings != settings:
        why = "holds something else than these texts under these settings"
        raise _occupied(folder, why, ", or remove this one")
    return corpus


def _build_at(
    folder: Path,
    selections: Sequence[Selection],
    config: DataConfig,
    settings: dict[str, object],
    progress: Progress,
    workers: int | None,
) -> None:
    """Build, from the pieces that lie beside it if they are of the same corpus; see `build`."""
    unfinished = folder.with_name(f"{folder.name}.building")
    try:
        key = unfinished / "key"  # tells whose the pieces are
        if not key.exists() or key.read_text() != settings["key"]:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            key.write_text(str(settings["key"]))
        build(folder, selections, config, settings, progress, workers)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)  # it may be what filled the disk
        raise


def _occupied(folder: Path, why: str, besides: str) -> DataError:
    return DataError(
        f"{folder} exists and {why}",
        rule="a corpus is built into a folder of its own and never changed afterwards",
        fix=f"build into another folder{besides}",
    )


def built_corpus(config: DataConfig) -> Corpus | None:
    """The corpus that `data.path` names where it is one already; None where it is text.

    Raises:
        DataError: it is damaged, or was built under other settings than are asked for now; what is left at
            its default asks for nothing.
    """
    ((_, path), *others) = places_of(config)
    if others or not (path / RECORD).is_file():
        return None
    corpus = Corpus(path)
    for name, given in _settings(config).items():
        was = corpus.record.settings.get(name)
        is_set = name in config.model_fields_set and getattr(config, name) is not None
        if is_set and given != was:
            raise DataError(
                f"data.{name} = {given!r}, and {path} was built with {was!r}",
                rule="what a corpus holds was settled when it was built",
                fix=f"leave data.{name} unset, or build another corpus with it",
            )
    return corpus


def _no_progress(phase: str, done: float) -> None:
    pass


def _settings(config: DataConfig) -> dict[str, object]:
    """What decides the content of a corpus, beside the text itself."""
    return {
        "include": list(config.include),
        "text_field": config.text_field,
        "max_mb": config.max_mb,
        "tokenizer": config.tokenizer or "bpe",
        "vocab_size": config.vocab_size,
        "held_out_documents": config.held_out_documents,
    }


def _signature(sources: Sequence[Source], config: DataConfig) -> str:
    files = [
        (
            source.name,
            str(source.folder.resolve()),
            [(each.name, each.num_bytes, each.mtime_ns) for each in source.files],
        )
        for source in sources
    ]
    return _hash_of([config.max_mb, config.held_out_documents, _vocabulary_key(config), files])


def _content_key(selections: Sequence[Selection], config: DataConfig) -> str:
    documents = [
        [(each.name, each.num_bytes, each.digest) for each in (*part.train, *part.held_out)]
        for part in selections
    ]
    left_out = [(part.num_undecodable, part.num_duplicates) for part in selections]
    names = [part.source.name for part in selections] if len(selections) > 1 else []
    return _hash_of([config.held_out_documents, _vocabulary_key(config), left_out, names, documents])


def _vocabulary_key(config: DataConfig) -> list[object]:
    name = config.tokenizer or "bpe"
    key: list[object] = [config.text_field, name, config.vocab_size or DEFAULT_SIZE]
    if name not in TRAINED:
        key.append(_crc32(tokenizer_file(name)))
    return key


def _hash_of(value: object) -> str:
    # json escapes the lone surrogates that a strange file name holds.
    return hashlib.blake2b(json.dumps([FORMAT, value]).encode(), digest_size=16).hexdigest()


def _known_entry(cache: Path, shortcut: Path) -> Path | None:
    # A shortcut is only a hint: torn or outdated, it names no entry and the files are read.
    try:
        name = shortcut.read_text(errors="replace")
    except OSError:
        return None
    return cache / name if name and (cache / name / RECORD).is_file() else None


def _read_record(folder: Path) -> CorpusRecord:
    path = folder / RECORD
    try:
        content = path.read_bytes()
        found = json.loads(content)
        if isinstance(found, dict) and found.get("format", FORMAT) != FORMAT:
            raise _damaged(path, f"format {found['format']}, this version reads {FORMAT}")
        return CorpusRecord.model_validate_json(content)
    except (OSError, ValueError, ValidationError) as error:
        raise _damaged(path, str(error).replace("\n", " ")) from error


def _check_size(path: Path, num_bytes: int) -> None:
    if not path.is_file():
        raise _damaged(path, "the file is missing")
    if path.stat().st_size != num_bytes:
        raise _damaged(path, f"{path.stat().st_size} bytes, recorded {num_bytes}")


def _map(path: Path, dtype: np.dtype[np.unsignedinteger]) -> Tokens:
    return np.memmap(path, dtype=dtype, mode="r")


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
