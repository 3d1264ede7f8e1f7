"""The self-test of `sixfold doctor`, with real ranks, and completion as a shell asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sixfold.monitor import selftest

pytestmark = pytest.mark.fresh


def test_two_ranks_sum_over_every_transport(warm_python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the test is made inside of a rank of some launch."""
    own = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "7", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}
    own |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "TORCHELASTIC_RESTART_COUNT": "3"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(selftest.sys, "executable", warm_python)
    outcome = selftest.run(2, 600.0)
    assert outcome.problem is None
    assert {"network", "host"} >= set(outcome.rates)
    assert outcome.rates["network"] > 0


def test_a_rank_that_cannot_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest.sys, "executable", "/bin/false")
    outcome = selftest.run(2, 5.0)
    assert outcome.problem == "rank 0: no message; rank 1: no message"


def test_completion_for_the_shells() -> None:
    asked = {"_SIXFOLD_COMPLETE": "complete_bash", "COMP_WORDS": "sixfold data ", "COMP_CWORD": "2"}
    done = subprocess.run(
        [Path(sys.executable).with_name("sixfold")],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout.split() == ["build", "inspect"]
