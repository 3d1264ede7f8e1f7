"""DeepSpeed's checkpoints of ZeRO stages 1 to 3 as whole logical tensors.

Called by `importing`. Each of its ranks pickled a share of flat buffers; here they are read by
`torch.load(weights_only=True)`, which makes tensors and plain containers and nothing else, and laid together
under the parameters' names. The few classes of its own that stand in the files are read as plain values, so
it need not be installed. Nothing is converted and nothing is guessed: what is not understood is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from sixfold.base.errors import CheckpointError
from sixfold.checkpoint.content import Content, whole

_LATEST = "latest"
_MODEL = re.compile(r"^(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt$")
_OPTIMIZER = re.compile(r"^(?:\w+_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")


class _Plain:
    """Stands in for a class whose attributes alone matter."""


_READ_AS: tuple[tuple[Any, str], ...] = (
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Plain, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Plain, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Plain, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
)


def partitions_in(source: Path) -> Path | None:
    """The folder with the files of one step: `source`, or the one that its `latest` names; None: neither."""
    folder = source
    if (source / _LATEST).is_file():
        folder = source / (source / _LATEST).read_text(errors="replace").strip()
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return folder if any(_OPTIMIZER.match(name) or _MODEL.match(name) for name in names) else None


def read_partitions(folder: Path) -> Content:
    """Model, masters, state of the optimizer and counters.

    Args:
        folder: what `partitions_in` found.

    Raises:
        CheckpointError: a file is missing, damaged or of another kind; it is named.
    """
    model_files, optimizer_files = _files(folder)
    if not model_files or not optimizer_files:
        _refuse(folder, f"{len(model_files)} file(s) of the model, {len(optimizer_files)} of the optimizer")
    models = [_load(path) for path in model_files]
    try:
        ranks = [_Rank.of(_load(path)["optimizer_state_dict"]) for path in optimizer_files]
        return _content(folder, models, ranks)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        _refuse(folder, f"its files are not laid out as in DeepSpeed 0.19: {error!r}")


def _content(folder: Path, models: list[dict[str, Any]], ranks: list[_Rank]) -> Content:
    first = models[0]
    if len(ranks) != ranks[0].num_ranks or (ranks[0].stage == 3 and len(models) != len(ranks)):
        _refuse(folder, f"it was written by {ranks[0].num_ranks} ranks, and files of {len(ranks)} are here")
    shapes = {name: tuple(shape) for group in first["param_shapes"] for name, shape in group.items()}
    masters, states = _joined(folder, shapes, ranks)
    aliases = {str(alias): str(name) for each in models for alias, name in each["shared_params"].items()}
    frozen = _frozen(models) if ranks[0].stage == 3 else {}
    model, optimizer = {}, {}
    for name, tensor in first["module"].items():
        if name in aliases:
            continue
        if name in masters:
            optimizer[name] = states[name]
            model[name] = masters[name].to(tensor.dtype)
            if tensor.dtype != masters[name].dtype:
                optimizer[name]["master"] = masters[name]
        else:
            model[name] = frozen.get(name, tensor)
    if absent := sorted(masters.keys() - model.keys()):
        _refuse(folder, f"the model has no {', '.join(absent[:4])}, which the optimizer trains")
    state: dict[str, Any] = {
        "step": int(first["global_steps"]),
        "samples": int(first["global_samples"]),
        "skipped": int(first["skipped_steps"]),
        "last_weight": None,
    }
    if any(states.values()):
        # Classes and groups are others here; whoever loads it brings the settings.
        state["optimizer"] = {"kind": None, "groups": None}
    return whole(model, state, aliases, {name: keys for name, keys in optimizer.items() if keys})


@dataclass(frozen=True)
class _Rank:
    """What one rank wrote of the optimizer.

    Args:
        flats: its share of the masters, a buffer for each group.
        states: key -> numbers beside each buffer, or one number for all of it.
        slices: group -> parameter -> (start in the buffer, how many); None where parameters are cut one by
            one, and follow each other through the buffers.
    """

    stage: int
    num_ranks: int
    flats: list[Tensor]
    states: list[dict[str, Tensor]]
    slices: list[dict[str, tuple[int, int]]] | None

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> _Rank:
        stage, counts = int(saved["zero_stage"]), saved["partition_count"]
        flats = saved["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"]
        inner = saved["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
        states = inner["state"]
        slices = None
        if stage < 3:
            slices = [
                {name: (int(place.start), int(place.numel)) for name, place in group.items()}
                for group in saved["param_slice_mappings"]
            ]
        return cls(
            stage,
            int(max(counts) if isinstance(counts, list) else counts),
            list(flats),
            [
                {key: torch.as_tensor(value) for key, value in states.get(index, {}).items()}
                for index in range(len(flats))
            ],
            slices,
        )

    def places(self, shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, int, int, int]]:
        """(parameter, buffer, start, how many) of what this rank has."""
        if self.slices is not None:
            for index, group in enumerate(self.slices):
                for name, (start, count) in group.items():
                    yield name, index, start, count
            return
        index = start = 0
        for name, shape in shapes.items():
            count = -(-math.prod(shape) // self.num_ranks)
            if start == self.flats[index].numel():
                index, start = index + 1, 0
            yield name, index, start, count
            start += count


def _joined(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], ranks: Sequence[_Rank]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Masters and states of all parameters, whole."""
    parts: dict[str, dict[str | None, list[Tensor]]] = {name: {} for name in shapes}
    states: dict[str, dict[str, Tensor]] = {name: {} for name in shapes}
    for rank in ranks:
        for name, index, start, count in rank.places(shapes):
            flat = rank.flats[index]
            parts[name].setdefault(None, []).append(flat[start : start + count])
            for key, value in rank.states[index].items():
                if value.dim() == 0:
                    states[name][key] = value.reshape(()).clone()
                else:
                    parts[name].setdefault(key, []).append(value[start : start + count])
    masters: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        for part, found in parts[name].items():
            numel = math.prod(shape)
            tensor = torch.cat(found)
            # Where each parameter is cut for itself its last part is filled up.
            surplus = tensor.numel() - numel
            if not 0 <= surplus < (len(ranks) if ranks[0].stage == 3 else 1):
                _refuse(folder, f"{name} has {numel} numbers, and {tensor.numel()} are in the files")
            if part is None:
                masters[name] = tensor[:numel].view(shape)
            else:
                states[name][part] = tensor[:numel].view(shape)
        if name not in masters:
            _refuse(folder, f"no rank has a part of {name}")
    return masters, states


