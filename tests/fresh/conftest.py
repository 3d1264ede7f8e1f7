"""Fixtures of this floor."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fresh import warm
from tests.one.conftest import sixfold as sixfold


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An interpreter whose processes are forks of one that has loaded torch; see `tests.fresh.warm`."""
    if not hasattr(os, "pidfd_open"):
        yield sys.executable
        return
    folder = tmp_path_factory.mktemp("warm")
    command = [sys.executable, "-m", "tests.fresh.warm", str(folder)]
    # One thread: libraries that start theirs when they are loaded cannot be forked.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", warm.ROOM: "x" * warm.ROOM_BYTES}
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        command, cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield str(folder / "python")
        server.stdin.close()
