"""Which documents make a corpus: files found by pattern, drawn by a hash of their names, split in two.

Called by `corpus.prepare`. The draw depends on names and contents alone, never on the order in which
a file system lists them. Never writes, and never knows tokens.
"""

from __future__ import annotations

import difflib
import hashlib
import heapq
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn

from sixfold.base.errors import DataError
from sixfold.base.plugins import is_reference
from sixfold.config.tree import DataConfig
from sixfold.data.documents import TABLES, Document, digest_of, fetch, raise_unreadable, scan

Progress = Callable[[str, float], None]
"""Called with a phase ("read files", "tokenize", ...) and the part of it that is done, 0 to 1."""

_NOT_SOURCE = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Listed:
    """A file as its folder lists it: name relative to the source folder, size, time of change."""

    name: str
    num_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Source:
    """Files that are drawn from together: those of a folder, or one file; no two have the same name."""

    name: str
    folder: Path
    files: tuple[Listed, ...]


@dataclass(frozen=True)
class Selection:
    """The documents of one source, both parts ordered by name, and how many were left out."""

    source: Source
    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    num_undecodable: int
    num_duplicates: int


def places_of(config: DataConfig) -> list[tuple[str, Path]]:
    """(option that names it, path) of every source; the standard library where none is named."""
    if config.sources is not None:
        return [("data.sources", Path(each).expanduser()) for each in config.sources]
    path = config.path.expanduser() if config.path is not None else Path(sysconfig.get_path("stdlib"))
    return [("data.path", path)]


def find_sources(config: DataConfig) -> tuple[Source, ...]:
    """The sources that `data.path` or `data.sources` names, files listed.

    Links to files are followed, links to folders are not. In the standard library, packages that were
    installed on top of it do not count.

    Raises:
        DataError: a place does not exist, holds no file that matches, or is named twice.
    """
    left_out = _NOT_SOURCE if config.path is None and config.sources is None else frozenset[str]()
    places = places_of(config)
    _refuse_twice(places)
    names = _names_of([path for _, path in places])
    return tuple(
        _find(name, option, path, config, left_out)
        for name, (option, path) in zip(names, places, strict=True)
    )


def _refuse_twice(places: Sequence[tuple[str, Path]]) -> None:
    seen: set[str] = set()
    for option, path in places:
        place = os.path.realpath(path)
        if place in seen:
            raise DataError(
                f"{option} names {str(path)!r} twice",
                rule="every source is a place of its own: the same documents would count once all the same",
                fix="name it once; data.weights says how often a source is drawn from",
            )
        seen.add(place)


def _names_of(paths: Sequence[Path]) -> list[str]:
    """Of each path its last parts, as few as tell it from the others."""
    whole = [Path(os.path.abspath(path)) for path in paths]  # the working directory has a name, too

    def name_of(path: Path) -> str:
        for count in range(1, len(path.parts)):
            end = path.parts[-count:]
            if sum(other.parts[-count:] == end for other in whole) == 1:
                return "/".join(end)
        return str(path)

    return [name_of(path) for path in whole]


def _find(name: str, option: str, path: Path, config: DataConfig, left_out: frozenset[str]) -> Source:
    if os.path.isfile(path):  # unlike Path.is_file, no error where a parent is closed to us
        if path.suffix.lower() not in TABLES:
            _raise_single(option, path)
        stat = path.stat()
        return Source(name, path.parent, (Listed(path.name, stat.st_size, stat.st_mtime_ns),))
    if not os.path.isdir(path):
        _raise_missing(option, path)
    return Source(name, path, tuple(_list_files(path, config, left_out)))


def _list_files(folder: Path, config: DataConfig, left_out: frozenset[str]) -> list[Listed]:
    """All files below `folder` that match a pattern of `data.include`, ordered by name."""
    found: list[Listed] = []
    others: Counter[str] = Counter()
    for parent, folders, names in os.walk(folder, onerror=raise_unreadable):
        folders[:] = [name for name in folders if name not in left_out]
        for base in names:
            path = Path(parent, base)
            relative = path.relative_to(folder)
            if not any(PurePosixPath(relative).match(pattern) for pattern in config.include):
                others[relative.suffix] += 1
                continue
            try:
                stat = path.stat()
            except OSError as error:
                raise_unreadable(error)
            found.append(Listed(relative.as_posix(), stat.st_size, stat.st_mtime_ns))
    if not found:
        _raise_no_match(folder, config, others)
    return sorted(found, key=lambda listed: listed.name)


def select(
    sources: Sequence[Source], config: DataConfig, on_progress: Progress = lambda phase, done: None
) -> tuple[Selection, ...]:
    """Read the listed files and split the documents of each source.

    Files are visited in the order of a hash of their names, up to `data.max_mb` of text from each source;
    of what was taken the `data.held_out_documents` whose names have the smallest hashes are held out, the
    rest trains. So the held-out part of a folder of text files stays the same when the bound moves, and
    another file changes at most one of its members. Empty documents count for nothing; text that is not
    UTF-8, and copies of a document already taken, are counted and left out.
    """
    seen: set[str] = set()
    total = max(1, sum(listed.num_bytes for source in sources for listed in source.files))
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        on_progress("read files", done / total)

    selections = tuple(_select(source, config, seen, advance) for source in sources)
    on_progress("read files", 1.0)
    return selections


