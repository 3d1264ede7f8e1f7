"""The tree seen as a flat table: one `Leaf` per dotted path, with what it takes in words.

Read by the loader (what a path takes), by the listing of problems (what would work) and by help
and docs (`describe`). Everything here is derived from `tree.py` once; it judges no value.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from sixfold.config.names import Names
from sixfold.config.tree import Config, Section

_WORDS = {int: "whole number", float: "number", bool: "true or false", str: "string", Path: "path"}
_EXAMPLES: dict[type, object] = {int: 1, float: 1.0, bool: True, str: "text", Path: Path("folder")}


@dataclass(frozen=True)
class Leaf:
    """One option.

    Args:
        path: dotted, as written in files.
        takes: the legal values, in words.
        default: its value when nobody sets it.
        help: the docstring of its field.
        example: a legal value.
        options: the legal words, where it takes one of a few.
        limits: the smallest and largest legal number, where they are themselves legal.
        base: the Python type of the value, or of a list's elements.
        convert: turns what a file can hold into what the field holds; leaves the rest alone.
    """

    path: str
    takes: str
    default: object
    help: str
    example: object
    options: tuple[str, ...]
    limits: tuple[float, ...]
    base: type[Any]
    convert: Callable[[object], object]


@dataclass(frozen=True)
class _Kind:
    text: str
    example: object
    base: type[Any]
    options: tuple[str, ...] = ()
    limits: tuple[float, ...] = ()
    convert: Callable[[object], object] = lambda value: value


def _bounds(metadata: list[Any]) -> dict[str, float]:
    facts = [fact for item in metadata for fact in (item.metadata if isinstance(item, FieldInfo) else [item])]
    names = ("ge", "gt", "le", "lt")
    return {name: getattr(fact, name) for fact in facts for name in names if hasattr(fact, name)}


def _scalar(base: type, bounds: dict[str, float]) -> _Kind:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    text = " and ".join(f"{signs[name]} {bound}" for name, bound in bounds.items())
    limits = tuple(bound for name, bound in bounds.items() if name in ("ge", "le"))
    example = _EXAMPLES[base]
    if base is float and bounds.get("lt", bounds.get("le")) is not None:
        example = (bounds.get("ge", bounds.get("gt", 0.0)) + bounds.get("lt", bounds.get("le", 1.0))) / 2
    elif bounds:
        example = bounds["ge"] if "ge" in bounds else base(bounds.get("gt", 0) + 1)
    kind = _Kind(f"{_WORDS[base]} {text}".strip(), example, base, limits=limits)
    return replace(kind, convert=_to_path) if base is Path else kind


def _to_path(value: object) -> object:
    return Path(value) if isinstance(value, str) else value


def _to_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _kind(annotation: Any, metadata: list[Any]) -> _Kind:
    """What an annotation accepts. An annotation this cannot read is a fault of the tree, not of a user."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    names = next((each for each in metadata if isinstance(each, Names)), None)
    if names is not None and annotation is str:
        return _Kind(names.text, names.words[0] if names.words else "module:name", str, names.words)
    if origin is Annotated:
        return _kind(arguments[0], [*arguments[1:], *metadata])
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        return _kind(inner, metadata)
    if origin is Literal:
        return _Kind(" | ".join(f'"{option}"' for option in arguments), arguments[0], str, arguments)
    if origin is tuple:
        element = _kind(arguments[0], [])
        if arguments[1:] == (...,):
            return _Kind(f"list of {element.text}s", (element.example,), element.base, convert=_to_tuple)
        text, example = (
            f"list of {len(arguments)}: each a {element.text}",
            (element.example,) * len(arguments),
        )
        return _Kind(text, example, element.base, convert=_to_tuple)
    return _scalar(annotation, _bounds(metadata))


def _walk(section: type[Section], prefix: str) -> tuple[dict[str, Leaf], dict[str, type[Section]]]:
    leaves: dict[str, Leaf] = {}
    sections: dict[str, type[Section]] = {}
    for name, field in section.model_fields.items():
        path = prefix + (field.alias or name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            sections[path] = field.annotation
            deeper, _ = _walk(field.annotation, path + ".")
            leaves |= deeper
            continue
        kind = _kind(field.annotation, list(field.metadata))
        default = field.get_default()
        leaves[path] = Leaf(
            path=path,
            takes=kind.text,
            default=default,
            help=" ".join((field.description or "").split()),
            example=kind.example if default is None else default,
            options=kind.options,
            limits=kind.limits,
            base=kind.base,
            convert=kind.convert,
        )
    return leaves, sections


LEAVES, SECTIONS = _walk(Config, "")


def describe() -> list[tuple[str, str, object, str]]:
    """Every option as (path, what it takes in words, default, help), in the order of the tree."""
    return [(leaf.path, leaf.takes, leaf.default, leaf.help) for leaf in LEAVES.values()]


def nested(flat: Mapping[str, object]) -> dict[str, Any]:
    """`{"batch.micro": 4}` -> `{"batch": {"micro": 4}}`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        section, _, key = path.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[key] = value
    return tree


def flat(config: Config) -> dict[str, object]:
    """The value of every leaf by dotted path, in the order of the tree."""
    dump = config.model_dump(by_alias=True)
    return {path: _lookup(dump, path) for path in LEAVES}


def _lookup(tree: dict[str, Any], path: str) -> object:
    section, _, key = path.rpartition(".")
    return (tree[section] if section else tree)[key]


def keys_of(section: str) -> list[str]:
    """The last names of everything directly in a section; "" is the top of the tree."""
    return [path.rpartition(".")[2] for path in (*LEAVES, *SECTIONS) if path.rpartition(".")[0] == section]


def nearest(path: str) -> list[str]:
    """The known paths that an unknown one may have meant, best first; at most three, perhaps none.

    In order: a similar name in the same section, the same name in another section, a similar path,
    a similar name anywhere, and an option whose help holds all words of the name.
    """
    wanted = path.lower().replace("-", "_")
    section, _, key = wanted.rpartition(".")
    last = {known: known.rpartition(".")[2] for known in LEAVES}
    here = difflib.get_close_matches(key, keys_of(section), n=1, cutoff=0.7)
    same = [known for known, name in last.items() if name == key]
    if here or same:
        return [*(f"{section}.{name}".lstrip(".") for name in here), *same][:3]
    close = difflib.get_close_matches(wanted, [*LEAVES, *SECTIONS], n=1, cutoff=0.75)
    if close:
        return close
    alike = difflib.get_close_matches(key, sorted(set(last.values())), n=1, cutoff=0.75)
    if alike:
        return [known for known, name in last.items() if name == alike[0]][:3]
    words = set(re.findall(r"[a-z]{3,}", key))
    helps = {known: set(re.findall(r"[a-z]+", leaf.help.lower())) for known, leaf in LEAVES.items()}
    return [known for known, text in helps.items() if words and words <= text][:3]
