"""DeepSpeed's checkpoints in native form. The files here are laid out as its own are, without having it
installed; `tests/fresh/test_deepspeed.py` compares with real ones."""

from __future__ import annotations

import enum
import math
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sixfold
from sixfold.base.errors import CheckpointError
from sixfold.checkpoint import open_checkpoint
from sixfold.checkpoint.importing import import_folder, kind_of

GROUPS = [{"a.weight": (5, 3), "b.weight": (3, 3)}, {"a.bias": (5,), "gain": ()}]
SHAPES = {name: shape for group in GROUPS for name, shape in group.items()}
ALIGNED_TO = 4
"""Groups of stages 1 and 2 are filled up to a multiple of it."""


def numbers(name: str, key: str) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name + key)))
    return torch.randn(SHAPES[name], generator=generator)


class ZeroStageEnum(enum.IntEnum):
    one, two, three = 1, 2, 3


class fragment_address:
    def __init__(self, numel: int, start: int) -> None:
        self.numel, self.start = numel, start


class LossScaler:
    def __init__(self) -> None:
        self.cur_scale, self.dynamic = 1.0, False


@pytest.fixture
def classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes under the names by which its files call them."""
    for name, kind in (
        ("deepspeed.runtime.zero.config", ZeroStageEnum),
        ("deepspeed.utils.tensor_fragment", fragment_address),
        ("deepspeed.runtime.fp16.loss_scaler", LossScaler),
    ):
        words = name.split(".")
        for length in range(1, len(words) + 1):
            parent = ".".join(words[:length])
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        setattr(sys.modules[name], kind.__name__, kind)
        monkeypatch.setattr(kind, "__module__", name)


def write(root: Path, stage: int, num_ranks: int, dtype: torch.dtype, **more: Any) -> Path:
    """One checkpoint under `root`; returns the folder of its step."""
    folder = root / "global_step3"
    folder.mkdir(parents=True)
    (root / "latest").write_text("global_step3")
    for rank in range(num_ranks):
        flats, slices = share(stage, num_ranks, rank)
        inner = {
            "state": {
                index: {"step": torch.tensor(3.0), **{key: each[key] for key in ("exp_avg", "exp_avg_sq")}}
                for index, each in enumerate(flats)
            }
        }
        masters = [each["master"] for each in flats]
        common = {"zero_stage": ZeroStageEnum(stage), "loss_scaler": LossScaler(), "overflow": False}
        if stage == 3:
            common |= {
                "partition_count": num_ranks,
                "optimizer_state_dict": inner,
                "fp32_flat_groups": masters,
            }
        else:
            common |= {
                "partition_count": [num_ranks] * 2,
                "base_optimizer_state": inner,
                "single_partition_of_fp32_groups": masters,
                "param_slice_mappings": slices,
            }
        name = f"{'' if dtype == torch.float32 else 'bf16_'}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": common, "ds_version": "0.19.8"}, folder / name)
        if rank == 0 or stage == 3:
            prefix = f"zero_pp_rank_{rank}_" if stage == 3 else ""
            states = model_states(stage, num_ranks, rank, dtype) | more
            torch.save(states, folder / f"{prefix}mp_rank_00_model_states.pt")
    return folder


def share(stage: int, num_ranks: int, rank: int) -> tuple[list[dict[str, Tensor]], list[Any]]:
    """One rank's part of every group, key by key, and where its parameters lie in it."""
    flats: list[dict[str, Tensor]] = []
    slices = []
    for group in GROUPS:
        flat: dict[str, Tensor] = {}
        for key in ("master", "exp_avg", "exp_avg_sq"):
            if stage == 3:
                parts = []
                for name, shape in group.items():
                    size = -(-math.prod(shape) // num_ranks)
                    whole = nn.functional.pad(
                        numbers(name, key).reshape(-1), (0, size * num_ranks - math.prod(shape)), value=9e9
                    )
                    parts.append(whole[rank * size : (rank + 1) * size])
                flat[key] = torch.cat(parts)
            else:
                whole = torch.cat([numbers(name, key).reshape(-1) for name in group])
                size = -(-len(whole) // (num_ranks * ALIGNED_TO)) * ALIGNED_TO
                padded = nn.functional.pad(whole, (0, size * num_ranks - len(whole)), value=9e9)
                flat[key] = padded[rank * size : (rank + 1) * size].clone()
        places, at = OrderedDict(), 0
        for name, shape in group.items():
            start, stop = max(at, rank * size), min(at + math.prod(shape), (rank + 1) * size)
            if start < stop:
                places[name] = fragment_address(stop - start, start - rank * size)
            at += math.prod(shape)
        flats.append(flat)
        slices.append(places)
    return flats, slices


def model_states(stage: int, num_ranks: int, rank: int, dtype: torch.dtype) -> dict[str, Any]:
    frozen = torch.arange(7.0).to(dtype)
    size = -(-7 // num_ranks)
    fragment = nn.functional.pad(frozen, (0, size * num_ranks - 7))[rank * size : (rank + 1) * size]
    module = {"seen": torch.tensor([4.0, 2.0])}
    for name in SHAPES:
        module[name] = torch.empty(0, dtype=dtype) if stage == 3 else numbers(name, "master").to(dtype)
    module["base"] = torch.empty(0, dtype=dtype) if stage == 3 else frozen
    module["tied.weight"] = module["b.weight"]
    return {
        "module": OrderedDict(module),
        "param_shapes": [OrderedDict({n: torch.Size(s) for n, s in group.items()}) for group in GROUPS],
        "shared_params": {"tied.weight": "b.weight"} if rank == 0 else {},
        "frozen_param_shapes": {"base": torch.Size([7])} if stage == 3 else None,
        "frozen_param_fragments": {"base": fragment.clone()} if stage == 3 else None,
        "global_steps": 3,
        "global_samples": 24,
        "skipped_steps": 1,
        "lr_scheduler": None,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("stage", "num_ranks"), [(1, 1), (1, 3), (2, 2), (3, 1), (3, 2), (3, 4)])
def test_partitions_come_together(
    stage: int, num_ranks: int, dtype: torch.dtype, tmp_path: Path, classes: None
) -> None:
    folder = write(tmp_path / "theirs", stage, num_ranks, dtype)
    assert kind_of(tmp_path / "theirs") == kind_of(folder) == "a DeepSpeed checkpoint"
    import_folder(tmp_path / "theirs", tmp_path / "native")
    saved = open_checkpoint(tmp_path / "native")
    saved.verify()
    assert set(saved.model_names) == {*SHAPES, "seen", "base", "tied.weight"}
    assert saved.aliases == {"tied.weight": "b.weight"}
    assert (saved.step, saved.state["samples"], saved.state["skipped"]) == (3, 24, 1)
    for name in SHAPES:
        state = saved.read_optimizer(name)
        assert torch.equal(saved.read_model(name), numbers(name, "master").to(dtype)), name
        assert state.pop("step").item() == 3
        master = state.pop("master", None)
        assert (master is None) == (dtype == torch.float32)
        assert master is None or torch.equal(master, numbers(name, "master"))
        assert state.keys() == {"exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, numbers(name, key)) for key, value in state.items()), name
    assert torch.equal(saved.read_model("base"), torch.arange(7.0).to(dtype))
    assert saved.read_model("seen").tolist() == [4, 2]


def test_an_engine_goes_on_from_it(tmp_path: Path, classes: None) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.tied = (
                nn.Linear(3, 5),
                nn.Linear(3, 3, bias=False),
                nn.Linear(3, 3, bias=False),
            )
            self.tied.weight = self.b.weight
            self.gain = nn.Parameter(torch.ones(()))
            self.base = nn.Parameter(torch.zeros(7), requires_grad=False)
            self.register_buffer("seen", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.tied(self.b(x))).square().mean() * self.gain + self.base.sum()

    write(tmp_path / "theirs", 3, 2, torch.float32)
    import_folder(tmp_path / "theirs", tmp_path / "native")
    engine = sixfold.initialize(Model(), config={})
    engine.load(tmp_path / "native")
    assert (engine.num_steps, engine.num_skipped, engine.num_samples) == (3, 1, 24)
    state = {key: value for state in engine.optimizer.state.values() for key, value in state.items()}
    assert state["step"].item() == 3
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}


class Stranger:
    """An object that would have to be made from a pickle."""


def test_what_is_not_whole_or_not_understood_is_refused_by_name(
    tmp_path: Path, classes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(folder: Path, match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            import_folder(folder, tmp_path / "native")
        assert not (tmp_path / "native").exists()

    folder = write(tmp_path / "1", 1, 2, torch.float32)
    last = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "1", r"zero_pp_rank_1_mp_rank_00_optim_states\.pt cannot be read")
    last.unlink()
    refused(tmp_path / "1", r"written by 2 ranks, and files of 1 are here")
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    refused(tmp_path / "1", r"1 file\(s\) of the model, 0 of the optimizer")
    folder = write(tmp_path / "2", 3, 3, torch.float32)
    (folder / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    refused(tmp_path / "2", r"the model file\(s\) of rank\(s\) 1 are missing")
    folder = write(tmp_path / "3", 1, 1, torch.float32, client_state=Stranger())
    refused(tmp_path / "3", r"mp_rank_00_model_states\.pt cannot be read: .*")
    folder = write(tmp_path / "4", 1, 1, torch.float32)
    (folder / "zero_pp_rank_0_mp_rank_01_optim_states.pt").touch()
    refused(tmp_path / "4", "cut by tensor parallelism")
    write(tmp_path / "5", 2, 2, torch.float32, param_shapes=[{"a.weight": torch.Size([5, 4])}])
    refused(tmp_path / "5", "not laid out as in DeepSpeed|a.weight has 20 numbers, and 15 are in the files")
    (tmp_path / "6").mkdir()
    (tmp_path / "6" / "latest").write_text("global_step9")
    refused(tmp_path / "6", "nor files of ZeRO partitions")
