"""Foreign checkpoints into native form: of Hugging Face, torch.distributed.checkpoint and DeepSpeed.

Called by `sixfold ckpt import`, on one process. Tensors come in under their own names with equal bytes;
what a foreign checkpoint does not tell (data position, settings) is left open. It never changes the
source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from sixfold.base.errors import CheckpointError
from sixfold.checkpoint.content import Content, untie, whole
from sixfold.checkpoint.manifest import MANIFEST, STATE, SUMS
from sixfold.checkpoint.partitioned import partitions_in, read_partitions
from sixfold.checkpoint.weights import INDEX, open_weights, safetensors_files
from sixfold.checkpoint.writing import save

_MAX_EXTRA_BYTES = 64 * 2**20
_STATE_OF = re.compile(r"^(?:.+\.)?optim(?:izer)?s?\.state\.(.+)\.([^.]+)$")
"""Optimizer state as torch's own `get_state_dict` names it."""


def kind_of(source: Path) -> str:
    """What a folder is, in words.

    Raises:
        CheckpointError: nothing that can be imported.
    """
    return _reader_of(source)[0]


def import_folder(source: Path, target: Path) -> int:
    """Write `target`, a native checkpoint, from a foreign folder; returns the number of tensors.

    Raises:
        CheckpointError: the folder is not known, is damaged, or the target holds something else.
    """
    content = _reader_of(source)[1](source)
    save(target, content)
    return sum(map(len, content.specs.values()))


def _reader_of(source: Path) -> tuple[str, Callable[[Path], Content]]:
    if (source / MANIFEST).exists():
        raise CheckpointError(
            f"{source} is a native checkpoint",
            rule="only foreign checkpoints are imported",
            fix=f"load it as it is: engine.load({str(source)!r})",
        )
    if (source / ".metadata").exists():
        return "a folder of torch.distributed.checkpoint", _distributed
    if (source / INDEX).exists() or any(source.glob("*.safetensors")):
        return "a Hugging Face folder", _hugging_face
    partitions = partitions_in(source)
    if partitions is not None:
        return "a DeepSpeed checkpoint", lambda _: read_partitions(partitions)
    raise CheckpointError(
        f"{source} holds neither safetensors files, nor a .metadata file, nor files of ZeRO partitions",
        rule="a folder of Hugging Face, torch.distributed.checkpoint or DeepSpeed is imported",
        fix="name the folder in which such files lie",
    )


def _hugging_face(source: Path) -> Content:
    open_weights(source)  # all that is wrong with headers and index
    files = safetensors_files(source)
    # Mapped into memory, not read: `save` takes a chunk at a time.
    tensors = {name: tensor for file in files for name, tensor in _tensors_of(file)}
    stays = {INDEX, STATE, SUMS, *(file.name for file in files)}
    extra = {
        path.name: path.read_bytes()
        for path in sorted(source.iterdir())
        if path.is_file()
        and path.name not in stays
        and not path.name.startswith(".")
        and path.suffix not in (".bin", ".pt", ".pth")
        and path.stat().st_size <= _MAX_EXTRA_BYTES
    }
    return whole(tensors, {"step": 0}, extra_files=extra)


def _tensors_of(file: Path) -> Iterable[tuple[str, Tensor]]:
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - not a mapping
            yield name, opened.get_tensor(name)


def _distributed(source: Path) -> Content:
    """Parameters, buffers and optimizer state; torch's own reader unpickles `.metadata`, so import only what
    you trust."""
    reader = FileSystemReader(source)
    tensors = {
        name: torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    if not tensors:
        raise CheckpointError(
            f"{source} lists no tensors",
            rule="parameters are saved as tensors or DTensors",
            fix="save the model's state dict, for example dcp.save({'model': model.state_dict()})",
        )
    load(tensors, storage_reader=reader, no_dist=True)
    optimizer: dict[str, dict[str, Tensor]] = {}
    model: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _STATE_OF.match(name)
        if match:
            optimizer.setdefault(match[1], {})[match[2]] = tensor
        elif not re.match(r"^(?:.+\.)?optim(?:izer)?s?\.param_groups\.", name):
            model[name] = tensor
    stored, aliases = untie(_without_prefix(model, set(optimizer)))
    steps = [int(keys["step"]) for keys in optimizer.values() if "step" in keys]
    state = {"step": max(steps, default=0), "samples": 0, "last_weight": None}
    # Neither the class nor the settings are in such a folder.
    settings = {"optimizer": {"kind": None, "groups": None}} if optimizer else {}
    return whole(stored, {**state, **settings}, aliases, optimizer)


def _without_prefix(model: dict[str, Tensor], trained: set[str]) -> dict[str, Tensor]:
    """Names as the model has them: without what a surrounding dictionary put before all of them."""
    first = next(iter(model), "")
    prefixes = [first[: place + 1] for place, letter in enumerate(first) if letter == "."]
    for prefix in prefixes:
        names = {name.removeprefix(prefix) for name in model if name.startswith(prefix)}
        if len(names) == len(model) and (names >= trained if trained else prefix == "model."):
            if trained and set(model) >= trained:
                break
            return {name.removeprefix(prefix): tensor for name, tensor in model.items()}
    return model
