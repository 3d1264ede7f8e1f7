"""`sixfold ckpt` and `sixfold export`, and foreign checkpoints in native form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

import sixfold as package
from sixfold.base.errors import EXIT_DONE, EXIT_USAGE, CheckpointError
from sixfold.checkpoint import open_checkpoint, save, step_folder, whole
from sixfold.checkpoint.importing import import_folder
from sixfold.train.folder import held
from tests.one.terminal import Terminal


def content(step: int, shift: float = 0.0) -> Any:
    model = {"w": torch.arange(6.0).view(2, 3) + shift, "b": torch.ones(2, dtype=torch.bfloat16)}
    return whole(
        model,
        {"step": step, "optimizer": {"groups": [{"lr": 0.1 * step}]}},
        optimizer={"w": {"m": model["w"] * 2}},
        extra_files={"config.json": b"{}"},
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with four checkpoints, one of them damaged, one without manifest, and a leftover."""
    inside = tmp_path / "run" / "checkpoints"
    for step in (1, 2, 3, 4):
        save(step_folder(inside, step), content(step))
    path = step_folder(inside, 3) / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (step_folder(inside, 2) / "manifest.json").unlink()
    (inside / ".tmp-step-00000005").mkdir()
    return tmp_path / "run"


def test_ls(sixfold: Terminal, run: Path) -> None:
    assert sixfold("ckpt", "ls", run) == EXIT_DONE
    lines = sixfold.out.splitlines()
    assert "step-00000002   not complete: " in lines[0]
    assert [line.split()[2] for line in lines[1:]] == ["1", "3", "4"]
    assert sixfold("ckpt", "ls", step_folder(run / "checkpoints", 4), "--json") == EXIT_DONE
    (row,) = json.loads(sixfold.out)
    assert row["step"] == 4
    assert row["problem"] is None
    assert sixfold("ckpt", "ls", run / "checkpoints" / "step-00000004" / "nowhere") == EXIT_USAGE
    assert "nowhere is not there" in sixfold.err


def test_verify_reads_every_byte(sixfold: Terminal, run: Path) -> None:
    assert sixfold("ckpt", "verify", run, "--json") == EXIT_USAGE
    problems = {Path(row["path"]).name: row["problem"] for row in json.loads(sixfold.out)}
    assert "optimizer.safetensors: crc32" in problems["step-00000003"]
    assert problems["step-00000002"]
    assert problems["step-00000001"] is problems["step-00000004"] is None
    assert sixfold("ckpt", "verify", step_folder(run / "checkpoints", 1)) == EXIT_DONE
    assert "every byte as it was saved" in sixfold.out


def test_diff(sixfold: Terminal, run: Path) -> None:
    first = step_folder(run / "checkpoints", 1)
    assert sixfold("ckpt", "diff", first, first) == EXIT_DONE
    save(run / "other", whole({"w": torch.arange(6.0).view(2, 3) + 0.5, "c": torch.ones(1)}, {"step": 9}))
    assert sixfold("ckpt", "diff", first, run / "other", "--json") == 1
    found = {row["what"]: row for row in json.loads(sixfold.out)}
    assert found["model w"]["largest"] == 0.5
    assert found["model b"]["second"] == found["model c"]["first"] == "absent"
    assert found["optimizer w/m"]["second"] == "absent"
    assert (found["state step"]["first"], found["state step"]["second"]) == ("1", "9")
    assert "state optimizer.groups[0].lr" in found
    assert sixfold("ckpt", "diff", first, run / "other") == 1
    assert "differs by up to 0.5" in sixfold.out


def test_gc(sixfold: Terminal, run: Path) -> None:
    def left() -> set[str]:
        return {path.name for path in (run / "checkpoints").iterdir()}

    before = left()
    assert sixfold("ckpt", "gc", run, "--keep-last", "1", "--keep-every", "3", "--dry-run", "--json") == 0
    planned = {Path(path).name for path in json.loads(sixfold.out)["would_remove"]}
    assert planned == {".tmp-step-00000005", "step-00000001"}
    assert left() == before
    assert sixfold("ckpt", "gc", run, "--keep-last", "1", "--keep-every", "3") == EXIT_DONE
    assert left() == before - planned
    assert sixfold("ckpt", "gc", run, "--keep-last", "0") == EXIT_USAGE


def test_gc_is_refused_beside_a_run_under_way(sixfold: Terminal, run: Path) -> None:
    (run / "config.toml").touch()
    before = set(run.rglob("*"))
    with held(run):
        for folder in (run, run / "checkpoints"):
            assert sixfold("ckpt", "gc", folder, "--keep-last", "1") == EXIT_USAGE
            assert f"{run} is in use" in sixfold.err
        assert sixfold("ckpt", "gc", run, "--keep-last", "1", "--dry-run") == EXIT_DONE
    assert set(run.rglob("*")) == before | {run / ".lock"}
    assert sixfold("ckpt", "gc", run, "--keep-last", "1") == EXIT_DONE


