"""Which text files make a corpus: found by pattern, drawn by a hash of their names, split in two.

Called by `corpus.prepare`. The draw depends on names and contents alone, never on the order in which
a file system lists them. Never writes, and never knows tokens.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn

from sixfold.base.errors import DataError
from sixfold.config.tree import DataConfig

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
class Document:
    """A file that was read: name relative to the source folder, UTF-8 bytes, hash of its content."""

    name: str
    num_bytes: int
    digest: str

    @property
    def shown_name(self) -> str:
        """The name as valid text; a file name need not be."""
        return self.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


@dataclass(frozen=True)
class Selection:
    """The documents of a corpus, both parts ordered by name, and how many files were left out."""

    folder: Path
    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    num_undecodable: int
    num_duplicates: int


def source_folder(config: DataConfig) -> Path:
    """The folder that `data.path` names, or this Python's standard library; DataError if it is none."""
    if config.path is None:
        return Path(sysconfig.get_path("stdlib"))
    folder = config.path.expanduser()
    if os.path.isfile(folder):  # unlike Path.is_file, no error where a parent is closed to us
        pattern = f"*{folder.suffix}" if folder.suffix else folder.name
        raise DataError(
            f"data.path = {str(folder)!r} is a file",
            rule="data.path is a folder; data.include says which of its files are taken",
            fix=f"set data.path = {str(folder.parent)!r} and data.include = [{pattern!r}]",
        )
    if not os.path.isdir(folder):
        _raise_missing(folder)
    return folder


def list_files(folder: Path, config: DataConfig) -> list[Listed]:
    """All files below `folder` that match a pattern of `data.include`, ordered by name.

    Links to files are followed, links to folders are not. In the standard library, packages that were
    installed on top of it do not count. Raises DataError when nothing matches.
    """
    left_out = _NOT_SOURCE if config.path is None else frozenset[str]()
    found: list[Listed] = []
    others: Counter[str] = Counter()
    for parent, folders, names in os.walk(folder, onerror=_raise_unreadable):
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
                _raise_unreadable(error)
            found.append(Listed(relative.as_posix(), stat.st_size, stat.st_mtime_ns))
    if not found:
        _raise_no_match(folder, config, others)
    return sorted(found, key=lambda listed: listed.name)


def select(folder: Path, listing: list[Listed], config: DataConfig, on_progress: Progress) -> Selection:
    """Read the listed files and split them.

    Files are visited in the order of a hash of their names: the first `data.held_out_files` documents
    are held out, the rest train, up to `data.max_mb` altogether. So the held-out part stays the same
    when the bound moves, and another file changes at most one of its members. Empty files count for
    nothing; text that is not UTF-8, and copies of a document already taken, are counted and left out.
    """
    bound = float("inf") if config.max_mb is None else config.max_mb * 1e6
    taken: list[Document] = []
    seen: set[str] = set()
    num_bytes = num_undecodable = num_duplicates = 0
    for position, listed in enumerate(sorted(listing, key=lambda listed: _draw(listed.name))):
        if position % 64 == 0:
            on_progress("read files", position / len(listing))
        content = _read_bytes(folder / listed.name)
        document = Document(listed.name, len(content), _digest(content))
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
    if len(taken) <= config.held_out_files:
        _raise_too_few(folder, config, len(taken))
    on_progress("read files", 1.0)
    border = config.held_out_files
    return Selection(
        folder=folder,
        train=tuple(sorted(taken[border:], key=lambda document: document.name)),
        held_out=tuple(sorted(taken[:border], key=lambda document: document.name)),
        num_undecodable=num_undecodable,
        num_duplicates=num_duplicates,
    )


def read_text(folder: Path, document: Document) -> str:
    """The text of a selected document; DataError if it is no longer what was selected."""
    content = _read_bytes(folder / document.name)
    if _digest(content) != document.digest:
        raise DataError(
            f"{folder / document.name} changed while the corpus was built",
            rule="a corpus is named after the exact content of its files",
            fix="start again once nothing writes into the folder",
        )
    return content.decode("utf-8")


def training_sample(selection: Selection, max_bytes: int) -> tuple[Document, ...]:
    """Training documents in drawn order until `max_bytes` are reached, at least one."""
    sample: list[Document] = []
    num_bytes = 0
    for document in sorted(selection.train, key=lambda document: _draw(document.name)):
        sample.append(document)
        num_bytes += document.num_bytes
        if num_bytes >= max_bytes:
            break
    return tuple(sample)


def _draw(name: str) -> bytes:
    # A name that is not valid text comes from the file system with escaped bytes.
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _is_text(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        _raise_unreadable(error)


def _raise_unreadable(error: OSError) -> NoReturn:
    raise DataError(
        f"{error.filename} cannot be read: {error.strerror}",
        rule="every file that data.include matches below data.path is read",
        fix="make it readable or remove it, or narrow data.include so that it is left out",
    ) from error


def _raise_missing(folder: Path) -> NoReturn:
    missing = folder.absolute()
    while not os.path.isdir(missing.parent):
        missing = missing.parent
    is_open = os.access(missing.parent, os.R_OK | os.X_OK)
    siblings = sorted(entry.name for entry in missing.parent.iterdir() if entry.is_dir()) if is_open else []
    near = difflib.get_close_matches(missing.name, siblings, n=3)
    shown = ", ".join(near or siblings[:5]) or "no folder at all"
    fix = (
        f"set data.path = {str(missing.with_name(near[0]))!r}" if near else "set data.path to one that exists"
    )
    raise DataError(
        f"data.path = {str(folder)!r} does not exist; {missing.parent} has {shown}",
        rule="data.path is an existing folder of text files",
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
        fix = f"set data.held_out_files = {max(1, num_documents // 10)}"
    elif config.max_mb is not None:
        fix = "raise data.max_mb or leave it out"
    else:
        fix = "split the text into several files, or name more of them in data.include"
    raise DataError(
        f"{folder} gives {num_documents} different text files{bound}; data.held_out_files = "
        f"{config.held_out_files}",
        rule="the held-out files are kept aside and at least one more file is left to train on",
        fix=fix,
    )
