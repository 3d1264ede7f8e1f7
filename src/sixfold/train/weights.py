"""Weights that a run starts from: those of a folder of safetensors files, put into a module on meta.

Called by the loop before it makes an engine, and where the model of a run is put together again. It changes
no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sixfold.base.errors import CheckpointError
from sixfold.models.lora import FACTORS


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files of a folder, optimizer state left out.

    Raises:
        CheckpointError: it holds none, or a file is damaged.
    """
    files = [file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith("optimizer")]
    if not files:
        raise CheckpointError(
            f"{folder} holds no safetensors files",
            rule="a run starts from a folder of safetensors files, or from a checkpoint",
            fix="name such a folder, or leave model.weights unset",
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file}: {error}",
                rule="every safetensors file of the folder is whole",
                fix="download or copy it again",
            ) from error
    return tensors


def start_from(module: nn.Module, folder: Path) -> None:
    """Give every tensor of `module` the numbers that stand under its name; adapters keep their own.

    Raises:
        CheckpointError: as `fill`.
    """
    fill(module, tensors_in(folder), folder, keeps=FACTORS)


def fill(module: nn.Module, tensors: Mapping[str, Tensor], source: Path, keeps: Sequence[str] = ()) -> None:
    """Put `tensors` into `module` in place of its own; of tied names one is enough.

    Args:
        source: for messages.
        keeps: names of submodules whose own tensors stay where there are no others.

    Raises:
        CheckpointError: tells what is missing or of another shape.
    """
    state = module.state_dict()
    ties = _names_of_parameters(module)
    kept = {name for name in state if name.split(".")[-2:-1] in [[each] for each in keeps]}
    missing = sorted(n for n in state.keys() - kept if not ties.get(n, {n}) & tensors.keys())
    wrong = sorted(n for n in state if n in tensors and tensors[n].shape != state[n].shape)
    if missing or wrong:
        shown = ", ".join([*missing[:4], *wrong[:4]])
        raise CheckpointError(
            f"{source} does not fit the model: {len(missing)} tensor(s) missing, {len(wrong)} of another "
            f"shape, for example {shown}",
            rule="weights have every tensor of the model, with its name and shape",
            fix="build the model that belongs to them: model.hf, or the sizes under model",
        )
    given = {name: tensors[name] for name in state if name in tensors}
    module.load_state_dict(given, strict=False, assign=True)
    tie: Callable[[], Any] | None = getattr(module, "tie_weights", None)
    if tie is not None:
        tie()


def _names_of_parameters(module: nn.Module) -> dict[str, set[str]]:
    """Every name of a parameter -> all names of the same one."""
    by_parameter: dict[int, set[str]] = {}
    named = list(module.named_parameters(remove_duplicate=False))
    for name, parameter in named:
        by_parameter.setdefault(id(parameter), set()).add(name)
    return {name: by_parameter[id(parameter)] for name, parameter in named}
