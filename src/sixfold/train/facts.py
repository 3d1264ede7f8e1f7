"""What a report tells of a run besides its curves: layout, sizes, versions.

Written once at the start of a run into its metrics file, where `sixfold report` finds it. It measures and
decides nothing.
"""

from __future__ import annotations

import platform
from typing import Any

import torch

from sixfold import __version__
from sixfold.plan.residency import Residency
from sixfold.train.run import Run


def facts_of(run: Run) -> dict[str, Any]:
    """Plain values alone."""
    plan, corpus = run.engine.plan, run.corpus
    # Every rank's module has all parameters with their global shapes, whatever it holds of them.
    sizes = [(each.requires_grad, each.numel()) for each in run.engine.module.parameters()]
    return {
        "plan": str(plan),
        "batch": str(run.batch),
        "degrees": dict(plan.geometry.degrees),
        "parts": _parts(plan.residency, plan.geometry.num_parts),
        "num_trained": sum(numel for trainable, numel in sizes if trainable),
        "num_frozen": sum(numel for trainable, numel in sizes if not trainable),
        "corpus": corpus.fingerprint,
        "num_train_tokens": corpus.num_train_tokens,
        "num_held_out_bytes": corpus.num_held_out_bytes,
        "compressors": corpus.compressors,
        "device": str(run.engine.device),
        "versions": {"sixfold": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _parts(residency: Residency, num_parts: Any) -> dict[str, int]:
    """Into how many parts each kind of model state is cut."""
    return {
        "parameters": num_parts(residency.parameters),
        "gradients": num_parts(residency.gradients),
        "optimizer": num_parts(residency.optimizer),
    }
