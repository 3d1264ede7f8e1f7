"""Sixfold: train PyTorch models too large or too slow for one device.

This file names the public faces and loads each on first use, so that `import sixfold`
costs no tensor library. It never runs anything by itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sixfold.config import Config
    from sixfold.engine import Engine, initialize

__version__ = "0.1.0"
__all__ = ["Config", "Engine", "__version__", "initialize"]

_HOMES = {"Config": "sixfold.config", "Engine": "sixfold.engine", "initialize": "sixfold.engine"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sixfold' has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
