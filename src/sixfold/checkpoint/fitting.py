"""Whether the tensors that were saved are those of a model; if not, all that is wrong, in one error.

Called before anything is read. It compares names, shapes and types, and touches neither files nor models.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sixfold.base.errors import CheckpointError
from sixfold.checkpoint.finding import nearest
from sixfold.checkpoint.tensorfile import Spec

_NUM_NEAR_NAMES = 20
"""Missing names that get their nearest spelling; the search is slow and one prefix explains them all."""


def refuse_misfits(
    folder: Path,
    found: Mapping[str, Spec],
    expected: Mapping[str, Spec],
    *,
    strict: bool = True,
    converts: bool = False,
) -> None:
    """Raise where saved tensors do not fit a model.

    Args:
        found: what was saved, each tensor under the name that the model has for it.
        strict: whether names that only one side has are a misfit.
        converts: whether one floating type may stand for another.

    Raises:
        CheckpointError: lists everything that does not fit.
    """
    problems = _unaccounted(found, expected) if strict else []
    for name, wanted in expected.items():
        saved = found.get(name)
        if saved is not None:
            if saved.shape != wanted.shape:
                problems.append(f"{name}: shape {list(saved.shape)} saved, {list(wanted.shape)} expected")
            if saved.dtype != wanted.dtype and not (
                converts and saved.dtype.is_floating_point and wanted.dtype.is_floating_point
            ):
                problems.append(f"{name}: {saved.dtype} saved, {wanted.dtype} expected")
    if problems:
        raise CheckpointError(
            f"{folder} does not fit the model, {len(problems)} problem(s):\n    " + "\n    ".join(problems),
            rule="every tensor of the model is there with its shape and type, and no other",
            fix="build the model that was saved, or read tensors with `read_model` and convert them"
            + ("; strict=False accepts missing and extra names" if strict else ""),
        )


def _unaccounted(found: Mapping[str, Spec], expected: Mapping[str, Spec]) -> list[str]:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    near = {name: nearest(name, extra) for name in missing[:_NUM_NEAR_NAMES]}
    return [
        *(f"missing: {name}" + (f" (saved: {near[name]})" if near.get(name) else "") for name in missing),
        *(f"extra: {name}" for name in extra),
    ]
