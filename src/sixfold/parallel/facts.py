"""Module facts: names, shapes, types, ties and repeated blocks of a module, as plain data.

The plan decides from these; nothing is changed and no tensor's content is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from sixfold.base.errors import ModelError
from sixfold.plan.units import ParameterFacts

DTYPE_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
ROUTER_LOGITS = "output_router_logits"
"""Setting by which a Hugging Face model with experts adds their balance to its loss."""


def dtype_name(dtype: torch.dtype) -> str:
    """Sixfold's short name of a floating type; torch's own for every other type."""
    return DTYPE_NAMES.get(dtype, torch_name(dtype))


def compute_type(name: str | None) -> torch.dtype | None:
    """What `precision.compute` names; None where it is unset, and inputs stay as they are given."""
    return None if name is None else DTYPES[name]


def torch_name(dtype: torch.dtype) -> str:
    """What torch calls a type, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def torch_type(name: str) -> torch.dtype:
    """Inverse of `torch_name`."""
    kind = getattr(torch, name)
    assert isinstance(kind, torch.dtype), f"{name} names a type"
    return kind


@dataclass(frozen=True)
class ModuleFacts:
    """What the rooms below need to know of a module.

    Args:
        parameters: in module order, every tensor once, under its first name.
        aliases: further names of tied tensors -> first name.
        has_batch_stats: whether a submodule takes statistics over the batch.
        on_meta: whether any tensor has no storage yet.
    """

    parameters: tuple[ParameterFacts, ...]
    aliases: Mapping[str, str]
    has_batch_stats: bool
    on_meta: bool


def module_facts(
    module: nn.Module,
    groups: Iterable[Iterable[nn.Parameter]] = (),
    *,
    whole_groups: Sequence[int] = (),
    blocks: Sequence[str],
) -> ModuleFacts:
    """Read the facts of `module`.

    Args:
        groups: the optimizers' parameter groups, when there are any already.
        whole_groups: numbers of those whose parameters are updated whole.
        blocks: names of its blocks, see `block_names`.
    """
    group_of = {parameter: index for index, group in enumerate(groups) for parameter in group}
    first_name: dict[nn.Parameter, str] = {}
    aliases: dict[str, str] = {}
    block_of: dict[nn.Parameter, str | None] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        block = _block_of(name, blocks)
        if parameter in first_name:
            aliases[name] = first_name[parameter]
            # What several blocks share belongs to none of them.
            block_of[parameter] = block if block == block_of[parameter] else None
        else:
            first_name[parameter] = name
            block_of[parameter] = block
    parameters = tuple(
        ParameterFacts(
            name=name,
            shape=tuple(parameter.shape),
            dtype=dtype_name(parameter.dtype),
            trainable=parameter.requires_grad,
            group=group_of.get(parameter, 0),
            block=block_of[parameter],
            whole=group_of.get(parameter) in whole_groups,
        )
        for parameter, name in first_name.items()
    )
    return ModuleFacts(
        parameters=parameters,
        aliases=aliases,
        has_batch_stats=any(isinstance(part, BATCH_NORMS) for part in module.modules()),
        on_meta=any(tensor.is_meta for tensor in (*first_name, *module.buffers())),
    )


def block_names(module: nn.Module, patterns: Sequence[str] | None) -> list[str]:
    """Names of a module's blocks: those that `patterns` fit, or without any the repeated ones.

    Raises:
        ModelError: a pattern fits no module.
    """
    return repeated_blocks(module) if patterns is None else named_blocks(module, patterns)


def repeated_blocks(module: nn.Module) -> list[str]:
    """Names of the repeated blocks: the children of the lists with most equal children.

    A block list is a ModuleList or Sequential of which at least two children are of one class that
    holds parameters; nested lists count once, at the outermost level.
    """
    blocks: list[str] = []
    for name, part in module.named_modules():
        inside = any(name.startswith(block + ".") for block in blocks)
        if inside or not isinstance(part, (nn.ModuleList, nn.Sequential)):
            continue
        kinds = Counter(type(child) for child in part if any(True for _ in child.parameters()))
        if kinds and max(kinds.values()) >= 2:
            prefix = f"{name}." if name else ""
            blocks += [f"{prefix}{child_name}" for child_name, _ in part.named_children()]
    return blocks


def named_blocks(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the modules that a pattern fits and that lie inside no other such module.

    Raises:
        ModelError: a pattern fits no module.
    """
    names = [name for name, _ in module.named_modules() if name]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ModelError(
                f"layout.blocks: {pattern!r} fits none of {len(names)} modules of {type(module).__name__}",
                rule="layout.blocks names modules as module.named_modules() does; * stands for any part",
                fix=f"take names like {', '.join(map(repr, names[:3]))}, or leave layout.blocks unset",
            )
    blocks: list[str] = []
    for name in names:
        fits = any(fnmatchcase(name, pattern) for pattern in patterns)
        if fits and not any(name.startswith(block + ".") for block in blocks):
            blocks.append(name)
    return blocks


def _block_of(name: str, blocks: Sequence[str]) -> str | None:
    return next((block for block in blocks if name.startswith(block + ".")), None)


def persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that are part of a module's saved state."""
    kept = module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}