def _frozen(models: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Parameters that are not trained, where they are cut too."""
    return {
        name: torch.cat([each["frozen_param_fragments"][name] for each in models])[: math.prod(shape)].view(
            tuple(shape)
        )
        for name, shape in (models[0]["frozen_param_shapes"] or {}).items()
    }


def _files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files of the model and of the optimizer, by rank, none left out."""
    models: dict[int, Path] = {}
    optimizers: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        for pattern, files in ((_MODEL, models), (_OPTIMIZER, optimizers)):
            match = pattern.match(path.name)
            if match is not None and int(match[2]) != 0:
                _refuse(folder, f"{path.name} belongs to a model that is cut by tensor parallelism")
            if match is not None:
                files[int(match[1] or 0)] = path
        if "expert" in path.name or path.name.startswith("layer_"):
            _refuse(folder, f"{path.name} belongs to a model with experts or pipeline stages")
    for kind, files in (("model", models), ("optimizer", optimizers)):
        if missing := sorted(set(range(max(files, default=-1) + 1)) - files.keys()):
            _refuse(folder, f"the {kind} file(s) of rank(s) {', '.join(map(str, missing))} are missing")
    return [models[rank] for rank in sorted(models)], [optimizers[rank] for rank in sorted(optimizers)]


def _load(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(list(_READ_AS)):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # unpickling raises whatever the bytes say
        raise CheckpointError(
            f"{path} cannot be read: {str(error).splitlines()[0]}",
            rule="files hold tensors and plain values; no other object is made from a pickle",
            fix="copy the file again; if it holds objects of your own (client_state), save it without them",
        ) from error
    if not isinstance(loaded, dict):
        _refuse(path.parent, f"{path.name} holds a {type(loaded).__name__}")
    return loaded


def _refuse(folder: Path, given: str) -> NoReturn:
    raise CheckpointError(
        f"{folder}: {given}",
        rule="a DeepSpeed checkpoint is of ZeRO stage 1, 2 or 3 over data ranks alone, and whole",
        fix="name the folder that save_checkpoint was given, with every rank's files copied into it",
    )
