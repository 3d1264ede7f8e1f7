"""Filling a corpus folder: selected documents become token files, in pieces that several processes make.

Called by `corpus.prepare` for an entry of the cache and by `sixfold data build` for a folder of the
user's. A build that was broken off goes on from its finished pieces. Never chooses documents, and never
touches a folder that is complete.
"""

from __future__ import annotations

import gzip
import lzma
import multiprocessing
import os
import shutil
import signal
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sixfold.base.errors import DataError, WorkerError
from sixfold.base.units import bytes_text
from sixfold.config.tree import DataConfig
from sixfold.data.documents import Document, fetch
from sixfold.data.record import HELD_OUT, RECORD, TOKENIZER, TRAIN, CorpusRecord, FileRecord, PartRecord
from sixfold.data.sources import Progress, Selection, sample_texts
from sixfold.data.tokenizer import Vocabulary, load_vocabulary, make_tokenizer, mark_of

PIECE_BYTES = 4_000_000
"""Text that one process takes at a time; what the tokenizer returns takes a hundred times its room."""
POOL_BYTES = 12_000_000
"""Below this much text a pool of processes takes longer to start than it saves."""
# Merges learned from this much text serve the rest as well, and training takes seconds.
_TOKENIZER_SAMPLE_BYTES = 16_000_000
_RUN_CHARS = 1_000_000
_PIECES = "pieces"
COMPRESSED_BYTES = 64_000_000
"""Held-out text up to which it is compressed for comparison; xz takes a second for a megabyte."""


@dataclass(frozen=True)
class _Piece:
    """Neighbouring documents of one part of a source, and the file that their tokens go into."""

    file: Path
    folder: Path
    documents: tuple[Document, ...]

    @property
    def num_bytes(self) -> int:
        return sum(document.num_bytes for document in self.documents)


def build(
    entry: Path,
    selections: Sequence[Selection],
    config: DataConfig,
    settings: dict[str, object],
    progress: Progress,
    workers: int | None = None,
) -> None:
    """Make a corpus beside `entry` and move it there; the caller holds the entry's lock.

    Args:
        settings: what a corpus was asked for, as its record keeps it.
        workers: processes; None for one on each core.

    Raises:
        DataError: a document or tokenizer cannot be read.
        WorkerError: a process was ended from outside; what is done stays.
        OSError: the disk is full, or the like; nothing is left then.
    """
    folder = entry.with_name(f"{entry.name}.building")
    (folder / _PIECES).mkdir(parents=True, exist_ok=True)
    try:
        _fill(folder, selections, config, settings, progress, workers or os.cpu_count() or 1)
    except (OSError, DataError):
        shutil.rmtree(folder, ignore_errors=True)  # it may be what filled the disk
        raise
    sync(folder)
    folder.rename(entry)
    sync(entry.parent)


def _fill(
    folder: Path,
    selections: Sequence[Selection],
    config: DataConfig,
    settings: dict[str, object],
    progress: Progress,
    workers: int,
) -> None:
    """Write all files of a corpus, the record last."""
    vocabulary = _vocabulary(folder, selections, config, progress)
    files = {TOKENIZER: _record_of(folder / TOKENIZER)}
    parts: list[list[_Piece]] = []
    for number, selection in enumerate(selections):
        for kind, documents in ((TRAIN, selection.train), (HELD_OUT, selection.held_out)):
            stem = folder / _PIECES / f"{number}-{kind}"
            parts.append(list(_pieces(stem, selection.source.folder, documents)))
    every = [piece for part in parts for piece in part]
    _tokenize(every, (folder / TOKENIZER, vocabulary.mark, config.text_field), progress, workers)
    for number, part in enumerate(parts):
        name = f"{(TRAIN, HELD_OUT)[number % 2]}-{number // 2}.bin"
        files[name] = _join(folder / name, [piece.file for piece in part])
    progress("compress", 0.0)
    compressors = _bits_per_byte(selections, config.text_field)
    progress("compress", 1.0)
    record = CorpusRecord.of(
        settings,
        vocabulary,
        [_part(number, selections, files, vocabulary) for number in range(len(selections))],
        compressors,
        files,
    )
    for path in folder.iterdir():  # pieces, and what an earlier attempt left
        if path.name not in files:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write(folder / RECORD, [record.model_dump_json(indent=2).encode()])


def _part(
    number: int, selections: Sequence[Selection], files: dict[str, FileRecord], vocabulary: Vocabulary
) -> PartRecord:
    selection, width = selections[number], vocabulary.dtype.itemsize
    return PartRecord(
        # The same text is the same corpus wherever it lies; only several sources are told apart by name.
        name=selection.source.name if len(selections) > 1 else "text",
        num_train_tokens=files[f"{TRAIN}-{number}.bin"].num_bytes // width,
        num_held_out_tokens=files[f"{HELD_OUT}-{number}.bin"].num_bytes // width,
        num_train_bytes=sum(document.num_bytes for document in selection.train),
        num_held_out_bytes=sum(document.num_bytes for document in selection.held_out),
        num_train_documents=len(selection.train),
        num_undecodable=selection.num_undecodable,
        num_duplicates=selection.num_duplicates,
        held_out_names=[document.shown_name for document in selection.held_out],
    )


