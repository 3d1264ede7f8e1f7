"""Files of a run folder that cannot be written: the disk is full, or somebody presses Ctrl-C."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from sixfold.base.errors import ConfigError, SaveError
from sixfold.config import load
from sixfold.config.resolved import CONFIG
from sixfold.train.folder import held, write_config


def test_a_full_disk_leaves_the_configuration_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(tmp_path, load(values={"train.steps": 3}))
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        write(path, content[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SaveError, match=r"config\.toml cannot be written: No space left") as caught:
        write_config(tmp_path, load(values={"train.steps": 4}))
    assert caught.value.fix == "free some space there", "a run that is there is resumed where it is"
    assert [path.name for path in tmp_path.iterdir()] == [CONFIG]
    assert load(tmp_path / CONFIG).config.train.steps == 3


@pytest.mark.parametrize(
    ("stops", "told"), [(OSError(errno.ENOSPC, "full"), SaveError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_a_run_that_cannot_begin_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: BaseException, told: type[BaseException]
) -> None:
    def stop(path: Path, target: Path) -> None:
        raise stops

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(told) as caught:
        write_config(tmp_path, load())
    if isinstance(caught.value, SaveError):
        assert "--into" in caught.value.fix
    assert not list(tmp_path.iterdir())


HOLDER = """
import sys
from pathlib import Path
from sixfold.train.folder import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_is_held_by_one_process_until_that_ends_however_it_does(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="is in use") as caught, held(tmp_path):
            pass
        assert f"--config {tmp_path / CONFIG}" in caught.value.fix
        other.kill()
    with held(tmp_path):
        pass
    with held(tmp_path):
        pass


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "no locks"), NotImplementedError("no flock")])
def test_a_file_system_without_locks_is_told_and_used(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with held(tmp_path):
        assert f"{tmp_path} cannot be locked" in caplog.text
    monkeypatch.setattr(error, "errno", errno.ENOSPC, raising=False)
    if isinstance(error, OSError):
        with pytest.raises(SaveError), held(tmp_path):
            pass
