"""Code of others by name: an entry point, `module:attribute`, or `file.py:attribute`.

Called wherever a configuration may name something that Sixfold does not bring: losses, optimizers,
schedules, sources, sinks, callbacks. It imports what is named and calls nothing of it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import Any

from sixfold.base.errors import ConfigError

GROUPS = {kind: f"sixfold.{kind}" for kind in ("loss", "optimizer", "schedule", "source", "sink", "callback")}
"""Groups of entry points by kind."""


def is_reference(name: str) -> bool:
    """Whether `name` says itself where the code is."""
    place, _, attribute = name.rpartition(":")
    return bool(place) and attribute.isidentifier()


@cache
def entry_points(kind: str) -> dict[str, importlib.metadata.EntryPoint]:
    """What installed packages offer of this kind, by name."""
    return {each.name: each for each in importlib.metadata.entry_points(group=GROUPS[kind])}


def is_known(kind: str, name: str) -> bool:
    """Whether there can be such a plugin; whether it can be imported is seen when it is loaded."""
    return is_reference(name) or name in entry_points(kind)


def load_plugin(kind: str, name: str) -> Any:
    """The object that `name` stands for.

    Raises:
        ConfigError: it cannot be imported, or there is nothing under that name.
    """
    if not is_reference(name):
        found = entry_points(kind).get(name)
        if found is None:
            raise _missing(kind, name, f"no installed package offers it; there is {_offers(kind)}")
        name = f"{found.module}:{found.attr}"
    place, _, attribute = name.rpartition(":")
    try:
        module = _file(place) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # whatever the code of others does when it is imported
        raise _missing(kind, name, f"{type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        own = ", ".join(each for each in vars(module) if not each.startswith("_")) or "nothing"
        raise _missing(kind, name, f"{place} has no {attribute}; it has {own}")
    return getattr(module, attribute)


@cache
def _file(name: str) -> Any:
    path = Path(name).expanduser().resolve()
    # Under a name of its own, so that it hides no installed module and pickles by name.
    title = f"sixfold_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(title, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[title] = module
    spec.loader.exec_module(module)
    return module


def _offers(kind: str) -> str:
    return ", ".join(entry_points(kind)) or "none of this kind"


def _missing(kind: str, name: str, why: str) -> ConfigError:
    return ConfigError(
        f"the {kind} {name!r} cannot be loaded: {why}",
        rule=f"a {kind} of your own is named as module:attribute, file.py:attribute, or by an entry point of "
        f"the group {GROUPS[kind]}",
        fix="correct the name, or make the module importable from where you start",
    )
