"""Documents out of files: a text file is one, each row of a JSON-lines or parquet file is one.

Called by `sources` to find documents and by `build` to read them again. The suffix of a file tells its
form. It chooses nothing, writes nothing, and never knows tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from sixfold.base.errors import DataError

TABLES = (".jsonl", ".parquet")
"""Suffixes of files that hold many documents."""

Found = tuple[int | None, bytes]
"""Where a document stands in its file, and its bytes."""


@dataclass(frozen=True, slots=True)
class Document:
    """A document that was read.

    Args:
        file: relative to its source's folder.
        place: the byte in a JSON-lines file or the row of a parquet file at which it stands; None where it
            is the whole file.
        num_bytes: of its UTF-8 text.
        digest: hash of its content.
    """

    file: str
    place: int | None
    num_bytes: int
    digest: str

    @property
    def name(self) -> str:
        """Unique within its source."""
        return self.file if self.place is None else f"{self.file}:{self.place}"

    @property
    def shown_name(self) -> str:
        """The name as valid text; a file name need not be."""
        return self.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def scan(path: Path, field: str) -> Iterator[Found]:
    """Every document of a file, in order.

    Args:
        field: which column or key of a table holds the text.

    Raises:
        DataError: the file cannot be read, or a row has no such text.
    """
    try:
        yield from _SCANNERS.get(path.suffix.lower(), _scan_text)(path, field)
    except OSError as error:
        raise_unreadable(error)


def fetch(folder: Path, documents: Sequence[Document], field: str) -> Iterator[str]:
    """The texts of documents of one folder, in the order given.

    Raises:
        DataError: one of them is no longer what was found.
    """
    start = 0
    while start < len(documents):
        stop = start + 1
        while stop < len(documents) and documents[stop].file == documents[start].file:
            stop += 1
        yield from _fetch_file(folder, documents[start:stop], field)
        start = stop


def _fetch_file(folder: Path, documents: Sequence[Document], field: str) -> Iterator[str]:
    path = folder / documents[0].file
    try:
        places = [document.place or 0 for document in documents]
        contents = _FETCHERS.get(path.suffix.lower(), _fetch_text)(path, places, field)
        for document, content in zip(documents, contents, strict=True):
            if digest_of(content) != document.digest:
                _raise_changed(folder / document.name)
            yield content.decode("utf-8")
    except OSError as error:
        raise_unreadable(error)


def digest_of(content: bytes) -> str:
    """What documents are told apart by."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _scan_text(path: Path, field: str) -> Iterator[Found]:
    yield None, path.read_bytes()


def _fetch_text(path: Path, places: Sequence[int], field: str) -> Iterator[bytes]:
    yield path.read_bytes()


def _scan_lines(path: Path, field: str) -> Iterator[Found]:
    with path.open("rb") as file:
        place = 0
        for number, line in enumerate(file, 1):
            if line.strip():
                yield place, _text_of(line, field, f"{path}:{number}")
            place += len(line)


def _fetch_lines(path: Path, places: Sequence[int], field: str) -> Iterator[bytes]:
    with path.open("rb") as file:
        for place in places:
            file.seek(place)
            yield _text_of(file.readline(), field, f"{path}, byte {place}")


def _text_of(line: bytes, field: str, where: str) -> bytes:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"{where} is not JSON: {error}",
            rule="each line of a .jsonl file is one JSON object",
            fix="correct or remove the line",
        ) from error
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        _raise_no_text(where, field, has)
    return text.encode("utf-8", "surrogatepass")


def _scan_parquet(path: Path, field: str) -> Iterator[Found]:
    yield from enumerate(_column(path, field))


def _fetch_parquet(path: Path, places: Sequence[int], field: str) -> Iterator[bytes]:
    wanted = iter(places)
    place = next(wanted, None)
    for row, text in enumerate(_column(path, field)):
        if row == place:
            yield text
            place = next(wanted, None)
            if place is None:
                return


def _column(path: Path, field: str) -> Iterator[bytes]:
    try:
        # Heavy, and an extra: only who has such files needs it.
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(
            f"{path} is a parquet file and pyarrow is not installed",
            rule="parquet files are read by pyarrow, which comes with the extra `data`",
            fix="pip install 'sixfold[data]'",
        ) from error
    try:
        file: Any = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if field not in names:
            _raise_no_text(str(path), field, ", ".join(names))
        for batch in file.iter_batches(batch_size=1024, columns=[field]):
            for text in batch.column(0).to_pylist():
                if not isinstance(text, str):
                    _raise_no_text(str(path), field, f"a row with {text!r}")
                yield text.encode()
    except pyarrow.ArrowInvalid as error:
        raise DataError(
            f"{path} cannot be read as parquet: {error}",
            rule="a .parquet file is whole",
            fix="write or download the file again",
        ) from error


_SCANNERS: dict[str, Callable[[Path, str], Iterator[Found]]] = {
    ".jsonl": _scan_lines,
    ".parquet": _scan_parquet,
}
_FETCHERS: dict[str, Callable[[Path, Sequence[int], str], Iterator[bytes]]] = {
    ".jsonl": _fetch_lines,
    ".parquet": _fetch_parquet,
}


def raise_unreadable(error: OSError) -> NoReturn:
    """A file of a source is there and cannot be read."""
    raise DataError(
        f"{error.filename} cannot be read: {error.strerror}",
        rule="every file that data.include matches below data.path is read",
        fix="make it readable or remove it, or narrow data.include so that it is left out",
    ) from error


def _raise_no_text(where: str, field: str, has: str) -> NoReturn:
    raise DataError(
        f"{where} has no text under {field!r}; it has {has}",
        rule="data.text_field names what holds the text in every row",
        fix=f"set data.text_field = {has.split(', ')[0]!r} or whichever holds the text",
    )


def _raise_changed(path: Path) -> NoReturn:
    raise DataError(
        f"{path} changed while the corpus was built",
        rule="a corpus is named after the exact content of its files",
        fix="start again once nothing writes into the folder",
    )
