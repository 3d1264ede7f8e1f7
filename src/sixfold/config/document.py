"""Reads a TOML, YAML or JSON file into entries that remember their line and their duplicates.

Called by the loader only. Values come from the formats' own parsers; what this adds is where each
key stands. It knows nothing of the configuration tree and judges nothing but syntax.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

SUFFIXES = (".toml", ".yaml", ".yml", ".json")

_DEPTH = 2
"""The configuration tree is two levels deep; below that a value is only ever shown in an error."""


@dataclass(frozen=True)
class Entry:
    """One `key = value`; the key may be dotted, the value may be a `Table`."""

    key: str
    value: object
    place: str


@dataclass(frozen=True)
class Table:
    """Entries in the order of the file, duplicates included."""

    entries: tuple[Entry, ...] = ()

    def plain(self) -> dict[str, object]:
        """The table as a dictionary, for where it stands in the place of a value."""
        return {entry.key: _plain(entry.value) for entry in self.entries}


def _plain(value: object) -> object:
    return value.plain() if isinstance(value, Table) else value


class Malformed(Exception):
    """A file that its format's parser refuses; the loader turns it into a listed problem."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line, self.message = line, message


Place = Callable[[int], str]


def read_document(text: str, suffix: str, place: Place) -> Table:
    """Parses the text of a file.

    Args:
        text: its content, with any kind of line ends.
        suffix: one of SUFFIXES.
        place: names a line, for example `my.toml:12` for 12.

    Raises:
        Malformed: the text is not a document of this format, or its top is not a table.
    """
    text = text.replace("\r\n", "\n")
    readers = {".toml": _read_toml, ".json": _read_json, ".yaml": _read_yaml, ".yml": _read_yaml}
    try:
        return readers[suffix](text, place)
    except (RecursionError, ValueError) as fault:  # depth, or a number or date no parser will make
        raise Malformed(1, f"not readable as a whole: {fault}") from None


# TOML. The standard parser tells no lines, so the text is cut into statements: from a line that
# opens one, lines are added until the parser accepts them. Its keys and values are then the
# parser's own, whatever the quoting; the whole text is parsed once more as the final judge.


def _read_toml(text: str, place: Place) -> Table:
    entries: list[Entry] = []
    section = ""
    for line, is_header, statement in _statements(text.split("\n")):
        key, value = _descend(statement)
        if is_header:
            section = key + "."
            entries.append(Entry(key, Table() if value == {} else value, place(line)))
        else:
            entries.append(Entry(section + key, value, place(line)))
    if len({entry.key for entry in entries}) == len(entries):  # duplicates are the loader's to report
        try:
            tomllib.loads(text)
        except tomllib.TOMLDecodeError as fault:
            raise _toml_fault(fault, offset=0) from None
    return Table(tuple(entries))


def _statements(lines: list[str]) -> Iterator[tuple[int, bool, dict[str, Any]]]:
    at = 0
    while at < len(lines):
        start = lines[at].strip()
        if not start or start.startswith("#"):
            at += 1
            continue
        end, statement = _statement(lines, at)
        yield at + 1, start.startswith("["), statement
        at = end


def _statement(lines: list[str], at: int) -> tuple[int, dict[str, Any]]:
    first: tomllib.TOMLDecodeError | None = None
    for end in range(at + 1, len(lines) + 1):
        try:
            return end, tomllib.loads("\n".join(lines[at:end]))
        except tomllib.TOMLDecodeError as fault:
            first = first or fault
    assert first is not None, f"no line at {at} of {len(lines)}"
    raise _toml_fault(first, offset=at)


def _toml_fault(fault: tomllib.TOMLDecodeError, offset: int) -> Malformed:
    message = re.sub(r" \(at .*\)$", "", str(fault))
    line = re.search(r"\(at line (\d+), ", str(fault))
    return Malformed(offset + (int(line[1]) if line else 1), message)


def _descend(statement: dict[str, Any]) -> tuple[str, object]:
    """`{"a": {"b": 1}}` -> `("a.b", 1)`: the dotted key of a single statement."""
    keys: list[str] = []
    value: object = statement
    while isinstance(value, dict) and len(value) == 1:
        ((key, value),) = value.items()
        keys.append(key)
    return ".".join(keys), value


# JSON. The parser gives pairs in the order of the text, and so does a scan for strings that a
# colon follows: the two are walked side by side.

_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"(\s*:)?')


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with its duplicates."""


def _read_json(text: str, place: Place) -> Table:
    try:
        tree = json.loads(text, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as fault:
        raise Malformed(fault.lineno, fault.msg) from None
    starts = (match.start() for match in _JSON_STRING.finditer(text) if match[1])
    table = _json_value(tree, (text.count("\n", 0, start) + 1 for start in starts), place)
    if not isinstance(table, Table):
        raise Malformed(1, "the top of the file is not an object")
    return table


def _json_value(value: object, lines: Iterator[int], place: Place) -> object:
    if isinstance(value, _Pairs):
        entries = []
        for key, inner in value:
            line = next(lines)  # before descending: the key stands before its value
            entries.append(Entry(key, _json_value(inner, lines, place), place(line)))
        return Table(tuple(entries))
    if isinstance(value, list):
        return [_plain(_json_value(inner, lines, place)) for inner in value]
    return value


# YAML. The node tree has lines and duplicates; the safe constructor makes the values.


class _Loader(yaml.SafeLoader):
    """The safe loader with the numbers of YAML 1.2: 1e-3 is one; 010 and 1:30 are not 8 and 90."""


_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(?:0|[1-9][0-9]*)$",
    "tag:yaml.org,2002:float": r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list("-+.0123456789"))


def _read_yaml(text: str, place: Place) -> Table:
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as fault:
        raise Malformed(text.count("\n", 0, fault.position) + 1, fault.reason) from None
    try:
        node = loader.get_single_node()
        if node is None:
            return Table()
        table = _yaml_value(node, loader, place, _DEPTH)
    except yaml.MarkedYAMLError as fault:
        mark = fault.problem_mark or fault.context_mark
        raise Malformed(mark.line + 1 if mark else 1, fault.problem or str(fault)) from None
    finally:
        loader.dispose()
    if table is not None and not isinstance(table, Table):
        raise Malformed(node.start_mark.line + 1, "the top of the file is not a mapping")
    return table or Table()


def _yaml_value(node: Any, loader: _Loader, place: Place, depth: int) -> object:
    if not isinstance(node, yaml.MappingNode) or depth == 0:
        return loader.construct_object(node, deep=True)
    return Table(
        tuple(
            Entry(
                key.value if isinstance(key, yaml.ScalarNode) else "(a key that is not a word)",
                _yaml_value(value, loader, place, depth - 1),
                place(key.start_mark.line + 1),
            )
            for key, value in node.value
        )
    )
