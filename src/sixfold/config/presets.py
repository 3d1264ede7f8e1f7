"""One dial for the reference model: from a number of parameters to its sizes and learning rate.

Used by the loader for `--preset 125m`. Arithmetic alone; every value it gives can be set over.
"""

from __future__ import annotations

import math
import re

HEAD_WIDTH = 64
WIDTH_STEP = 2 * HEAD_WIDTH
"""Widths are multiples of it, so that heads can be shared by two and divided over ranks."""
ASPECT = 64
"""Width per layer that a shape comes near to."""
VOCABULARY = 4096
"""Entries that the embedding is counted with."""
_UNITS = {"k": 1e3, "m": 1e6, "b": 1e9}
_SMALLEST, _LARGEST = 1e6, 1e12
# Parameters of six layers of width 256, and a rate that serves them; rates fall with the square root of the
# number of parameters.
_REFERENCE_PARAMETERS, _REFERENCE_LR = 5.5e6, 3e-3


def target_of(name: str) -> float | None:
    """Parameters that a preset asks for: 125e6 for "125m"; None where it is no such name."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmb])", name.lower())
    target = float(match[1]) * _UNITS[match[2]] if match else 0.0
    return target if _SMALLEST <= target <= _LARGEST else None


def preset(name: str) -> dict[str, object]:
    """Values by dotted path; `target_of` knows `name`.

    Of all widths, each with the depth that comes nearest to the number of parameters, the one whose ratio of
    width to depth is nearest to `ASPECT`.
    """
    target = target_of(name)
    assert target is not None, "the loader has asked"
    widest = int((target / 10) ** 0.5) + WIDTH_STEP
    shapes = [(width, _depth(width, target)) for width in range(WIDTH_STEP, widest + 1, WIDTH_STEP)]
    width, num_layers = min(shapes, key=lambda shape: abs(math.log(shape[0] / shape[1] / ASPECT)))
    rate = _REFERENCE_LR * (_REFERENCE_PARAMETERS / num_parameters(width, num_layers)) ** 0.5
    return {
        "model.width": width,
        "model.num_layers": num_layers,
        "model.num_heads": width // HEAD_WIDTH,
        "model.num_kv_heads": width // WIDTH_STEP,
        "optimizer.lr": float(f"{rate:.2g}"),
    }


def num_parameters(width: int, num_layers: int) -> int:
    """Of the reference model, its tied embedding counted once."""
    return num_layers * _layer(width) + (VOCABULARY + 1) * width


def _layer(width: int) -> int:
    attention = 2 * width * (width + width // 2)
    feed_forward = 3 * width * (-(-8 * width // (3 * 64)) * 64)
    return attention + feed_forward + 2 * width


def _depth(width: int, target: float) -> int:
    return max(1, round((target - num_parameters(width, 0)) / _layer(width)))