def _vocabulary(
    folder: Path, selections: Sequence[Selection], config: DataConfig, progress: Progress
) -> Vocabulary:
    path = folder / TOKENIZER
    if not path.exists():
        progress("train tokenizer", 0.0)
        texts = sample_texts(selections, _TOKENIZER_SAMPLE_BYTES, config.text_field)
        unfinished = path.with_suffix(".tmp")
        write(unfinished, [make_tokenizer(config, texts).to_str().encode()])
        unfinished.rename(path)
        progress("train tokenizer", 1.0)
    return load_vocabulary(path, mark_of(config, load_vocabulary(path, 0).tokenizer))


def _pieces(stem: Path, folder: Path, documents: Sequence[Document]) -> Iterator[_Piece]:
    held: list[Document] = []
    number = num_bytes = 0
    for document in documents:
        held.append(document)
        num_bytes += document.num_bytes
        if num_bytes >= PIECE_BYTES or document is documents[-1]:
            yield _Piece(stem.with_name(f"{stem.name}-{number:06d}"), folder, tuple(held))
            held, num_bytes, number = [], 0, number + 1


def _tokenize(pieces: Sequence[_Piece], how: tuple[Path, int, str], progress: Progress, workers: int) -> None:
    """Make the files of all pieces that have none yet.

    Args:
        how: tokenizer, mark, and the field of tables that holds the text.
    """
    total = sum(piece.num_bytes for piece in pieces)
    missing = [piece for piece in pieces if not piece.file.exists()]
    done = total - sum(piece.num_bytes for piece in missing)
    progress("tokenize", done / total)
    if workers == 1 or total < POOL_BYTES or len(missing) < 2:
        vocabulary = load_vocabulary(*how[:2])
        for piece in missing:
            _write_piece(piece, vocabulary, how[2])
            done += piece.num_bytes
            progress("tokenize", done / total)
        return
    with ProcessPoolExecutor(
        min(workers, len(missing)),
        mp_context=multiprocessing.get_context("spawn"),  # a forked tokenizer may hang
        initializer=_start_worker,
        initargs=how,
    ) as pool:
        running = {pool.submit(_work, piece): piece for piece in missing}
        try:
            for each in as_completed(running):
                each.result()
                done += running[each].num_bytes
                progress("tokenize", done / total)
        except BaseException as error:
            pool.shutdown(wait=True, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise WorkerError(
                    f"one of {min(workers, len(missing))} processes that tokenize was ended from outside",
                    rule=f"each needs memory for some hundred times {bytes_text(PIECE_BYTES)} of text",
                    fix="make the corpus with fewer, by sixfold data build --workers 1 --into FOLDER; "
                    "a run takes it by data.path = FOLDER",
                ) from error
            raise


_worker: tuple[Vocabulary, str] | None = None


def _start_worker(tokenizer: Path, mark: int, field: str) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process on each core is parallel enough
    # Ctrl-C comes to every process, and whoever waits for these would wait until their pieces are done.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _worker = load_vocabulary(tokenizer, mark), field


def _work(piece: _Piece) -> None:
    assert _worker is not None, "the pool starts its workers"
    _write_piece(piece, *_worker)


def _write_piece(piece: _Piece, vocabulary: Vocabulary, field: str) -> None:
    """Token ids of a piece, a mark before every document; the file appears when it is complete."""
    unfinished = piece.file.with_suffix(".tmp")
    write(unfinished, _token_blocks(piece, vocabulary, field))
    unfinished.rename(piece.file)


def _token_blocks(piece: _Piece, vocabulary: Vocabulary, field: str) -> Iterator[bytes]:
    runs = list(_runs(fetch(piece.folder, piece.documents, field)))
    encodings = vocabulary.encode_batch([text for _, text in runs])
    for (is_first, _), ids in zip(runs, encodings, strict=True):
        whole = [vocabulary.mark, *ids] if is_first else ids
        yield np.array(whole, dtype=vocabulary.dtype).tobytes()


def _runs(texts: Iterable[str]) -> Iterator[tuple[bool, str]]:
    """Each text as (is its first run, text), cut at a line end where it is very long."""
    for text in texts:
        start = 0
        while start < len(text):
            end = text.find("\n", start + _RUN_CHARS) + 1 or len(text)
            yield start == 0, text[start:end]
            start = end


def _join(path: Path, pieces: Sequence[Path]) -> FileRecord:
    """One file out of pieces, which stay until all files are made."""

    def blocks() -> Iterator[bytes]:
        for piece in pieces:
            with piece.open("rb") as file:
                yield from iter(lambda file=file: file.read(1 << 20), b"")  # type: ignore[misc]

    return write(path, blocks())


def _bits_per_byte(selections: Sequence[Selection], field: str) -> dict[str, float]:
    """Of general compressors on the held-out text; of none where it is too long for them."""
    if sum(each.num_bytes for part in selections for each in part.held_out) > COMPRESSED_BYTES:
        return {}
    text = "".join(
        text for part in selections for text in fetch(part.source.folder, part.held_out, field)
    ).encode()
    packed = {"gzip -9": gzip.compress(text, 9, mtime=0), "xz -9": lzma.compress(text, preset=9)}
    return {name: 8 * len(content) / len(text) for name, content in packed.items()}


def write(path: Path, blocks: Iterable[bytes]) -> FileRecord:
    """Write blocks to disk for good."""
    num_bytes = crc32 = 0
    with path.open("wb") as file:
        for block in blocks:
            file.write(block)
            num_bytes += len(block)
            crc32 = zlib.crc32(block, crc32)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(num_bytes=num_bytes, crc32=crc32)


def _record_of(path: Path) -> FileRecord:
    content = path.read_bytes()
    return FileRecord(num_bytes=len(content), crc32=zlib.crc32(content))


def sync(folder: Path) -> None:
    """Make names in a folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
