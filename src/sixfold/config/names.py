"""Options that take one of a few words, or the name of code of others.

Used by the tree as the type of such options and by the schema to describe them. It imports no plugin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from sixfold.base.plugins import is_known


@dataclass(frozen=True)
class Names:
    """The words that are known by themselves; anything else is a plugin of this kind."""

    kind: str
    words: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """What such an option takes, in words."""
        return " | ".join([*(f'"{word}"' for word in self.words), "the name of a plugin"])

    def check(self, name: str) -> str:
        """The name itself, if there can be such a thing."""
        if name in self.words or is_known(self.kind, name):
            return name
        raise ValueError(f"{name!r} is no {self.kind}")

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))
