"""A checked configuration together with the origin of every value.

Made by the loader and by `Resolved.decide`; printed into the run folder as TOML that the loader
reads back. It checks values and rules, but reads no file and merges no layers.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import tomli_w
from pydantic import ValidationError

from sixfold.config.problems import Problems, Setting, show
from sixfold.config.rules import RULES, displaced_by
from sixfold.config.schema import LEAVES, SECTIONS, Leaf, flat, nested
from sixfold.config.tree import Config

DEFAULT = "default"
CONFIG = "config.toml"
"""Where a run keeps its own, in its folder."""


@dataclass(frozen=True)
class Resolved:
    """What was asked, with where each value comes from.

    Args:
        config: the tree.
        origins: for every dotted path "default", "recipe", a place such as "my.toml:12", "values",
            "--set", "decided: ..." or, for a value that another setting put out of force, a
            sentence that names both.
    """

    config: Config
    origins: Mapping[str, str]

    def decide(self, values: Mapping[str, object], why: str | Mapping[str, str]) -> Resolved:
        """A copy in which unset leaves have values; each gets the origin `decided: <why>`.

        Deciding one of two mutually exclusive leaves puts the other out of force, as any higher
        layer does: from `train.minutes` = 3 and a decided `train.steps`, only the steps remain, and
        the origin of `train.minutes` says what it was.

        Args:
            values: dotted path to value.
            why: one reason for all, or one for each path.

        Raises:
            AssertionError: a path does not exist or already has a value.
            ConfigError: a value breaks a rule of the tree.
        """
        current = flat(self.config)
        reasons = {path: why if isinstance(why, str) else why[path] for path in values}
        for path in values:
            if path not in LEAVES:
                raise AssertionError(f"decided {path}, which is not an option")
            if current[path] is not None:
                raise AssertionError(f"decided {path}, which is {current[path]} ({self.origins[path]})")
        layer = {path: Setting(value, f"decided: {reasons[path]}") for path, value in values.items()}
        return resolve(overlay(self._settings(), layer), Problems())

    def above(self, values: Mapping[str, object], place: str) -> Resolved:
        """A copy in which leaves that nobody has set have these values, as from a layer below all others.

        Args:
            values: dotted path to value.
            place: their origin.

        Raises:
            ConfigError: a value breaks a rule of the tree.
        """
        layer = {path: Setting(value, place) for path, value in values.items()}
        return resolve(overlay(layer, self._settings()), Problems())

    def _settings(self) -> dict[str, Setting]:
        """What is not as it is by default, and what was put out of force."""
        values = flat(self.config)
        return {
            path: Setting(values[path], origin) for path, origin in self.origins.items() if origin != DEFAULT
        }

    def to_toml(self) -> str:
        """The whole tree as TOML, each line with its origin; reading it back gives an equal config."""
        values = flat(self.config)
        blocks = [_block("", values, self.origins)]
        blocks += [f"[{section}]\n" + _block(section, values, self.origins) for section in SECTIONS]
        return "\n\n".join(blocks) + "\n"

    def recall(self, text: str, file: Path) -> Resolved:
        """A copy in which values read from `file` have the origins that `to_toml` noted in its `text`.

        A run that is resumed reads its own `config.toml`; that is not where its values come from.
        Origins of higher layers stay, and so does the place of a line without a note. What was noted as a
        default counts as set by nobody.
        """
        noted, values = _noted_origins(text), flat(self.config)
        settings: dict[str, Setting] = {}
        for path, place in self.origins.items():
            is_from_file = place == DEFAULT or place.startswith(f"{file}:")
            origin = noted.get((path, place != DEFAULT), place) if is_from_file else place
            if origin == DEFAULT and values[path] != LEAVES[path].default:
                origin = place  # changed by hand, or the default of another version
            if origin != DEFAULT:
                settings[path] = Setting(values[path], origin)
        return resolve(settings, Problems())

    def __str__(self) -> str:
        return self.to_toml()


def _block(section: str, values: Mapping[str, object], origins: Mapping[str, str]) -> str:
    paths = [path for path in LEAVES if path.rpartition(".")[0] == section]
    keys = {path: path.rpartition(".")[2] for path in paths}
    settings = {path: f"{keys[path]} = {_toml(values[path])}" for path in paths if values[path] is not None}
    width = min(40, max(map(len, settings.values()), default=0))
    return "\n".join(
        f"{settings[path]:<{width}}  # {_printable(origins[path])}"
        if path in settings
        else f"# {keys[path]} is unset ({_printable(origins[path])})"
        for path in paths
    )


_SECTION = re.compile(r"\[(.+)\]")
_SET = re.compile(r"(\w+) = ")
_UNSET = re.compile(r"# (\w+) is unset \((.*)\)")


def _noted_origins(text: str) -> dict[tuple[str, bool], str]:
    """The origins as `_block` wrote them, by dotted path and whether the line sets it."""
    noted: dict[tuple[str, bool], str] = {}
    section = ""
    for line in text.splitlines():
        if header := _SECTION.fullmatch(line):
            section = header[1] + "."
        elif unset := _UNSET.fullmatch(line):
            noted[section + unset[1], False] = unset[2]
        elif (setting := _SET.match(line)) and (note := _note_behind(line)):
            noted[section + setting[1], True] = note
    return noted


def _note_behind(line: str) -> str:
    """The comment of a `key = value  # comment`: it begins at the first mark that is no part of the value."""
    for mark in re.finditer("#", line):
        with contextlib.suppress(tomllib.TOMLDecodeError):
            tomllib.loads(line[: mark.start()])
            return line[mark.end() :].strip()
    return ""


def _toml(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    plain = str(value) if isinstance(value, Path) else value
    return tomli_w.dumps({"v": plain}).removeprefix("v = ").removesuffix("\n")


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def overlay(lower: Mapping[str, Setting], layer: Mapping[str, Setting]) -> dict[str, Setting]:
    """The settings of a layer over those below it, whose contradicted values are put out of force."""
    merged = dict(lower)
    for path, setting in layer.items():
        for other in displaced_by(path, setting.value):
            old = merged.get(other)
            if old is not None and old.value != LEAVES[other].default and other not in layer:
                note = f"{show(old.value)} from {old.place}, displaced by {path} ({setting.place})"
                merged[other] = Setting(LEAVES[other].default, note)
    return merged | dict(layer)


def resolve(settings: Mapping[str, Setting], problems: Problems) -> Resolved:
    """Checks a whole set of settings; raises a ConfigError with these and all earlier problems."""
    legal = check_values(settings, problems)
    config = Config.model_validate(nested({path: setting.value for path, setting in legal.items()}))
    values = flat(config)
    places = {path: legal[path].place if path in legal else DEFAULT for path in LEAVES}
    for rule in RULES:
        verdict = rule.check(*(values[path] for path in rule.paths))
        if verdict is None or any(problems.doubts(path) for path in rule.paths):
            continue
        given = ", ".join(f"{path} = {show(values[path])} ({places[path]})" for path in rule.paths)
        problems.add(given, rule=verdict[0], fix=verdict[1])
    problems.raise_if_any()
    return Resolved(config, places)


def check_values(settings: Mapping[str, Setting], problems: Problems) -> dict[str, Setting]:
    """Converts what files can hold to what fields hold; returns the legal settings, notes the others."""
    converted = {
        path: Setting(LEAVES[path].convert(setting.value), setting.place)
        for path, setting in settings.items()
    }
    try:
        Config.model_validate(nested({path: setting.value for path, setting in converted.items()}))
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            path = _leaf_at(fault["loc"])
            if path in converted:
                _note(LEAVES[path], settings[path], problems)
                del converted[path]
    return converted


def _leaf_at(location: tuple[int | str, ...]) -> str:
    top = str(location[0])
    return top if top in LEAVES else f"{top}.{location[1]}"


def _note(leaf: Leaf, setting: Setting, problems: Problems) -> None:
    works = next(value for value in _nearby(leaf, setting.value) if _is_legal(leaf, value))
    problems.add(
        f"{leaf.path} = {setting}",
        rule=f"{leaf.path} takes: {leaf.takes}",
        fix=f"set {leaf.path} = {_toml(works)}",
        touches=(leaf.path,),
    )


def _nearby(leaf: Leaf, value: object) -> Iterator[object]:
    """What may have been meant, the likeliest first; the last one is always legal."""
    if isinstance(value, str):
        yield from difflib.get_close_matches(value.lower(), leaf.options, n=1, cutoff=0.5)
        with contextlib.suppress(ValueError):
            yield leaf.base(value)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):  # nan and inf have no whole number
            yield str(value) if leaf.base in (str, Path) else leaf.base(value)
        yield from sorted(leaf.limits, key=lambda limit: abs(limit - value))
    yield from ((value,), leaf.example)


def _is_legal(leaf: Leaf, value: object) -> bool:
    try:
        Config.model_validate(nested({leaf.path: leaf.convert(value)}))
    except ValidationError:
        return False
    return True
