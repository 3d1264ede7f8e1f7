"""What one checkpoint is to hold: logical tensors, and which elements of them one rank has.

The engine builds a `Content` on every rank; `writing` takes it. All that is wrong with a content is
reported at once, before anything is written. This module never touches the disk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from sixfold.base.errors import CheckpointError
from sixfold.checkpoint.tensorfile import TAGS, Spec

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

MODEL, OPTIMIZER = "model", "optimizer"


@dataclass(frozen=True)
class Piece:
    """Some neighbouring elements of one logical tensor: what a rank writes of it, or wants to read.

    Elements are counted in row-major order of the global shape. Whoever holds something else than one
    such run, a block of columns say, names one piece for each run.

    Args:
        part: "model" or "optimizer".
        name: the tensor's global name in that part.
        start: its first element.
        tensor: the elements, in any shape, type and place when they are written; contiguous on the host
            and of the saved type when they are read into.
    """

    part: str
    name: str
    start: int
    tensor: Tensor

    @property
    def stop(self) -> int:
        return self.start + self.tensor.numel()


@dataclass(frozen=True)
class Content:
    """The logical state of a run, as one rank sees it.

    Args:
        specs: part -> name -> global shape and type as written. The same on every rank; it decides
            where every byte lies. Of tied names only one is here. Optimizer state stands under
            `state_name(parameter, key)`.
        pieces: what this rank writes. Over all ranks every element is written once.
        state: everything else that a resume needs; `state["step"]`, the updates done, is required.
            Tuples come back as lists.
        aliases: each further name of a tied tensor -> its name in the model part.
        extra_files: further files by plain name, such as the `config.json` of a Hugging Face model.
        only: what was asked for, where the content is a part of the model.
    """

    specs: Mapping[str, Mapping[str, Spec]]
    pieces: Sequence[Piece]
    state: Mapping[str, JSON]
    aliases: Mapping[str, str] = field(default_factory=dict)
    extra_files: Mapping[str, bytes] = field(default_factory=dict)
    only: str | None = None

    def snapshot(self) -> Content:
        """The same content in host memory of its own, so that the state may change.

        Pieces that show the same elements share one copy.
        """
        copies: dict[object, Tensor] = {}

        def copied(tensor: Tensor) -> Tensor:
            place = _place(tensor)
            if place not in copies:
                copies[place] = tensor.detach().to("cpu", copy=True)
            return copies[place]

        return replace(self, pieces=[replace(piece, tensor=copied(piece.tensor)) for piece in self.pieces])


def whole(
    model: Mapping[str, Tensor],
    state: Mapping[str, JSON],
    aliases: Mapping[str, str] | None = None,
    optimizer: Mapping[str, Mapping[str, Tensor]] | None = None,
    extra_files: Mapping[str, bytes] | None = None,
) -> Content:
    """A content of whole tensors, for one process that has all of them.

    Args:
        model: parameters and buffers under the model's own names.
        optimizer: parameter name -> state key -> tensor of any shape; fp32 masters under "master".
    """
    named = {
        MODEL: dict(model),
        OPTIMIZER: {
            state_name(name, key): tensor
            for name, values in (optimizer or {}).items()
            for key, tensor in values.items()
        },
    }
    return Content(
        specs={
            part: {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
            for part, tensors in named.items()
        },
        pieces=[
            Piece(part, name, 0, tensor)
            for part, tensors in named.items()
            for name, tensor in tensors.items()
        ],
        state=state,
        aliases=aliases or {},
        extra_files=extra_files or {},
    )


def state_name(parameter: str, key: str) -> str:
    """The name of optimizer state in its files.

    Raises:
        CheckpointError: the key holds a slash, by which names are split again.
    """
    if "/" in key:
        raise CheckpointError(
            f"optimizer {parameter!r}: the state key {key!r} holds '/'",
            rule="optimizer state is named parameter/key in its file",
            fix=f"keep it under {key.replace('/', '.')!r} in the optimizer",
        )
    return f"{parameter}/{key}"


def untie(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a state dict into tensors that are each named once, and aliases.

    Two names are tied when they show the same elements of the same memory; the first one stays. Views
    of one buffer that do not coincide are different tensors.
    """
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[object, str] = {}
    for name, tensor in tensors.items():
        place = _place(tensor)
        if tensor.numel() and tensor.data_ptr() and place in seen:
            aliases[name] = seen[place]
        else:
            seen[place] = name
            kept[name] = tensor
    return kept, aliases


def _place(tensor: Tensor) -> object:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def check_content(content: Content) -> None:
    """Raise one `CheckpointError` that lists everything that keeps this content from being saved."""
    model = content.specs.get(MODEL, {})
    problems = [
        *_tensor_problems(content),
        *(
            f"alias {alias!r}: its tensor {name!r} is not in the model part"
            for alias, name in content.aliases.items()
            if name not in model
        ),
        *(f"alias {alias!r} is stored as well" for alias in content.aliases if alias in model),
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
    problems = []
    for part, specs in content.specs.items():
        for name, spec in specs.items():
            if name == "__metadata__":
                problems.append(f"{part} {name!r}: the name is reserved by the file format")
            if spec.dtype not in TAGS:
                problems.append(f"{part} {name!r}: its dtype is {spec.dtype}")
    for piece in content.pieces:
        what, tensor = f"{piece.part} {piece.name!r}", piece.tensor
        whole = content.specs.get(piece.part, {}).get(piece.name)
        if whole is None or piece.start < 0 or piece.stop > whole.numel:
            raise AssertionError(f"elements {piece.start} to {piece.stop} of {what} are not in {whole}")
        if tensor.is_meta:
            problems.append(f"{what}: a meta tensor has no data")
        elif tensor.layout is not torch.strided:
            problems.append(f"{what}: its layout is {tensor.layout}")
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
