"""From files, dictionaries and overrides to one `Resolved`, or one error that lists every problem.

Called by `sixfold.initialize` and by every command that takes a configuration. It reads the layers,
keeps the place of each value and lays higher layers over lower ones; it derives nothing and decides
nothing. No tensor library is imported here.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sixfold.config.document import SUFFIXES, Entry, Malformed, Place, Table, read_document
from sixfold.config.presets import preset as preset_values
from sixfold.config.presets import target_of
from sixfold.config.problems import EVERYTHING, Problems, Setting, show
from sixfold.config.resolved import Resolved, check_values, overlay, resolve
from sixfold.config.rules import PARTNERS
from sixfold.config.schema import LEAVES, SECTIONS, keys_of, nearest
from sixfold.config.tree import Config

Values = Mapping[str, object] | Config


def load(
    file: str | Path | None = None,
    *,
    values: Values | None = None,
    overrides: Sequence[str] = (),
    recipe: Path | None = None,
    preset: str | None = None,
) -> Resolved:
    """Lays the layers over each other and checks the result.

    The layers, lowest first: the defaults, `recipe`, `preset`, `file`, `values`, `overrides`. A higher layer
    that sets one of two mutually exclusive options (`batch.global` and `batch.tokens`, `train.steps`
    and `train.minutes`) puts the other's value out of force; one that names another optimizer or a
    constant schedule does the same with the settings that the new choice does not have.

    Args:
        file: TOML, YAML or JSON, by its suffix.
        values: nested or with dotted keys; of a Config, the fields that were set explicitly count.
            None unsets an option that has "Unset" in its help.
        overrides: `a.b=c` each, with c a TOML value; what is none counts as a string.
        recipe: a file of the package, whose values have the origin "recipe".
        preset: a number of parameters such as "125m", from which sizes and learning rate follow.

    Raises:
        ConfigError: lists all problems with path, value, place, rule and a change that works.
    """
    problems = Problems()
    tables: list[Table] = []
    if recipe is not None:
        tables.append(_read(recipe, lambda line: "recipe", problems))
    if preset is not None:
        tables.append(_read_preset(preset, problems))
    if file is not None:
        tables.append(_read(Path(file), lambda line: f"{file}:{line}", problems))
    if values is not None:
        tables.append(_read_values(values, problems))
    tables.append(_read_overrides(overrides, problems))

    merged: dict[str, Setting] = {}
    for table in tables:
        layer = check_values(_settings(table, problems), problems)
        _refuse_partners(layer, problems)
        merged = overlay(merged, layer)
    return resolve(merged, problems)


def _read(path: Path, place: Place, problems: Problems) -> Table:
    if path.is_dir():
        near = _near_files(path / "sixfold.toml")
        problems.add(
            f"{path} is a folder",
            rule="a configuration is one file",
            fix=f"use {' or '.join(near)}" if near else "name a file, or leave it out for the defaults",
            touches=(EVERYTHING,),
        )
        return Table()
    if path.suffix.lower() not in SUFFIXES:
        problems.add(
            f"{path} ends in {show(path.suffix)}",
            rule=f"the format of a configuration is told by its suffix: {', '.join(SUFFIXES)}",
            fix=f"name it {path.with_suffix('.toml').name if path.name else 'sixfold.toml'}",
            touches=(EVERYTHING,),
        )
        return Table()
    try:
        text = path.read_bytes().decode("utf-8-sig")
        return read_document(text, path.suffix.lower(), place)
    except OSError as fault:
        near = _near_files(path)
        problems.add(
            f"{path} cannot be read: {fault.strerror or fault}",
            rule="the configuration file exists and is readable",
            fix=f"use {' or '.join(near)}" if near else f"make {path}, or leave it out for the defaults",
            touches=(EVERYTHING,),
        )
    except UnicodeDecodeError as fault:
        line = fault.object.count(b"\n", 0, fault.start) + 1
        problems.add(
            f"{place(line)}: byte {fault.object[fault.start]:#04x} is not UTF-8",
            rule="configuration files are UTF-8 text",
            fix=f"save {path} as UTF-8",
            touches=(EVERYTHING,),
        )
    except Malformed as fault:
        kind = path.suffix.lower().removeprefix(".").replace("yml", "yaml").upper()
        problems.add(
            f"{place(fault.line)}: {fault.message}",
            rule=f"{path.name} is a {kind} document",
            fix=f"correct line {fault.line}; nothing in the file was read",
            touches=(EVERYTHING,),
        )
    return Table()


def _near_files(path: Path) -> list[str]:
    """Configuration files beside a missing one: those of similar name, else the first three."""
    folder = path.parent
    if not folder.is_dir():
        return []
    names = sorted(
        each.name
        for each in folder.iterdir()
        if each.suffix.lower() in SUFFIXES and each.is_file() and each.name != "pyproject.toml"
    )
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5) or names[:3]
    return [str(folder / name) for name in near if name != path.name]


def _read_preset(name: str, problems: Problems) -> Table:
    if target_of(name) is None:
        problems.add(
            f"--preset {name}",
            rule="a preset is a number of parameters from 1m to 1000b: digits and one of k, m, b",
            fix="use --preset 10m, 125m or 1b",
            touches=(EVERYTHING,),
        )
        return Table()
    return _table(preset_values(name), f"--preset {name}")


def _read_values(values: object, problems: Problems) -> Table:
    if isinstance(values, (Mapping, Config)):
        return _table(values, "values")
    problems.add(
        f"{show(values)} of type {type(values).__name__} is given as values",
        rule="values are a dictionary or a Config",
        fix='pass {"optimizer.lr": 1e-3}',
        touches=(EVERYTHING,),
    )
    return Table()


def _table(values: Mapping[Any, object] | BaseModel, place: str) -> Table:
    """Dictionaries, also with sections that are already built, as entries of one place."""
    if isinstance(values, BaseModel):
        values = values.model_dump(by_alias=True, exclude_unset=True)
    return Table(tuple(Entry(str(key), _value(value, place), place) for key, value in values.items()))


def _value(value: object, place: str) -> object:
    return _table(value, place) if isinstance(value, (Mapping, BaseModel)) else value


def _read_overrides(overrides: Sequence[str], problems: Problems) -> Table:
    entries = []
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign or not key.strip():
            problems.add(
                f"--set {text}",
                rule="an override is PATH=VALUE",
                fix=f"write --set {key.strip() or 'optimizer.lr'}=VALUE",
                touches=(key.strip() or EVERYTHING,),
            )
            continue
        entries.append(Entry(key.strip(), _override_value(value), "--set"))
    return Table(tuple(entries))


def _override_value(text: str) -> object:
    """A TOML value, or the text itself: a bare word is a string."""
    try:
        parsed = tomllib.loads(f"v = {text}")
    except ValueError:  # no TOML, or a number of thousands of digits
        return text
    return _value(parsed["v"], "--set") if len(parsed) == 1 else text


def _settings(table: Table, problems: Problems) -> dict[str, Setting]:
    """The leaves that a layer sets, by dotted path; notes unknown keys and duplicates."""
    settings: dict[str, Setting] = {}
    seen: dict[str, Setting] = {}
    unknown: list[str] = []

    def visit(table: Table, prefix: str) -> None:
        for entry in table.entries:
            value = entry.value.plain() if isinstance(entry.value, Table) else entry.value
            path, setting = prefix + entry.key, Setting(value, entry.place)
            if any(path.startswith(known + ".") for known in unknown):
                continue  # inside a section that is already noted as unknown
            if path in seen:
                _note_duplicate(path, seen[path], setting, problems)
                continue
            seen[path] = setting
            inner = Table() if entry.value is None else _as_table(entry)
            if path in LEAVES:
                settings[path] = setting
            elif path not in SECTIONS:
                unknown.append(path)
                _note_unknown(path, setting, problems)
            elif inner is None:
                _note_section(path, setting, problems)
            else:
                visit(inner, path + ".")

    visit(table, "")
    return settings


def _as_table(entry: Entry) -> Table | None:
    if isinstance(entry.value, dict):  # an inline table
        return _table(entry.value, entry.place)
    return entry.value if isinstance(entry.value, Table) else None


def _note_duplicate(path: str, first: Setting, second: Setting, problems: Problems) -> None:
    problems.add(
        f"{path} is set twice: {first} and {second}",
        rule="one place sets a key once",
        fix=f"keep one of the two {'sections' if path in SECTIONS else 'lines'}",
        touches=(path,),
    )


def _note_unknown(path: str, setting: Setting, problems: Problems) -> None:
    section = path.rpartition(".")[0]
    near = nearest(path)
    if near:
        fix = f"write {' or '.join(near)}"
    elif section in SECTIONS or not section:
        fix = f"remove it; {section or 'the top'} has {', '.join(keys_of(section))}"
    else:
        fix = f"remove it; the sections are {', '.join(SECTIONS)}"
    given = f"[{path}] ({setting.place})" if isinstance(setting.value, dict) else f"{path} = {setting}"
    problems.add(given, rule=f"there is no {path}", fix=fix, touches=(path, *near))


def _note_section(path: str, setting: Setting, problems: Problems) -> None:
    key = keys_of(path)[0]
    problems.add(
        f"{path} = {setting}",
        rule=f"{path} is a section, with keys of its own: {', '.join(keys_of(path))}",
        fix=f"write it as [{path}] with lines such as {key} = {show(LEAVES[f'{path}.{key}'].example)}",
        touches=(path,),
    )


def _refuse_partners(layer: dict[str, Setting], problems: Problems) -> None:
    """Both of two exclusive options in one layer: neither is the higher one."""
    for path, other in PARTNERS.items():
        if path > other or path not in layer or other not in layer:
            continue
        if layer[path].value is not None and layer[other].value is not None:
            problems.add(
                f"{path} = {layer[path]} and {other} = {layer[other]}",
                rule=f"{path} and {other} say the same thing in two ways, so only one of them is set",
                fix=f"remove {other} or {path}",
                touches=(path, other),
            )
