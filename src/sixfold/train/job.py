"""What a training job is asked for, decided before any rank computes: its settings and number types.

Used by the launcher for a first look and by every rank; both come to the same answer. It trains
nothing and starts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sixfold.base.errors import ConfigError
from sixfold.config import Resolved, load
from sixfold.monitor.hardware import fast_bf16
from sixfold.train.folder import CONFIG, run_to_resume

RECIPE = Path(__file__).with_name("recipe.toml")


@dataclass(frozen=True)
class Request:
    """What the user typed.

    Args:
        config: configuration file.
        overrides: `key=value` texts.
        resume: run folder to go on with.
        into: run folder to make.
    """

    config: Path | None = None
    overrides: tuple[str, ...] = ()
    resume: Path | None = None
    into: Path | None = None


def resolve(request: Request) -> Resolved:
    """The configuration of a request: recipe, file or resumed run, overrides.

    Raises:
        ConfigError: all problems at once.
    """
    if request.resume is not None and (request.config is not None or request.into is not None):
        other = "--config" if request.config is not None else "--into"
        raise ConfigError(
            f"--resume {request.resume} together with {other}",
            rule="a resumed run goes on in its folder with its own configuration",
            fix=f"drop {other}; single values can be changed with --set",
        )
    if request.resume is not None:
        file = run_to_resume(request.resume) / CONFIG
        return load(file, overrides=request.overrides).recall(file.read_text(), file)
    return load(request.config, overrides=request.overrides, recipe=RECIPE)


def decide_compute(resolved: Resolved) -> Resolved:
    """Fill in the compute type where it is open: bf16 on GPUs and on processors that are fast at it."""
    if resolved.config.precision.compute is not None:
        return resolved
    if torch.cuda.is_available():
        return resolved.decide({"precision.compute": "bf16"}, "computing on a GPU")
    if fast_bf16():
        return resolved.decide(
            {"precision.compute": "bf16"}, "this processor has instructions that multiply bf16"
        )
    return resolved.decide(
        {"precision.compute": "fp32"}, "this processor is not known to multiply bf16 faster"
    )
