"""Rank 0's output: all of it is in the log, also where nobody takes it off the launcher's hands."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest

from sixfold.launch import streams
from sixfold.launch.streams import Relay


def full_pipe() -> tuple[int, int]:
    """Both ends of a pipe into which no byte fits any more, so that the next one blocks."""
    out, into = os.pipe()
    os.set_blocking(into, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(into, b"."):
            pass
    os.set_blocking(into, True)
    return out, into


def wait_for(log: Path, text: str) -> None:
    deadline = time.monotonic() + 20
    while text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def test_what_a_blocked_terminal_does_not_take_is_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_JOIN_S", 0.01)
    log = tmp_path / "rank-0.log"
    reader, target = full_pipe()
    relay = Relay(log, target, target)
    child = os.dup(relay.child_out)
    relay.start()
    os.write(child, b"last words\n")
    wait_for(log, "last words")
    relay.close()  # whose thread is blocked, and goes on with its descriptors
    os.write(child, b"and more")
    os.close(child)
    os.close(reader)  # the terminal is gone, which ends the wait
    wait_for(log, "and more\n")
    monkeypatch.setattr(streams, "_JOIN_S", 20.0)
    relay.close()
    relay.close()
    os.close(target)
    assert log.read_text() == "last words\nand more\n"
