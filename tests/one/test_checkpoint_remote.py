"""Checkpoints behind a URL: saved, found, read, replaced and removed through fsspec."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch import nn
from upath import UPath

import sixfold as package
from sixfold.base.errors import EXIT_DONE, EXIT_USAGE, CheckpointError
from sixfold.checkpoint import Keep, latest, open_checkpoint, prune, save, whole, writing
from sixfold.checkpoint.remote import folder_at, is_remote
from tests.one.terminal import Terminal

ROOT = "memory://bucket/run"


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An object store in memory, and a temporary folder in which nothing may be left."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    memory = fsspec.filesystem("memory")
    yield memory
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    assert list(tmp_path.glob("sixfold-save-*")) == []


def content(step: int) -> Any:
    return whole({"w": torch.arange(70_000.0) + step}, {"step": step}, optimizer={"w": {"m": torch.ones(3)}})


def test_a_run_is_kept_behind_a_url(sixfold: Terminal) -> None:
    for step in (1, 2, 3):
        save(f"{ROOT}/step-{step}", content(step))
    save(f"{ROOT}/step-1", content(4))  # the run went back
    newest = latest(ROOT)
    assert str(newest) == f"{ROOT}/step-1"
    saved = open_checkpoint(f"{ROOT}/step-1")
    saved.verify()
    assert saved.step == 4
    assert torch.equal(saved.read_model("w"), torch.arange(70_000.0) + 4)
    assert sixfold("ckpt", "ls", ROOT) == EXIT_DONE
    assert [line.split()[2] for line in sixfold.out.splitlines()] == ["2", "3", "4"]
    assert sixfold("ckpt", "verify", ROOT) == EXIT_DONE
    (UPath(ROOT).parent / "config.toml").write_text("")  # of a run that was copied there
    assert sixfold("ckpt", "gc", ROOT, "--keep-last", "2") == EXIT_DONE
    removed = prune(ROOT, Keep(1))
    assert [path.name for path in removed] == ["step-3"]
    assert [path.name for path in UPath(ROOT).iterdir()] == ["step-1"]


def test_what_lies_there_is_exported_and_damage_is_named(
    sixfold: Terminal, tmp_path: Path, store: Any
) -> None:
    save(f"{ROOT}/c", content(1))
    assert sixfold("export", f"{ROOT}/c", tmp_path / "e") == EXIT_DONE
    assert [path.name for path in (tmp_path / "e").iterdir()] == ["model.safetensors"]
    assert sixfold("export", f"{ROOT}/c", f"{ROOT}/e") == EXIT_USAGE
    assert "a local path is needed" in sixfold.err
    data = bytearray(store.cat_file("/bucket/run/c/model.safetensors"))
    data[-1] ^= 1
    store.pipe_file("/bucket/run/c/model.safetensors", bytes(data))
    assert sixfold("ckpt", "verify", f"{ROOT}/c") == EXIT_USAGE
    assert "model.safetensors: crc32" in sixfold.out
    store.rm("/bucket/run/c/optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: missing"):
        open_checkpoint(f"{ROOT}/c")


@pytest.mark.parametrize("num_copied", range(5))
def test_an_upload_that_breaks_off_leaves_the_previous_one(
    num_copied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(f"{ROOT}/c", content(1))
    plain, left = writing.copy_folder, [num_copied]

    def broken(source: Path, target: Path, first: str, last: str) -> None:
        if not left[0]:
            raise OSError("the network is gone")
        left[0] -= 1
        plain(source, target, first, last)
        if left[0] == 0:  # what came last is not there in the end
            (target / last).unlink()
            raise OSError("the network is gone")

    monkeypatch.setattr(writing, "copy_folder", broken)
    if num_copied < 3:
        with pytest.raises(Exception, match="the network is gone"):
            save(f"{ROOT}/c", content(2))
        assert open_checkpoint(f"{ROOT}/c").step == 1
        monkeypatch.undo()
        save(f"{ROOT}/c", content(3))
        assert open_checkpoint(f"{ROOT}/c").step == 3
    else:
        save(f"{ROOT}/c", content(2))
        assert open_checkpoint(f"{ROOT}/c").step == 2


def test_a_save_that_was_killed_leaves_nothing_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Any) -> None:
        raise KeyboardInterrupt

    def kill(name: str, place: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(writing.Save, place, killed)
            patch.setattr(writing.Save, "_clear_up", lambda self: None)
            with pytest.raises(KeyboardInterrupt):
                save(f"{ROOT}/{name}", content(1))
        assert len(list(tmp_path.glob("sixfold-save-*"))) == 1

    for place in ("_write", "_deliver"):
        kill("c", place)
        save(f"{ROOT}/c", content(2))  # of the same name
        assert list(tmp_path.glob("sixfold-save-*")) == []
        kill("d", place)
        prune(ROOT, Keep(1))  # as after a save of another name by a run
        assert list(tmp_path.glob("sixfold-save-*")) == []
    assert open_checkpoint(f"{ROOT}/c").step == 2


def test_a_full_disk_is_told_from_a_broken_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing.Save, "_write", full)
    with pytest.raises(
        CheckpointError, match=rf"saving {ROOT}/c failed.*\n.*made whole in {tmp_path} .*\n.*TMPDIR"
    ):
        save(f"{ROOT}/c", content(1))
    monkeypatch.undo()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(writing, "copy_folder", full)
    with pytest.raises(CheckpointError, match=rf"unknown amount free.*\n.*\n.*on the disk of {ROOT}"):
        save(f"{ROOT}/c", content(1))


def test_an_engine_saves_there_and_loads_from_there() -> None:
    def build() -> package.Engine:
        return package.initialize(nn.Linear(3, 2), config={}, loss_fn=lambda output, batch: output.sum())

    engine = build()
    engine.rehearse_save(ROOT)
    engine.train_step(torch.ones(2, 3))
    engine.save(f"{ROOT}/step-1", wait=False, keep=Keep(1))
    engine.wait_for_save()
    again = build()
    again.load(f"{ROOT}/step-1")
    assert again.num_steps == 1
    started = package.initialize(nn.Linear(3, 2), config={}, weights=f"{ROOT}/step-1")
    for name, tensor in engine.full_state_dict().items():
        assert torch.equal(again.full_state_dict()[name], tensor)
        assert torch.equal(started.full_state_dict()[name], tensor)


def test_urls_that_cannot_be_are_refused() -> None:
    with pytest.raises(CheckpointError, match="as a Path"):
        save(Path("memory://x/c"), content(1))
    with pytest.raises(CheckpointError, match="nowhere"):
        folder_at("nowhere://x/c")
    with pytest.raises(CheckpointError, match="is not there"):
        open_checkpoint("memory://bucket/none")


@pytest.mark.parametrize("name", ["checkpoint", "run/step-3", "odd:name", "C:/run"])
def test_what_has_no_protocol_is_a_local_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for given in (name, Path(name)):
        assert folder_at(given) == tmp_path / name
        assert not is_remote(folder_at(given))
