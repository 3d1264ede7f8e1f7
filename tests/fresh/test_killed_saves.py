"""SIGKILL while two processes save together: whatever moment it meets, a whole checkpoint is found."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.fresh

KILLS = 12


def test_a_dozen_kills_of_one_and_of_all_ranks(tmp_path: Path, warm_python: str) -> None:
    command = [warm_python, str(Path(__file__).with_name("killed_saves.py")), str(tmp_path), str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("killed 1") == 8
    assert done.stdout.count("killed 2") == 4
