"""A fork of the warm interpreter is to others what a new interpreter would be."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from sixfold.launch.guardian import members

pytestmark = [
    pytest.mark.fresh,
    pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="commands are forked on Linux only"),
]


def test_a_fork_is_found_by_its_callers_environment(warm_python: str, tmp_path: Path) -> None:
    marker = f"TEST_FOLDER={tmp_path}"
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    with subprocess.Popen(
        [warm_python, "-c", code],
        env={**os.environ, "TEST_FOLDER": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as command:
        assert command.stdout is not None
        fork = int(command.stdout.readline())
        try:
            assert sorted(members(marker, ())) == sorted([command.pid, fork])
        finally:
            os.kill(fork, signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL
    assert members(marker, ()) == []


@pytest.mark.parametrize("threads", ["1", "3"])
def test_a_fork_computes_with_the_threads_that_its_caller_names(warm_python: str, threads: str) -> None:
    code = "import torch; print(torch.get_num_threads(), torch.ones(10_000_000).add_(1).mean().item())"
    told = subprocess.run(
        [warm_python, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": threads},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == [threads, "2.0"]
