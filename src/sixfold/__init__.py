"""Sixfold: train PyTorch models too large or too slow for one device.

This file names the public faces and loads each on first use, so that `import sixfold`
costs no tensor library. It never runs anything by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sixfold.base.faces import on_first_use

if TYPE_CHECKING:
    from sixfold.config import Config
    from sixfold.engine import Engine, initialize

__version__ = "0.1.0"
__all__ = ["Config", "Engine", "__version__", "initialize"]

_HOMES = {"Config": "sixfold.config", "Engine": "sixfold.engine", "initialize": "sixfold.engine"}
__getattr__ = on_first_use(__name__, _HOMES, __all__)


def __dir__() -> list[str]:
    return sorted(__all__)
