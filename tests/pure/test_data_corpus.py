"""Preparing and opening corpora, on folders of a few small files."""

from __future__ import annotations

import errno
import gzip
import json
import lzma
import multiprocessing
import os
import shutil
import signal
from itertools import pairwise
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from sixfold.base.errors import DataError, WorkerError
from sixfold.config.tree import DataConfig
from sixfold.data import build
from sixfold.data import corpus as corpora
from sixfold.data.corpus import Corpus, prepare, prepare_at
from sixfold.data.tokenizer import DOCUMENT_MARK, train_tokenizer

WORDS = ["the", "order", "of", "samples", "never", "follows", "from", "ranks"]


def text_of(number: int) -> str:
    return "".join(
        f"{WORDS[(number * 7 + line * line) % len(WORDS)]} = {number + line}\n" for line in range(40)
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    for number in range(20):
        path = folder / ("deep/er" if number % 3 else "") / f"file{number:02d}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text_of(number))
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """One small corpus for the tests that only read it."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(6):
        (folder / f"{number}.py").write_text(text_of(number))
    return prepare(asked(folder, held_out_documents=2, cache=folder / "cache"))


def asked(source: Path, **changes: object) -> DataConfig:
    settings = {"path": source, "vocab_size": 300, "held_out_documents": 5, "cache": source.parent / "cache"}
    return DataConfig.model_validate({**settings, **changes})


class Phases(list[str]):
    """Records what prepare does."""

    def __call__(self, phase: str, done: float) -> None:
        assert 0 <= done <= 1
        if phase not in self:
            self.append(phase)


BUILDING = ["read files", "train tokenizer", "tokenize", "compress"]


def relative(source: Path) -> dict[str, str]:
    return {path.relative_to(source).as_posix(): path.read_text() for path in source.rglob("*.py")}


def documents(corpus: Corpus, tokens: np.ndarray) -> list[str]:
    assert tokens[0] == corpus.document_mark
    starts = [*np.flatnonzero(tokens == corpus.document_mark).tolist(), len(tokens)]
    return [corpus.decode(tokens[a + 1 : b].tolist()) for a, b in pairwise(starts)]


def test_the_token_files_are_the_text(source: Path) -> None:
    corpus = prepare(asked(source))
    ((part,), record) = corpus.parts, corpus.record.parts[0]
    files = relative(source)
    held_out = [files.pop(name) for name in record.held_out_names]
    assert len(held_out) == corpus.num_held_out_documents == 5
    assert record.held_out_names == sorted(record.held_out_names)
    assert documents(corpus, part.held_out) == held_out
    assert documents(corpus, part.train) == [files[name] for name in sorted(files)]
    assert record.num_train_documents == 15
    assert record.num_train_bytes == sum(len(text.encode()) for text in files.values())
    assert corpus.num_held_out_bytes == sum(len(text.encode()) for text in held_out)
    assert corpus.vocab_size == corpus.vocabulary.size == 300
    assert part.train.dtype == np.uint16
    assert part.train.max() < 300
    assert len(part.train) == corpus.num_train_tokens < record.num_train_bytes / 1.5
    with pytest.raises(ValueError, match="read-only"):
        part.train[0] = 1


def test_compressors_see_the_held_out_bytes(source: Path) -> None:
    corpus = prepare(asked(source))
    files = relative(source)
    content = "".join(files[name] for name in corpus.record.parts[0].held_out_names).encode()
    assert corpus.compressors == {
        "gzip -9": 8 * len(gzip.compress(content, 9, mtime=0)) / len(content),
        "xz -9": 8 * len(lzma.compress(content, preset=9)) / len(content),
    }


@given(text=st.text())
def test_any_text_survives(corpus: Corpus, text: str) -> None:
    ids = corpus.encode(text)
    assert corpus.decode(ids) == text
    assert all(0 <= token < corpus.vocab_size for token in ids)


def test_text_that_spells_the_mark_is_text(corpus: Corpus) -> None:
    ids = corpus.encode(f"a {DOCUMENT_MARK} b")
    assert corpus.document_mark not in ids
    assert corpus.decode(ids) == f"a {DOCUMENT_MARK} b"
    assert corpus.decode([corpus.document_mark]) == DOCUMENT_MARK


def test_a_document_may_spell_the_mark_too(source: Path) -> None:
    (source / "file00.py").write_text(f"x = '{DOCUMENT_MARK}'\n" * 3)
    corpus = prepare(asked(source))
    marks = np.count_nonzero(corpus.parts[0].train == corpus.document_mark)
    marks += np.count_nonzero(corpus.parts[0].held_out == corpus.document_mark)
    assert marks == 20


def test_the_same_text_gives_the_same_files(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "copy")
    first = prepare(asked(source))
    second = prepare(asked(tmp_path / "copy", cache=tmp_path / "other"))
    assert first.folder != second.folder
    assert first.folder.name == second.folder.name
    for path in first.folder.iterdir():
        assert path.read_bytes() == (second.folder / path.name).read_bytes(), path.name


def test_long_documents_are_cut_for_the_tokenizer_only(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sixfold.data.build._RUN_CHARS", 50)
    monkeypatch.setattr("sixfold.data.build.PIECE_BYTES", 120)
    corpus = prepare(asked(source))
    files = relative(source)
    assert documents(corpus, corpus.parts[0].held_out) == [
        files[name] for name in corpus.record.parts[0].held_out_names
    ]


def test_a_small_vocabulary_is_reported_as_it_is(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.py").write_text("ab" * (number + 1))
    corpus = prepare(asked(tmp_path, vocab_size=4096, held_out_documents=1, cache=tmp_path / "cache"))
    assert 257 <= corpus.vocab_size < 270
    assert corpus.vocabulary.size == corpus.vocab_size


def test_a_known_corpus_is_not_read_again(source: Path) -> None:
    phases = Phases()
    first = prepare(asked(source), on_progress=phases)
    assert phases == BUILDING
    phases.clear()
    again = prepare(asked(source, sequence_length=7), on_progress=phases)
    assert phases == []
    assert again.folder == first.folder


def test_new_times_are_read_but_not_built_again(source: Path) -> None:
    first = prepare(asked(source))
    os.utime(source / "file00.py", (1, 1))
    phases = Phases()
    assert prepare(asked(source), on_progress=phases).folder == first.folder
    assert phases == ["read files"]


@pytest.mark.parametrize("change", ["content", "vocab_size", "held_out_documents", "max_mb"])
def test_what_matters_makes_another_corpus(source: Path, change: str) -> None:
    first = prepare(asked(source))
    if change == "content":
        (source / "file00.py").write_text("changed = True\n")
        second = prepare(asked(source))
    else:
        second = prepare(
            asked(source, **{change: {"vocab_size": 280, "held_out_documents": 4, "max_mb": 0.008}[change]})
        )
    assert second.folder != first.folder
    Corpus(first.folder).verify()


def prepare_together(barrier: Barrier, config: DataConfig, results: Queue[tuple[str, list[str]]]) -> None:
    phases = Phases()
    barrier.wait(timeout=60)
    folder = prepare(config, on_progress=phases).folder
    results.put((str(folder), list(phases)))


def test_processes_at_once_build_once(source: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(3), context.Queue()
    processes = [
        context.Process(target=prepare_together, args=(barrier, asked(source), queue)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert len({folder for folder, _ in results}) == 1
    assert sum("compress" in phases for _, phases in results) == 1
    Corpus(Path(results[0][0])).verify()


def folders_in(cache: Path) -> set[str]:
    return {path.name for path in (cache / "corpora").iterdir() if path.is_dir()}


def test_a_build_that_was_broken_off_goes_on(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sixfold.data.build.PIECE_BYTES", 1000)
    written: list[str] = []
    plain = build._write_piece

    def write_piece(piece: build._Piece, *how: object) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        plain(piece, *how)  # type: ignore[arg-type]
        written.append(piece.file.name)

    monkeypatch.setattr(build, "_write_piece", write_piece)
    with pytest.raises(KeyboardInterrupt):
        prepare(asked(source))
    assert written == ["0-train-000000", "0-train-000001", "0-train-000002"]
    monkeypatch.setattr(build, "_write_piece", plain)
    trained: list[int] = []
    monkeypatch.setattr(build, "make_tokenizer", lambda *_: trained.append(1))
    corpus = prepare(asked(source))
    corpus.verify()
    assert not trained, "the tokenizer of the first attempt is used"
    files = relative(source)
    held_out = [files.pop(name) for name in corpus.record.parts[0].held_out_names]
    assert documents(corpus, corpus.parts[0].train) == [files[name] for name in sorted(files)]
    assert documents(corpus, corpus.parts[0].held_out) == held_out
    assert folders_in(source.parent / "cache") == {"known", corpus.folder.name}


def test_processes_make_the_same_files(source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sixfold.data.build.PIECE_BYTES", 1000)
    alone = prepare_at(tmp_path / "alone", asked(source), on_progress=Phases(), workers=1)
    monkeypatch.setattr("sixfold.data.build.POOL_BYTES", 0)
    pooled = prepare_at(tmp_path / "pooled", asked(source), on_progress=Phases(), workers=2)
    for path in alone.folder.iterdir():
        assert path.read_bytes() == (pooled.folder / path.name).read_bytes(), path.name
    assert {path.name for path in tmp_path.iterdir()} == {"text", "alone", "pooled"}


def test_a_full_disk_is_said_and_freed(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left"):
        prepare(asked(source))
    assert folders_in(source.parent / "cache") == {"known"}


def test_processes_that_die_are_told_and_ctrl_c_ends_them_at_once(
    source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pieces = [build._Piece(tmp_path / name, source, ()) for name in ("one", "two")]
    monkeypatch.setattr(build, "POOL_BYTES", -1)
    monkeypatch.setattr(build._Piece, "num_bytes", 1)
    with pytest.raises(WorkerError, match="one of 2 processes that tokenize was ended") as caught:
        build._tokenize(pieces, (tmp_path / "absent", 0, "text"), Phases(), workers=2)
    assert "sixfold data build --workers 1 --into" in caught.value.fix, "a run has no such option"
    monkeypatch.setattr(build, "_worker", None)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    before = signal.getsignal(signal.SIGINT)
    try:
        build._start_worker(prepare(asked(source)).folder / "tokenizer.json", 0, "text")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("stops", ["fsync", "the key of the pieces"])
def test_a_full_disk_leaves_nothing_beside_the_folder_of_a_corpus(
    source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stops: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync") if stops == "fsync" else (Path, "write_text")), full)
    with pytest.raises(DataError, match="No space left"):
        prepare_at(tmp_path / "corpus", asked(source), on_progress=Phases(), workers=1)
    left = {path.name: path.stat().st_size for path in tmp_path.iterdir() if path.name != "text"}
    assert left == {"corpus.lock": 0}, "who waits for it and who comes later see the same one"


@pytest.mark.parametrize("others", [{}, {"vocab_size": 280}])
def test_a_build_that_waited_for_another_takes_what_that_has_built(
    source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, others: dict[str, object]
) -> None:
    folder, phases = tmp_path / "corpus", Phases()

    class Waiting(FileLock):
        """Somebody else has it first, and builds."""

        def __enter__(self) -> Waiting:
            monkeypatch.setattr(corpora, "FileLock", FileLock)
            prepare_at(folder, asked(source, **others), on_progress=Phases(), workers=1)
            return super().__enter__()

    monkeypatch.setattr(corpora, "FileLock", Waiting)
    if others:
        with pytest.raises(DataError, match="holds something else than these texts under these settings"):
            prepare_at(folder, asked(source), on_progress=phases, workers=1)
    else:
        prepare_at(folder, asked(source), on_progress=phases, workers=1).verify()
    assert "tokenize" not in phases
    assert {path.name for path in tmp_path.iterdir()} == {"text", "corpus"}


def test_a_place_that_is_taken_is_told_before_any_text_is_read(source: Path, tmp_path: Path) -> None:
    taken, phases = tmp_path / "taken", Phases()
    taken.write_text("notes")
    with pytest.raises(DataError, match="taken exists and is no corpus"):
        prepare_at(taken, asked(source), on_progress=phases, workers=1)
    assert not phases


@pytest.mark.parametrize("name", ["train-0.bin", "held_out-0.bin", "tokenizer.json", "corpus.json"])
def test_a_truncated_file_is_refused_by_name(source: Path, name: str) -> None:
    corpus = prepare(asked(source))
    path = corpus.folder / name
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=name) as caught:
        prepare(asked(source))
    assert str(corpus.folder) in caught.value.fix
    path.unlink()
    with pytest.raises(DataError, match=name):
        prepare(asked(source))
    shutil.rmtree(corpus.folder)  # the fix
    prepare(asked(source)).verify()


@pytest.mark.parametrize("name", ["train-0.bin", "held_out-0.bin", "tokenizer.json"])
def test_a_flipped_bit_is_found_by_verify(source: Path, name: str) -> None:
    path = prepare(asked(source)).folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} is damaged: crc32"):
        prepare(asked(source)).verify()


def test_another_format_is_refused(source: Path) -> None:
    path = prepare(asked(source)).folder / "corpus.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(DataError, match="format 99"):
        prepare(asked(source))


def test_a_tokenizer_that_is_none_is_refused(source: Path) -> None:
    corpus = prepare(asked(source))
    path = corpus.folder / "tokenizer.json"
    path.write_text("{" * path.stat().st_size)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        prepare(asked(source)).encode("text")


def test_a_cache_that_cannot_be_written_says_so(source: Path, tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("a file")
    with pytest.raises(DataError, match="cannot be written") as caught:
        prepare(asked(source, cache=tmp_path / "occupied"))
    assert "data.cache" in caught.value.fix


def test_a_corpus_that_is_built_is_opened_as_it_is(source: Path, tmp_path: Path) -> None:
    config = asked(source, tokenizer="bytes", vocab_size=None)
    built = prepare_at(tmp_path / "corpus", config, on_progress=Phases(), workers=1)
    assert built.vocab_size == 257
    assert prepare(DataConfig(path=built.folder)).folder == built.folder
    assert (
        prepare(DataConfig(path=built.folder, tokenizer="bytes", held_out_documents=5)).folder == built.folder
    )
    assert prepare(DataConfig(path=built.folder, vocab_size=None, max_mb=None)).folder == built.folder
    for other in (7, DataConfig().held_out_documents):
        with pytest.raises(DataError, match=rf"data\.held_out_documents = {other}.* built with 5"):
            prepare(DataConfig(path=built.folder, held_out_documents=other))
    with pytest.raises(DataError, match=r"data\.tokenizer = 'bpe'.* built with 'bytes'"):
        prepare(DataConfig(path=built.folder, tokenizer="bpe"))
    again = prepare_at(tmp_path / "corpus", config, on_progress=Phases(), workers=1)
    assert again.folder == built.folder
    with pytest.raises(DataError, match="holds something else"):
        prepare_at(tmp_path / "corpus", asked(source), on_progress=Phases(), workers=1)


def test_several_sources_are_parts_of_one_corpus(source: Path, tmp_path: Path) -> None:
    lines = tmp_path / "more.jsonl"
    lines.write_text("".join(json.dumps({"text": f"line {n} of more\n"}) + "\n" for n in range(12)))
    corpus = prepare(asked(source, path=None, sources=(str(source), str(lines)), held_out_documents=3))
    corpus.verify()
    assert [part.record.name for part in corpus.parts] == ["text", "more.jsonl"]
    assert len(documents(corpus, corpus.parts[1].train)) == 9
    assert sorted(documents(corpus, corpus.parts[1].held_out))[0].startswith("line ")
    assert corpus.num_held_out_documents == 6


def test_sources_of_other_names_are_another_corpus(source: Path, tmp_path: Path) -> None:
    """Of the same texts: its record and its evaluations speak of them by name."""
    (tmp_path / "more.jsonl").write_text(
        "".join(json.dumps({"text": f"line {n}\n"}) + "\n" for n in range(12))
    )
    (tmp_path / "another").symlink_to(source)
    for name in (source.name, "another"):
        both = (str(tmp_path / name), str(tmp_path / "more.jsonl"))
        corpus = prepare(asked(source, path=None, sources=both, tokenizer="bytes", vocab_size=None))
        assert [part.name for part in corpus.record.parts] == [name, "more.jsonl"]


def test_a_tokenizer_of_others(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    theirs = train_tokenizer([text_of(1)], 280)
    theirs.add_tokens(["<|im_end|>"])
    theirs.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    corpus = prepare(asked(source, tokenizer=str(folder), vocab_size=None))
    assert corpus.document_mark == theirs.token_to_id("<|im_end|>") == corpus.parts[0].train[0]
    assert corpus.decode(corpus.encode("= 12\n")) == "= 12\n"
    with pytest.raises(DataError, match="there is no file"):
        prepare(asked(source, tokenizer=str(tmp_path / "nowhere"), vocab_size=None))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be loaded as a tokenizer"):
        prepare(asked(source, tokenizer=str(folder), vocab_size=None))
