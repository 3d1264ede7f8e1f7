"""What one checkpoint is to hold, and the check that it can be written and read back unchanged.

The engine builds a `Content`; `writing` takes it. All that is wrong with a content is reported at once,
before anything is written. This module never touches the disk and never copies a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from sixfold.base.errors import CheckpointError
from sixfold.checkpoint.tensorfile import TAGS

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

MODEL, OPTIMIZER = "model", "optimizer"


@dataclass(frozen=True)
class Content:
    """The logical state of a run: whole tensors by global name, and JSON beside them.

    Args:
        model: parameters and buffers under the model's own names. Of tied names only one is here.
        aliases: each further name of a tied tensor -> its name in `model`.
        optimizer: parameter name -> state key -> tensor of any shape; fp32 masters under "master".
        state: everything else that a resume needs; `state["step"]`, the updates done, is required.
            Tuples come back as lists.
        extra_files: further files by plain name, such as the `config.json` of a Hugging Face model.
    """

    model: Mapping[str, Tensor]
    state: Mapping[str, JSON]
    aliases: Mapping[str, str] = field(default_factory=dict)
    optimizer: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    extra_files: Mapping[str, bytes] = field(default_factory=dict)

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of each part under the names they have in its files."""
        optimizer = {
            f"{name}/{key}": tensor for name, state in self.optimizer.items() for key, tensor in state.items()
        }
        return {MODEL: dict(self.model), OPTIMIZER: optimizer}


def untie(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a state dict into tensors that are each named once, and aliases.

    Two names are tied when they show the same elements of the same memory; the first one stays. Views
    of one buffer that do not coincide are different tensors.
    """
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[object, str] = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and tensor.data_ptr() and place in seen:
            aliases[name] = seen[place]
        else:
            seen[place] = name
            kept[name] = tensor
    return kept, aliases


def check_content(content: Content) -> None:
    """Raise one `CheckpointError` that lists everything that keeps this content from being saved."""
    problems = [
        *_tensor_problems(content),
        *(
            f"alias {alias!r}: its tensor {name!r} is not in the model part"
            for alias, name in content.aliases.items()
            if name not in content.model
        ),
        *(f"alias {alias!r} is stored as well" for alias in content.aliases if alias in content.model),
        *_step_problems(content.state),
        *_json_problems("state", content.state),
    ]
    if problems:
        raise CheckpointError(
            f"this state cannot be saved, {len(problems)} problem(s):\n    " + "\n    ".join(problems),
            rule="a checkpoint holds dense tensors of the safetensors number types and plain JSON",
            fix="change what is listed: tensors to such a type and `.to_dense()`, values to plain numbers",
        )


def _tensor_problems(content: Content) -> list[str]:
    problems = [
        f"optimizer {name!r}: the state key {key!r} holds '/'"
        for name, state in content.optimizer.items()
        for key in state
        if "/" in key
    ]
    for part, tensors in content.parts().items():
        for name, tensor in tensors.items():
            if name == "__metadata__":
                problems.append(f"{part} {name!r}: the name is reserved by the file format")
            if tensor.is_meta:
                problems.append(f"{part} {name!r}: a meta tensor has no data")
            elif tensor.layout is not torch.strided:
                problems.append(f"{part} {name!r}: its layout is {tensor.layout}")
            if tensor.dtype not in TAGS:
                problems.append(f"{part} {name!r}: its dtype is {tensor.dtype}")
    return problems


def _step_problems(state: Mapping[str, JSON]) -> list[str]:
    step = state.get("step")
    if isinstance(step, int) and not isinstance(step, bool) and step >= 0:
        return []
    return [f"state.step is {step!r}, not a whole number of updates"]


def _json_problems(path: str, value: object) -> list[str]:
    match value:
        case None | bool() | int() | str():
            return []
        case float():
            return [] if math.isfinite(value) else [f"{path} is {value}, which JSON cannot write"]
        case dict():
            bad = [f"{path} has the key {key!r}, not a string" for key in value if not isinstance(key, str)]
            return bad + [p for key, item in value.items() for p in _json_problems(f"{path}.{key}", item)]
        case list() | tuple():
            return [p for i, item in enumerate(value) for p in _json_problems(f"{path}[{i}]", item)]
        case _:
            return [f"{path} is a {type(value).__name__}"]
