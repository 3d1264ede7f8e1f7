"""The listing of everything wrong with a configuration, raised at once as one ConfigError.

The loader and the rules append to a `Problems`; whoever finishes a layer stack raises it.
This module words problems; it finds none.
"""

from __future__ import annotations

import itertools
import json
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sixfold.base.errors import ConfigError

EVERYTHING = ""
"""In `touches`: nothing of the configuration can be relied on (a file that does not parse)."""


@dataclass(frozen=True)
class Setting:
    """A value and where it was set ("my.toml:12", "recipe", "values", "--set")."""

    value: object
    place: str

    def __str__(self) -> str:
        return f"{show(self.value)} ({self.place})"


@dataclass(frozen=True)
class Problem:
    """One fault, in the three sentences of an error.

    Args:
        given: path, value and place.
        rule: the rule that was broken.
        fix: a change that works.
        touches: paths and sections whose value is in doubt because of it, so that no rule about
            them reports a fault that only follows from this one.
    """

    given: str
    rule: str
    fix: str
    touches: tuple[str, ...] = ()


@dataclass
class Problems:
    """Collects problems; `raise_if_any` raises them together."""

    found: list[Problem] = field(default_factory=list)

    def add(self, given: str, *, rule: str, fix: str, touches: tuple[str, ...] = ()) -> None:
        """Notes one problem; the same one met twice (in a layer and again in the whole) counts once."""
        problem = Problem(given, rule, fix, touches)
        if problem not in self.found:
            self.found.append(problem)

    def doubts(self, path: str) -> bool:
        """Whether some problem makes the value of this path unreliable."""
        return any(
            touched in (EVERYTHING, path) or path.startswith(touched + ".") for touched in self._touched()
        )

    def _touched(self) -> Iterator[str]:
        return (touched for problem in self.found for touched in problem.touches)

    def raise_if_any(self) -> None:
        """Raises one ConfigError that lists all problems, if there are any."""
        if not self.found:
            return
        if len(self.found) == 1:
            (only,) = self.found
            raise ConfigError(only.given, rule=only.rule, fix=only.fix)
        lines = [f"{len(self.found)} problems in the configuration"]
        for number, problem in enumerate(self.found, 1):
            lines += [
                f"  {number}. {problem.given}",
                f"     rule: {problem.rule}",
                f"     fix:  {problem.fix}",
            ]
        raise ConfigError(
            "\n".join(lines),
            rule="a run starts only from a configuration in which every key is known and every rule is kept",
            fix=f"make the {len(self.found)} changes named above",
        )


_LENGTH = 80
_SHORT = reprlib.Repr()  # plain repr can be of any length
_SHORT.maxlevel = 2


def show(value: object) -> str:
    """A value as it would stand in a file, cut to a readable length."""
    text = _text(value)
    return text if len(text) <= _LENGTH else text[: _LENGTH - 3] + "..."


def _text(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, Path)):
        return json.dumps(str(value), ensure_ascii=False)
    if isinstance(value, (list, tuple)):
        elements = (_SHORT.repr(item) if isinstance(item, (list, tuple)) else _text(item) for item in value)
        return "[" + ", ".join(itertools.islice(elements, _LENGTH)) + "]"
    return _SHORT.repr(value)
