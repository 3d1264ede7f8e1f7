"""Module facts: names, shapes, types, ties and repeated blocks of a module, as plain data.

The plan decides from these; nothing is changed and no tensor's content is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sixfold.plan.units import ParameterFacts

DTYPE_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Sixfold's short name of a floating type; torch's own for every other type."""
    return DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


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
) -> ModuleFacts:
    """Read the facts of `module`.

    Args:
        groups: the optimizers' parameter groups, when there are any already.
        whole_groups: numbers of those whose parameters are updated whole.
    """
    group_of = {parameter: index for index, group in enumerate(groups) for parameter in group}
    blocks = repeated_blocks(module)
    first_name: dict[nn.Parameter, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter in first_name:
            aliases[name] = first_name[parameter]
        else:
            first_name[parameter] = name
    parameters = tuple(
        ParameterFacts(
            name=name,
            shape=tuple(parameter.shape),
            dtype=dtype_name(parameter.dtype),
            trainable=parameter.requires_grad,
            group=group_of.get(parameter, 0),
            block=_block_of(name, blocks),
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


def _block_of(name: str, blocks: list[str]) -> int | None:
    return next((index for index, block in enumerate(blocks) if name.startswith(block + ".")), None)
