"""Kills at every file operation, full and unwritable disks, damaged bytes, and which checkpoint is found."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import sixfold
from sixfold.base.errors import CheckpointError
from sixfold.checkpoint import Content, Keep, latest, open_checkpoint, prune, save, step_folder, whole
from sixfold.checkpoint.files import Buffer, Files
from sixfold.checkpoint.manifest import MANIFEST, SUMS, OtherVersionError, _crc32


def _weight(step: int) -> torch.Tensor:
    """Differs from step to step in its values, never in its size."""
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(step))


def _content(step: int) -> Content:
    weight = _weight(step)
    return whole(
        model={"w": weight, "b": weight[0]},
        state={"step": step},
        aliases={"tied": "w"},
        optimizer={"w": {"exp_avg": weight * 2}},
        extra_files={"config.json": b"{}"},
    )


def _holds(folder: Path | None) -> int:
    """The step of a checkpoint after every byte of it was verified and compared."""
    assert folder is not None
    saved = open_checkpoint(folder)
    saved.verify()
    assert torch.equal(saved.read_model("w"), _weight(saved.step))
    assert torch.equal(saved.read_optimizer("w")["exp_avg"], _weight(saved.step) * 2)
    return saved.step


class Killed(BaseException):
    """The process is gone: not an Exception, so nothing that handles those can go on."""


@dataclass
class Mortal(Files):
    """Dies at the operation numbered `last`, having torn it if it is a write; then nothing works."""

    last: int = 10**9
    torn: bool = False
    log: list[tuple[str, str]] = field(default_factory=list)

    def _next(self, operation: str, path: object) -> bool:
        if len(self.log) > self.last:
            raise Killed
        self.log.append((operation, Path(str(path)).name))
        return len(self.log) > self.last

    def _do(self, operation: str, path: object) -> None:
        if self._next(operation, path):
            raise Killed

    def make_folder(self, folder: Path) -> None:
        self._do("make_folder", folder)
        super().make_folder(folder)

    def create(self, path: Path, size: int) -> FileIO:
        if self._next("create", path):
            if self.torn:
                super().create(path, size // 2).close()
            raise Killed
        return super().create(path, size)

    def write(self, handle: FileIO, data: Buffer, offset: int) -> None:
        if self._next("write", handle.name):
            if self.torn:
                super().write(handle, memoryview(data)[: len(data) // 2], offset)
            raise Killed
        super().write(handle, data, offset)

    def sync(self, handle: FileIO) -> None:
        self._do("sync", handle.name)
        super().sync(handle)

    def sync_folder(self, folder: Path) -> None:
        self._do("sync_folder", folder)
        super().sync_folder(folder)

    def rename(self, source: Path, target: Path) -> None:
        self._do("rename", f"{source.name}>{target.name}")
        super().rename(source, target)

    def remove_file(self, path: Path) -> None:
        self._do("remove_file", path)
        super().remove_file(path)

    def remove(self, folder: Path) -> None:
        """Not one operation for the disk: a kill leaves it half done."""
        if self._next("remove", folder):
            if self.torn and folder.exists():
                for path in sorted(folder.iterdir())[::2]:
                    path.unlink()
            raise Killed
        super().remove(folder)


def _save_steps(root: Path, steps: tuple[int, ...]) -> None:
    for step in steps:
        save(step_folder(root, step), _content(step))


@pytest.mark.parametrize("torn", [False, True], ids=["cut", "torn"])
@pytest.mark.parametrize("target", ["step-00000009", "step-00000002"], ids=["new", "replacing"])
def test_a_kill_at_any_operation_leaves_the_previous_or_the_new_one(
    tmp_path: Path, target: str, torn: bool
) -> None:
    _save_steps(tmp_path / "before", (1, 2))
    shutil.copytree(tmp_path / "before", tmp_path / "whole")
    unhurt = Mortal()
    save(tmp_path / "whole" / target, _content(9), files=unhurt)
    found = []
    for last in range(len(unhurt.log)):
        root = tmp_path / f"kill-{last}"
        shutil.copytree(tmp_path / "before", root)
        with pytest.raises(Killed):
            save(root / target, _content(9), files=Mortal(last, torn))
        step = _holds(latest(root))
        found.append(step)
        # The folder's own name finds it as well, between the two renames too.
        if target == "step-00000002":
            assert _holds(root / target) == step
        # And what the kill left behind neither hinders the next save nor stays.
        save(root / target, _content(9))
        assert _holds(latest(root)) == 9
        prune(root, Keep(3))
        assert {path.name for path in root.iterdir()} == {"step-00000001", "step-00000002", target}
        shutil.rmtree(root)
    assert found == sorted(found)
    assert set(found) == {2, 9}


def test_everything_is_durable_before_it_is_named_and_the_manifest_comes_last(tmp_path: Path) -> None:
    files = Mortal()
    save(tmp_path / "c", _content(1), files=files)
    created = [name for operation, name in files.log if operation == "create"]
    assert len(created) == 6
    assert created[-2:] == [SUMS, MANIFEST]
    for name in created:
        last_write = max(i for i, entry in enumerate(files.log) if entry == ("write", name))
        # Tensors of one file may be written while another file is on its way to the disk.
        end = len(files.log) if name == MANIFEST else files.log.index(("create", MANIFEST))
        assert ("sync", name) in files.log[last_write:end]
    assert files.log[-4:] == [
        ("sync_folder", ".tmp-c"),
        ("rename", ".tmp-c>c"),
        ("sync_folder", tmp_path.name),
        ("remove", ".old-c"),
    ]


def test_a_save_has_one_file_open_at_a_time(tmp_path: Path) -> None:
    class Counted(Files):
        opened: ClassVar[list[FileIO]] = []

        def reopen(self, path: Path) -> FileIO:
            assert all(handle.closed for handle in self.opened)
            self.opened.append(super().reopen(path))
            return self.opened[-1]

    save(tmp_path / "c", _content(1), files=Counted())
    assert len(Counted.opened) == 8  # four files, to write and to make durable


def test_a_kill_while_pruning_leaves_the_kept_ones(tmp_path: Path) -> None:
    for last in range(20):
        root = tmp_path / f"kill-{last}"
        _save_steps(root, (1, 2, 3))
        (root / ".tmp-step-00000004").mkdir()
        try:
            prune(root, Keep(1), files=Mortal(last, torn=True))
        except Killed:
            assert _holds(latest(root)) == 3
            prune(root, Keep(1))
        else:
            assert last > 3
        assert [path.name for path in root.iterdir()] == ["step-00000003"]


def test_prune_keeps_the_newest_and_what_is_not_its_own(tmp_path: Path) -> None:
    _save_steps(tmp_path, (5, 10, 15, 20))
    (tmp_path / "notes").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".tmp-step-00000025").mkdir()
    removed = prune(tmp_path, Keep(2))
    assert [path.name for path in removed] == ["step-00000005", "step-00000010"]
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000015", "step-00000020", "notes", ".cache"}
    assert prune(tmp_path, Keep(2)) == ()
    with pytest.raises(CheckpointError, match="keep_last is 0"):
        prune(tmp_path, Keep(0))


def test_the_newest_is_the_one_saved_last_also_after_going_back(tmp_path: Path) -> None:
    _save_steps(tmp_path, (3, 6, 9, 4))
    assert latest(tmp_path) == step_folder(tmp_path, 4)
    prune(tmp_path, Keep(1))
    assert latest(tmp_path) == step_folder(tmp_path, 4)


def test_latest_passes_over_what_is_not_complete(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert latest(tmp_path / "nowhere") is None
    assert latest(tmp_path) is None
    _save_steps(tmp_path, (1, 2, 3))
    shutil.copytree(step_folder(tmp_path, 3), tmp_path / ".tmp-step-00000004")
    with step_folder(tmp_path, 3).joinpath("model.safetensors").open("r+b") as file:
        file.truncate(100)
    step_folder(tmp_path, 2).joinpath(MANIFEST).unlink()
    assert latest(tmp_path) == step_folder(tmp_path, 1)
    assert "passed over" in caplog.text
    assert "step-00000003 is damaged" in caplog.text


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save(tmp_path / "c", _content(1))
    return tmp_path / "c"


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.json"])
def test_a_flipped_byte_is_refused_with_the_name_of_its_file(checkpoint: Path, name: str) -> None:
    _flip(checkpoint / name, -1)
    saved = open_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match=rf"{name}: crc32"):
        saved.verify()
    reads = {
        "model.safetensors": lambda: list(saved.model()),
        "optimizer.safetensors": lambda: saved.read_optimizer("w"),
        "state.json": lambda: saved.state,
        "config.json": lambda: saved.read_file("config.json"),
    }
    with pytest.raises(CheckpointError, match=rf"{name}: crc32"):
        reads.pop(name)()
    for read in reads.values():
        read()


def test_verify_names_all_damaged_files_and_sees_headers(checkpoint: Path) -> None:
    _flip(checkpoint / "model.safetensors", 20)
    _flip(checkpoint / "config.json", 0)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(checkpoint).verify()
    assert "model.safetensors: crc32" in str(caught.value)
    assert "config.json: crc32" in str(caught.value)
    assert "optimizer" not in str(caught.value)


def test_no_byte_of_the_manifest_can_flip_unseen(checkpoint: Path) -> None:
    path = checkpoint / MANIFEST
    whole = path.read_bytes()
    for at in range(len(whole)):
        _flip(path, at)
        with pytest.raises(CheckpointError, match=MANIFEST):
            open_checkpoint(checkpoint)
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "change",
    [
        {"file": "nowhere"},
        {"file": "../c/model.safetensors"},
        {"dtype": "F7"},
        {"shape": [8, 9]},
        {"stop": 10**6},
    ],
    ids=str,
)
def test_a_manifest_whose_places_cannot_be_is_refused(checkpoint: Path, change: dict[str, object]) -> None:
    body = json.loads((checkpoint / MANIFEST).read_text())
    del body["crc32"]
    body["tensors"][0] |= change
    (checkpoint / MANIFEST).write_text(json.dumps({**body, "crc32": _crc32(body)}))
    with pytest.raises(CheckpointError, match=r"manifest\.json: "):
        open_checkpoint(checkpoint)


def test_truncated_and_missing_files_are_listed_together(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"short")
    (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(checkpoint)
    assert "model.safetensors: 5 bytes, the manifest says" in str(caught.value)
    assert "config.json: missing" in str(caught.value)


def test_a_file_that_goes_away_after_opening_is_named(checkpoint: Path) -> None:
    saved = open_checkpoint(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: No such file"):
        saved.read_model("w")


def test_another_format_version_is_refused_and_never_passed_over(checkpoint: Path) -> None:
    body = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps({**body, "version": 3}))
    with pytest.raises(OtherVersionError, match="format version 3"):
        open_checkpoint(checkpoint)
    save(checkpoint.parent / "b", _content(2))
    with pytest.raises(OtherVersionError, match="format version 3"):
        latest(checkpoint.parent)


def test_what_is_not_a_checkpoint_is_said_with_what_would_be(tmp_path: Path) -> None:
    save(tmp_path / "run" / "step-00000007", _content(7))
    (tmp_path / "file").write_text("x")
    (tmp_path / "bare").mkdir()
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / MANIFEST).write_text('{"name": "an app"}')
    cases = {
        "run": "open the newest inside it: .*step-00000007",
        "run/step-0000007": "did you mean .*step-00000007",
        "run/somewhere": "open .*step-00000007",
        "file": "file is a file",
        "bare": "bare has no manifest.json",
        "web": "not the manifest of a checkpoint",
        "zzz": "zzz is not there",
    }
    for name, message in cases.items():
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / name)


class Limited(Files):
    """A disk that is full after some bytes, or that refuses one operation."""

    def __init__(self, room: int = 10**9, refuse: str = "", code: int = 0) -> None:
        self.room, self.refuse, self.code = room, refuse, code

    def create(self, path: Path, size: int) -> FileIO:
        self.room -= size
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().create(path, size)

    def sync(self, handle: FileIO) -> None:
        if self.refuse == "sync":
            raise OSError(self.code, os.strerror(self.code))

    def rename(self, source: Path, target: Path) -> None:
        if self.refuse == "rename":
            raise OSError(self.code, os.strerror(self.code))
        super().rename(source, target)


@pytest.mark.parametrize("room", [0, 100, 700, 1500])
def test_a_full_disk_leaves_the_previous_checkpoint_and_nothing_else(tmp_path: Path, room: int) -> None:
    save(step_folder(tmp_path, 1), _content(1))
    with pytest.raises(CheckpointError) as caught:
        save(step_folder(tmp_path, 2), _content(2), files=Limited(room))
    text = str(caught.value)
    assert "step-00000002" in text
    assert "No space left" in text
    assert "needed" in text
    assert "free" in text
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert _holds(latest(tmp_path)) == 1


@pytest.mark.parametrize(
    ("refuse", "code", "fix"),
    [
        ("sync", errno.EDQUOT, "save to another disk"),
        ("sync", errno.EIO, "check the file system"),
        ("rename", errno.EACCES, "chmod u\\+w"),
        ("rename", errno.EROFS, "folder of your own"),
    ],
)
def test_other_refusals_say_what_to_change(tmp_path: Path, refuse: str, code: int, fix: str) -> None:
    save(tmp_path / "c", _content(1))
    with pytest.raises(CheckpointError, match=fix):
        save(tmp_path / "c", _content(2), files=Limited(refuse=refuse, code=code))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert _holds(tmp_path / "c") == 1


def test_an_interrupted_save_clears_up_and_goes_on_as_the_interrupt(tmp_path: Path) -> None:
    class Interrupted(Files):
        def sync_folder(self, folder: Path) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "c", _content(1), files=Interrupted())
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_cannot_fit_fails_before_the_first_byte(tmp_path: Path) -> None:
    class Small(Mortal):
        def free_bytes(self, folder: Path) -> int:
            return 500

    files = Small()
    with pytest.raises(CheckpointError, match="500 B free"):
        save(tmp_path / "c", _content(1), files=files)
    assert "create" not in {operation for operation, _ in files.log}
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file_is_an_error_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="failed"):
        save(tmp_path / "file" / "c", _content(1))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    done = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if not done or done.returncode:
        pytest.skip(f"no small tmpfs can be mounted here: {done.stderr.strip() if done else 'no mount'}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("checked", [True, False], ids=["asked before", "found by the write"])
def test_a_real_full_disk(small_disk: Path, checked: bool) -> None:
    class Boundless(Files):
        def free_bytes(self, folder: Path) -> int:
            return super().free_bytes(folder) if checked else 10**12

    save(step_folder(small_disk, 1), _content(1))
    large = whole({"w": torch.zeros(600_000)}, {"step": 2})
    with pytest.raises(CheckpointError, match=r"No space left.*2\.3 MiB needed"):
        save(step_folder(small_disk, 2), large, files=Boundless())
    assert [path.name for path in small_disk.iterdir()] == ["step-00000001"]
    assert _holds(latest(small_disk)) == 1


def test_state_of_another_optimizer_is_refused_and_its_weights_alone_are_taken(tmp_path: Path) -> None:
    """In a layout of another kind, too, as the error says."""

    def engine(optimizer: str, **more: Any) -> sixfold.Engine:
        config = {"optimizer.name": optimizer, "layout.zero": more.pop("zero", 0)}
        return sixfold.initialize(
            torch.nn.Linear(4, 2), config=config, loss_fn=lambda output, batch: output.square().mean(), **more
        )

    saved = engine("adamw")
    saved.train_step(torch.ones(2, 4))
    saved.save(tmp_path / "c")
    with pytest.raises(CheckpointError, match="holds the state of AdamW") as refused:
        engine("sgd").load(tmp_path / "c")
    assert f"sixfold.initialize(model, weights={str(tmp_path / 'c')!r})" in refused.value.fix
    again = engine("sgd", zero=3, weights=str(tmp_path / "c"))
    assert torch.equal(again.full_state_dict()["weight"], saved.full_state_dict()["weight"])
    assert again.num_steps == 0
