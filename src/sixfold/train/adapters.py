"""Adapters of a run: put on its model, written as `peft` reads them, and read as `peft` wrote them.

Called where a model is built and where a run ends. What an adapter computes is `models.lora`'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from sixfold.base.errors import CheckpointError, ConfigError
from sixfold.config import ModelConfig
from sixfold.models.lora import FACTORS, adapters_of, add_adapters
from sixfold.train.folder import write_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TARGETS = ("q_proj", "v_proj")
_PREFIX = "base_model.model."
_ONLY_PLAIN = {"bias": "none", "use_dora": False, "use_rslora": False, "fan_in_fan_out": False}
"""Settings of `peft` that change what an adapter computes, and the value under which it is ours."""


def is_asked(asked: ModelConfig) -> bool:
    """Whether a run trains adapters beside a frozen model."""
    return asked.lora_rank is not None or asked.lora_from is not None


def adapt(module: nn.Module, asked: ModelConfig, seed: int) -> None:
    """Put adapters on `module` as the configuration says; fresh ones, or those of `model.lora_from`.

    Raises:
        ConfigError: no projection has one of the names.
        CheckpointError: the folder holds no adapters of this model.
    """
    if asked.lora_from is not None:
        _adapt_from(module, asked.lora_from, seed)
        return
    assert asked.lora_rank is not None, "asked before"
    targets = asked.lora_targets or TARGETS
    alpha = asked.lora_alpha if asked.lora_alpha is not None else 2.0 * asked.lora_rank
    if not add_adapters(module, targets, asked.lora_rank, alpha, seed):
        _raise_no_target(module, targets)


def write_adapter(folder: Path, module: nn.Module, base: Path | None) -> None:
    """Write the adapters of a whole module into a folder that `peft.PeftModel.from_pretrained` reads.

    One that is there already is of the same run, so the settings are the same: whatever stops it leaves the
    old weights or the new ones.

    Args:
        base: the model that they belong to.

    Raises:
        SaveError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    names, first = [], None
    for name, part in adapters_of(module):
        names.append(name.rpartition(".")[2])
        first = first or part
        for factor in FACTORS:
            weight = part.get_submodule(factor).get_parameter("weight")
            tensors[f"{_PREFIX}{name}.{factor}.weight"] = weight.detach().float().cpu().contiguous()
    assert first is not None, "written for models with adapters alone"
    rank = first.lora_A.weight.shape[0]
    settings = {
        **_ONLY_PLAIN,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base) if base is not None else None,
        "r": rank,
        "lora_alpha": first.lora_scale * rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(set(names)),
        "inference_mode": True,
    }
    write_file(folder / WEIGHTS, to_bytes(tensors, metadata={"format": "pt"}))
    write_file(folder / CONFIG, json.dumps(settings, indent=1).encode())


def _adapt_from(module: nn.Module, folder: Path, seed: int) -> None:
    settings = _settings(folder)
    targets = settings["target_modules"]
    if not add_adapters(module, targets, int(settings["r"]), float(settings["lora_alpha"]), seed):
        _raise_no_target(module, targets)
    tensors = load_file(folder / WEIGHTS)
    expected = {
        f"{_PREFIX}{name}.{factor}.weight": part.get_submodule(factor).get_parameter("weight")
        for name, part in adapters_of(module)
        for factor in FACTORS
    }
    wrong = sorted(expected.keys() ^ tensors.keys())
    wrong += [n for n, own in expected.items() if n in tensors and tensors[n].shape != own.shape]
    if wrong:
        raise CheckpointError(
            f"{folder / WEIGHTS} does not fit: {len(wrong)} tensor(s) are on one side alone or of another "
            f"shape, for example {wrong[0]}",
            rule="an adapter has two matrices for each projection that adapter_config.json names",
            fix="set model.hf to the model that the adapter was trained on",
        )
    with torch.no_grad():
        for name, own in expected.items():
            own.copy_(tensors[name])


def _settings(folder: Path) -> Mapping[str, Any]:
    try:
        settings: dict[str, Any] = json.loads((folder / CONFIG).read_text())
        targets = settings["target_modules"]
        settings["target_modules"] = [targets] if isinstance(targets, str) else list(targets)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"model.lora_from = {str(folder)!r}: {error}",
            rule=f"a folder of adapters holds {CONFIG} and {WEIGHTS}",
            fix="name a folder that peft or a run with model.lora_rank has written",
        ) from error
    odd = {key: settings[key] for key, plain in _ONLY_PLAIN.items() if settings.get(key, plain) != plain}
    if odd:
        raise CheckpointError(
            f"{folder / CONFIG} has {', '.join(f'{key} = {value!r}' for key, value in odd.items())}",
            rule="adapters are plain low-rank products beside projections",
            fix="train the adapter without that",
        )
    return settings


def _raise_no_target(module: nn.Module, targets: Any) -> None:
    have = sorted(
        {name.rpartition(".")[2] for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    )
    raise ConfigError(
        f"no projection of {type(module).__name__} is named {' or '.join(targets)}; it has {', '.join(have)}",
        rule="model.lora_targets names projections by the end of their names",
        fix=f"set model.lora_targets = {have[:2]}",
    )
