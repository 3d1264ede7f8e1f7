"""Public names of a package, each loaded on first use: importing the package loads no tensor library.

Packages whose faces are slow to load set their `__getattr__` by it. It knows no name, and imports nothing
until one is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def on_first_use(package: str, homes: Mapping[str, str], offered: Sequence[str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package.

    Args:
        package: its name.
        homes: public name -> the module that has it.
        offered: all public names.
    """

    def load(name: str) -> Any:
        if name in homes:
            return getattr(importlib.import_module(homes[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}; it offers {', '.join(offered)}")

    return load