def _select(source: Source, config: DataConfig, seen: set[str], advance: Callable[[int], None]) -> Selection:
    bound = float("inf") if config.max_mb is None else config.max_mb * 1e6
    taken: list[Document] = []
    num_bytes = num_undecodable = num_duplicates = 0
    for document, content in _documents(source, config.text_field, advance):
        if not content:
            continue
        if not _is_text(content):
            num_undecodable += 1
            continue
        if document.digest in seen:
            num_duplicates += 1
            continue
        if num_bytes + len(content) > bound:
            break
        taken.append(document)
        seen.add(document.digest)
        num_bytes += len(content)
    if len(taken) <= config.held_out_documents:
        _raise_too_few(source.folder, config, len(taken))
    held_out = set(heapq.nsmallest(config.held_out_documents, taken, key=lambda each: _draw(each.name)))
    return Selection(
        source=source,
        train=_ordered(document for document in taken if document not in held_out),
        held_out=_ordered(held_out),
        num_undecodable=num_undecodable,
        num_duplicates=num_duplicates,
    )


def _ordered(documents: Iterable[Document]) -> tuple[Document, ...]:
    return tuple(sorted(documents, key=lambda document: (document.file, document.place or 0)))


def _documents(
    source: Source, field: str, advance: Callable[[int], None]
) -> Iterator[tuple[Document, bytes]]:
    for listed in sorted(source.files, key=lambda listed: _draw(listed.name)):
        for place, content in scan(source.folder / listed.name, field):
            yield Document(listed.name, place, len(content), digest_of(content)), content
        advance(listed.num_bytes)


def sample_texts(selections: Sequence[Selection], max_bytes: int, field: str) -> Iterator[str]:
    """Training documents of all sources in drawn order, up to `max_bytes`, at least one of each."""
    for selection in selections:
        sample: list[Document] = []
        num_bytes = 0
        for document in sorted(selection.train, key=lambda document: _draw(document.name)):
            sample.append(document)
            num_bytes += document.num_bytes
            if num_bytes >= max_bytes / len(selections):
                break
        yield from fetch(selection.source.folder, sample, field)


def _draw(name: str) -> bytes:
    # A name that is not valid text comes from the file system with escaped bytes.
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _is_text(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _raise_single(option: str, path: Path) -> NoReturn:
    pattern = f"*{path.suffix}" if path.suffix else path.name
    raise DataError(
        f"{option} = {str(path)!r} is a file",
        rule=f"a source is a folder, or a file of many documents ({', '.join(TABLES)}); data.include says "
        "which files of a folder are taken",
        fix=f"set {option} = {str(path.parent)!r} and data.include = [{pattern!r}]",
    )


def _raise_missing(option: str, folder: Path) -> NoReturn:
    if is_reference(str(folder)):
        raise DataError(
            f"{option} = {str(folder)!r} is code, not text",
            rule="a source that is a function is run once, by `sixfold data build`",
            fix=f"sixfold data build {folder} --into CORPUS, then set data.path to that folder",
        )
    missing = folder.absolute()
    while not os.path.isdir(missing.parent):
        missing = missing.parent
    is_open = os.access(missing.parent, os.R_OK | os.X_OK)
    siblings = sorted(entry.name for entry in missing.parent.iterdir() if entry.is_dir()) if is_open else []
    near = difflib.get_close_matches(missing.name, siblings, n=3)
    shown = ", ".join(near or siblings[:5]) or "no folder at all"
    fix = (
        f"set {option} = {str(missing.with_name(near[0]))!r}" if near else f"set {option} to one that exists"
    )
    raise DataError(
        f"{option} = {str(folder)!r} does not exist; {missing.parent} has {shown}",
        rule=f"{option} is an existing folder of text files, or a file of many documents",
        fix=f"{fix}, or leave it out to use the standard library of this Python",
    )


def _raise_no_match(folder: Path, config: DataConfig, others: Counter[str]) -> NoReturn:
    kinds = [(f"*{suffix}" if suffix else "*", count) for suffix, count in others.most_common(5)]
    holds = ", ".join(f"{count} {pattern}" for pattern, count in kinds) or "no files"
    if kinds:
        fix = f"set data.include = [{kinds[0][0]!r}]"
    else:
        fix = "set data.path to a folder with text files in it"
    raise DataError(
        f"no file below {folder} matches data.include = {list(config.include)}; it holds {holds}",
        rule="data.include names at least one file, at any depth",
        fix=fix,
    )


def _raise_too_few(folder: Path, config: DataConfig, num_documents: int) -> NoReturn:
    bound = f" within data.max_mb = {config.max_mb:g}" if config.max_mb is not None else ""
    if num_documents >= 2:
        fix = f"set data.held_out_documents = {max(1, num_documents // 10)}"
    elif config.max_mb is not None:
        fix = "raise data.max_mb or leave it out"
    else:
        fix = "split the text into several files, or name more of them in data.include"
    raise DataError(
        f"{folder} gives {num_documents} different documents{bound}; data.held_out_documents = "
        f"{config.held_out_documents}",
        rule="the held-out documents of a source are kept aside and at least one more is left to train on",
        fix=fix,
    )
