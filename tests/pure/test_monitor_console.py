"""What a person sees: on a terminal, in a file, and when the reader goes away."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import ioctl
from typing import TextIO

import pytest

from sixfold.monitor.console import Console, line_text
from sixfold.monitor.meters import StepRecord
from tests.pure.test_monitor_meters import Clock


def record(step: int, **changes: float | None) -> StepRecord:
    values: dict[str, float | None] = {
        "loss": 3.25,
        "lr": 1e-3,
        "grad_norm": 0.71,
        "tokens": 4096,
        "samples": 16 * step,
        "seconds": 0.5,
        "tokens_per_s": 7800.0,
        "mfu": 0.412,
        "memory_bytes": 3 * 2**28,
        "eta_s": 95.0,
    }
    return StepRecord(step=step, **(values | changes))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def test_a_line_holds_all_eight_figures() -> None:
    assert line_text(record(12), 300) == (
        "step 12/300  loss 3.2500  lr 1.00e-03  norm 0.71  7.8 k tok/s  mfu 41.2%  mem 768.0 MiB  eta 1m35s"
    )


def test_what_is_unknown_is_left_out() -> None:
    line = line_text(record(12, grad_norm=None, mfu=None, memory_bytes=None), None)
    assert line == "step 12  loss 3.2500  lr 1.00e-03  7.8 k tok/s  eta 1m35s"


def test_a_skipped_update_says_so() -> None:
    line = line_text(record(12, skipped=True, loss_scale=65536.0), None, 60)
    assert line == "step 12  loss 3.2500  skipped at scale 65536  eta 1m35s"


def test_a_narrow_line_keeps_what_matters_most() -> None:
    for width in range(1, 120):
        assert 0 < len(line_text(record(12), 300, width)) <= width
    assert line_text(record(12), 300, 40) == "step 12/300  loss 3.2500  eta 1m35s"


def shown(stream: io.StringIO) -> list[int]:
    return [int(number) for number in re.findall(r"^step (\d+)", stream.getvalue(), re.MULTILINE)]


def test_a_file_gets_the_first_the_last_and_a_line_every_ten_seconds() -> None:
    clock, stream = Clock(), io.StringIO()
    console = Console(stream, 12, clock=clock)
    for step in range(1, 13):
        console.update(record(step))
        clock.now += 3
    console.close()
    assert shown(stream) == [1, 5, 9, 12]
    assert "\x1b" not in stream.getvalue()


def test_a_run_that_ends_early_shows_where() -> None:
    clock, stream = Clock(), io.StringIO()
    with Console(stream, 100, clock=clock) as console:
        for step in range(1, 4):
            console.update(record(step))
    assert shown(stream) == [1, 3]
    console.close()
    assert shown(stream) == [1, 3]


def test_messages_are_taken_literally_and_not_wrapped() -> None:
    stream = io.StringIO()
    console = Console(stream)
    message = "[bold]layout[/bold] " + "x" * 200
    console.say(message)
    console.close()
    console.say("after")
    assert stream.getvalue() == f"{message}\nafter\n"


@contextmanager
def terminal(columns: int) -> Iterator[tuple[TextIO, list[bytes]]]:
    """A pseudo-terminal's stream, and what had been written to it once the block is left."""
    reader, writer = pty.openpty()
    ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    written: list[bytes] = []
    with open(writer, "w", encoding="utf-8") as stream:
        yield stream, written
        stream.flush()
        os.set_blocking(reader, False)
        with os.fdopen(reader, "rb", buffering=0) as source:
            while chunk := source.read(65536):
                written.append(chunk)


def screen(data: bytes) -> list[str]:
    """The lines a terminal would show: enough of its rules for one live line."""
    lines, row = [""], 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", data.decode()):
        if token == "\n":
            row += 1
            lines.extend([""] * (row + 1 - len(lines)))
        elif token == "\x1b[2K":
            lines[row] = ""
        elif token.endswith("A") and token.startswith("\x1b["):
            row -= int(token[2:-1])
        elif not token.startswith("\x1b") and token != "\r":
            lines[row] += token
    return [line for line in lines if line]


@pytest.mark.parametrize("columns", [30, 60, 80, 200])
def test_a_terminal_shows_one_line_that_fits_with_messages_above(columns: int) -> None:
    clock = Clock()
    with terminal(columns) as (stream, written):
        console = Console(stream, 9, clock=clock)
        console.say("first")
        for step in range(1, 10):
            clock.now += 1
            console.update(record(step))
            if step == 5:
                console.say("half way")
        console.close()
        console.say("done")
    lines = screen(b"".join(written))
    assert lines == ["first", "half way", line_text(record(9), 9, columns - 1), "done"]
    assert max(map(len, lines)) < columns


def test_a_terminal_is_not_redrawn_faster_than_one_can_read() -> None:
    clock = Clock()
    with terminal(80) as (stream, written), Console(stream, None, clock=clock) as console:
        for step in range(1, 101):
            console.update(record(step))
    data = b"".join(written).decode()
    assert set(re.findall(r"step (\d+)", data)) == {"1", "100"}
    # A killed run must not leave a terminal without its cursor.
    assert data.index("\x1b[?25h") < data.index("step 1")


def test_the_length_of_a_run_may_become_known_later() -> None:
    stream = io.StringIO()
    console = Console(stream, clock=Clock())
    console.say("rehearsal")
    console.total_steps = 2
    console.update(record(1))
    console.update(record(2))
    assert stream.getvalue().splitlines()[2].startswith("step 2/2 ")


def test_standard_streams_are_given_back() -> None:
    before = sys.stdout, sys.stderr
    with terminal(80) as (stream, _), Console(stream, 5) as console:
        console.update(record(1))
    assert (sys.stdout, sys.stderr) == before


def test_forced_colour_makes_no_terminal_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    with Console(stream, 2) as console:
        console.update(record(1))
        console.update(record(2))
    assert shown(stream) == [1, 2]
    assert "\x1b[2K" not in stream.getvalue()


def test_a_reader_that_goes_away_ends_the_showing_and_not_the_run(caplog: pytest.LogCaptureFixture) -> None:
    reader, writer = os.pipe()
    clock = Clock()
    with open(writer, "w", encoding="utf-8") as stream:
        console = Console(stream, 9, clock=clock)
        console.update(record(1))
        os.close(reader)
        with caplog.at_level(logging.WARNING):
            for step in range(2, 10):
                clock.now += 20
                console.update(record(step))
                console.say("message")
            console.close()
    # Closing flushed the stream without an error: it points at nothing now.
    assert len(caplog.records) == 1
    assert "training goes on" in caplog.text


def test_a_closed_stream_is_survived() -> None:
    stream = io.StringIO()
    console = Console(stream, 3)
    console.update(record(1))
    stream.close()
    console.say("message")
    console.update(record(3))
    console.close()
    late = Console(stream, 3)
    late.update(record(3))
    late.close()


def test_a_terminal_that_breaks_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    with terminal(80) as (stream, _):
        console = Console(stream, 3, clock=clock)
        console.update(record(1))

        def refuse(_: str) -> int:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(
                console._rich, "_file", type("Gone", (), {"write": staticmethod(refuse), "flush": int})()
            )
            clock.now += 1
            console.update(record(2))
            console.say("message")
            console.close()
        assert console._rich.quiet
