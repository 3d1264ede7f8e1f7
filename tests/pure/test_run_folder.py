"""Files of a run folder that cannot be written: the disk is full, or somebody presses Ctrl-C."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from sixfold.base.errors import SaveError
from sixfold.config import load
from sixfold.train.folder import CONFIG, write_config


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