@pytest.mark.parametrize("copy", [False, True])
def test_export_takes_the_model_alone(sixfold: Terminal, run: Path, copy: bool) -> None:
    source = step_folder(run / "checkpoints", 4)
    target = run / "exported"
    flags = ["--copy"] if copy else []
    assert sixfold("export", source, target, "--dry-run", *flags) == EXIT_DONE
    assert not target.exists()
    assert sixfold("export", source, target, *flags) == EXIT_DONE
    assert {path.name for path in target.iterdir()} == {"config.json", "model.safetensors"}
    assert torch.equal(load_file(target / "model.safetensors")["w"], torch.arange(6.0).view(2, 3))
    assert (target / "model.safetensors").samefile(source / "model.safetensors") is not copy
    for existing in (target, ".", run / ".."):
        assert sixfold("export", source, existing) == EXIT_USAGE
        assert "an export makes a new folder" in sixfold.err
    assert (
        sixfold("export", step_folder(run / "checkpoints", 3), run / "e3") == EXIT_DONE
    )  # its model is whole
    (source / "config.json").write_bytes(b"}{")
    assert sixfold("export", source, run / "e4") == EXIT_USAGE
    assert "config.json: crc32" in sixfold.err
    assert not (run / "e4").exists()


def test_export_keeps_the_index_of_several_files(tmp_path: Path, sixfold: Terminal) -> None:
    tensors = {f"layer.{i}": torch.randn(10, 10) for i in range(5)}
    save(
        tmp_path / "c",
        whole(tensors, {"step": 1}, optimizer={"layer.0": {"m": tensors["layer.0"]}}),
        max_file_bytes=900,
    )
    assert sixfold("export", tmp_path / "c", tmp_path / "e") == EXIT_DONE
    names = {path.name for path in (tmp_path / "e").iterdir()}
    assert names == {
        "model.safetensors.index.json",
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
    }
    assert sixfold("ckpt", "import", tmp_path / "e", tmp_path / "back", "--json") == EXIT_DONE
    assert json.loads(sixfold.out) == {
        "kind": "a Hugging Face folder",
        "folder": str(tmp_path / "back"),
        "num_tensors": 5,
    }
    back = dict(open_checkpoint(tmp_path / "back").model())
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    (tmp_path / "e" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: No such file"):
        import_folder(tmp_path / "e", tmp_path / "again")
    (tmp_path / "e" / "model-00001-of-00003.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="is whole"):
        import_folder(tmp_path / "e", tmp_path / "again")


def test_a_hugging_face_folder_goes_into_an_engine(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    (tmp_path / "hf").mkdir()
    save_file(dict(model.state_dict()), tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    import_folder(tmp_path / "hf", tmp_path / "native")
    assert open_checkpoint(tmp_path / "native").read_file("tokenizer.json") == b"{}"
    engine = package.initialize(nn.Linear(3, 2), config={})
    engine.load(tmp_path / "native")
    assert torch.equal(engine.full_state_dict()["weight"], model.weight)


@pytest.mark.parametrize("prefix", [True, False])
def test_a_folder_of_torch_distributed_checkpoint_goes_on(tmp_path: Path, prefix: bool) -> None:
    def build() -> tuple[nn.Module, torch.optim.AdamW]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
        model[1].eval()
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model: nn.Module, optimizer: torch.optim.AdamW) -> None:
        optimizer.zero_grad()
        model[0](torch.arange(12.0).view(4, 3)).square().mean().backward()
        model[2](torch.ones(4, 4)).square().mean().backward()
        for parameter in model[1].parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    model, optimizer = build()
    for _ in range(3):
        step(model, optimizer)
    states, optimizer_states = get_state_dict(model, optimizer)
    content = (
        {"model": states, "optim": optimizer_states} if prefix else {**states, "optimizer": optimizer_states}
    )
    dcp.save(content, checkpoint_id=tmp_path / "dcp", no_dist=True)
    import_folder(tmp_path / "dcp", tmp_path / "native")
    saved = open_checkpoint(tmp_path / "native")
    assert set(saved.model_names) == set(model.state_dict())
    assert saved.step == 3
    for name, tensor in model.state_dict().items():
        assert torch.equal(saved.read_model(name), tensor), name
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(saved.read_optimizer(name)[key], value), (name, key)
    fresh, made = build()
    engine = package.initialize(fresh, optimizer=made, config={"model": {"batch_stats": "micro"}})
    engine.load(tmp_path / "native")
    assert engine.num_steps == 3
    state = {key: value for state in engine.optimizer.state.values() for key, value in state.items()}
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_what_is_no_foreign_checkpoint_is_said(tmp_path: Path) -> None:
    save(tmp_path / "c", content(1))
    with pytest.raises(CheckpointError, match="is a native checkpoint"):
        import_folder(tmp_path / "c", tmp_path / "d")
    with pytest.raises(CheckpointError, match="neither safetensors files, nor"):
        import_folder(tmp_path, tmp_path / "d")
