"""Which failure is the cause, whose line it is, and how it is told."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sixfold.base.errors import CheckpointError, ConfigError, LinkError, MeshError, PlanError
from sixfold.config import load
from sixfold.launch import failure as failures
from sixfold.launch.failure import Failure, causal, from_exception, from_exit, is_victim, render
from sixfold.launch.job import Job, StopRequests, _Rank
from sixfold.launch.streams import _last_state

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:18356: "


@pytest.mark.parametrize(
    "text",
    [
        GLOO + "Connection reset by peer. This is typically caused by a remote worker hanging.",
        GLOO + "Connection closed by peer [127.0.0.1]:20370.",
        "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 3000ms for recv operation to complete",
        "NCCL error: remote process exited or there was a network error",
        "Connection was likely closed. Did the remote server shutdown or crash?",
        "wait timeout after 300000ms, keys: /default_pg/0//cpu",
    ],
)
def test_a_broken_link_makes_a_victim(text: str) -> None:
    assert is_victim(RuntimeError(text))


def test_a_rank_that_waits_in_shared_memory_for_a_lost_one_is_a_victim() -> None:
    words = {"rule": "every rank takes part", "fix": "look at rank 1"}
    assert is_victim(LinkError("rank 1 ended while this rank waited for its part of exchange 7", **words))
    assert is_victim(LinkError("rank 1 offers 64 bytes where this rank has 128", **words))


def test_a_victim_is_known_through_what_it_was_turned_into() -> None:
    turned = MeshError("cannot reduce", rule="all ranks live", fix="look at the others")
    turned.__cause__ = RuntimeError(GLOO + "Connection closed by peer")
    assert is_victim(turned)


@pytest.mark.parametrize(
    "error",
    [
        ValueError(GLOO + "Connection reset by peer"),
        ConnectionResetError("Connection reset by peer"),  # the user's own connection
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed"),
        RuntimeError("The server socket has failed to listen on any local network address"),
    ],
)
def test_other_failures_are_causes(error: Exception) -> None:
    assert not is_victim(error)


def fail(rank: int, when: float, *, victim: bool) -> Failure:
    return Failure(rank, 1, when, "E", "m", "", "", "", "", "", 4, victim)


def test_the_cause_is_the_earliest_that_is_no_victim() -> None:
    early_victim, cause, later = (
        fail(0, 1.0, victim=True),
        fail(2, 2.0, victim=False),
        fail(1, 3.0, victim=False),
    )
    assert causal([early_victim, later, cause]) is cause
    assert causal([fail(1, 5.0, victim=True), early_victim]) is early_victim


def hang(when: float) -> Failure:
    lines = ("rank 0: has waited", "rank 2: is at train.py:9")
    made = failures.from_hang("rank 2 skipped it", fix="do not", positions=lines, rank=2, step=7)
    return replace(made, time=when)


def test_a_hang_explains_the_deaths_it_made_and_no_other_failure() -> None:
    aborted = from_exit(-signal.SIGABRT, rank=0, step=7, when=1.0, log_tail="")
    raised = fail(1, 1.5, victim=False)
    broken = fail(3, 0.5, victim=True)
    assert causal([aborted, broken, hang(2.0)]) == hang(2.0)
    assert causal([aborted, raised, hang(2.0)]) == raised
    assert causal([aborted, broken]) == aborted
    told = failures.told_elsewhere(rank=4, step=7)
    assert told.victim
    assert causal([told, hang(told.time + 1)]).rank == 2


def test_a_hang_is_told_in_its_own_first_line() -> None:
    told = render(hang(0.0), world_size=4, log=Path("logs/rank-2.log")).splitlines()
    assert told == [
        "sixfold: hang: rank 2 skipped it",
        "rule: every rank issues the same exchanges in the same order, in time",
        "fix: do not",
        "log: logs/rank-2.log",
        "",
        "rank 0: has waited",
        "rank 2: is at train.py:9",
    ]


def users_code(tmp_path: Path, text: str) -> Failure:
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(BaseException) as caught:
        exec(compile(text, str(file), "exec"), {"__name__": "mine"})
    return from_exception(caught.value, rank=1, step=12)


def test_the_users_line_is_the_deepest_outside_libraries(tmp_path: Path) -> None:
    told = users_code(tmp_path, "import json\ndef read():\n    return json.loads('{')\nread()\n")
    assert told.where == f"{tmp_path}/mine.py:3, in read"
    assert told.source == "return json.loads('{')"
    assert told.kind == "json.decoder.JSONDecodeError"


def test_without_a_users_frame_the_deepest_is_told() -> None:
    try:
        failures.causal([])
    except ValueError as error:
        trace = error.__traceback__
        assert trace is not None
        told = from_exception(error.with_traceback(trace.tb_next), rank=0, step=None)
    assert "failure.py" in told.where


def test_a_syntax_error_is_told_at_its_place(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    with pytest.raises(SyntaxError) as caught:
        compile("x = 1\ny = (\n", str(file), "exec")
    told = from_exception(caught.value, rank=0, step=None)
    assert told.where == f"{file}:2"
    assert told.source == "y = ("


def test_the_first_five_lines_tell_all(tmp_path: Path) -> None:
    told = users_code(tmp_path, "def f():\n    raise ValueError('not finite\\nat all')\nf()\n")
    lines = render(
        told, world_size=4, others=[fail(0, 9.0, victim=True)], log=Path("rank-1.log")
    ).splitlines()
    assert lines[:4] == [
        "sixfold: rank 1 of 4 failed at step 12",
        "ValueError: not finite",
        f"at {tmp_path}/mine.py:2, in f",
        "    raise ValueError('not finite\\nat all')",
    ]
    assert lines[4:6] == ["also rank 0 (a consequence): E: m", "log: rank-1.log"]
    assert lines[7] == "Traceback (most recent call last):"
    assert lines[-2:] == ["ValueError: not finite", "at all"]


@pytest.mark.parametrize(("kind", "code"), [(ConfigError, 2), (PlanError, 3), (MeshError, 4)])
def test_errors_for_users_keep_their_three_sentences_and_their_code(
    kind: type[ConfigError | PlanError | MeshError], code: int
) -> None:
    told = from_exception(kind("7 heads", rule="heads divide width", fix="set 8"), rank=0, step=None)
    text = render(told, world_size=1)
    assert told.exit_code == code
    assert f"{kind.__name__}: 7 heads\nrule: heads divide width\nfix: set 8\n" in text
    assert "before its first step" in text.splitlines()[0]


def test_an_error_for_users_that_no_line_of_theirs_led_to_is_told_without_lines() -> None:
    """The log has them; what to change is not in them."""
    try:
        load(values={"train.steps": 0})
    except ConfigError as error:
        trace = error.__traceback__
        assert trace is not None
        told = from_exception(error.with_traceback(trace.tb_next), rank=0, step=3)
    assert "load.py" in told.details
    assert render(told, world_size=2, log=Path("rank-0.log")) == (
        f"sixfold: rank 0 of 2 failed at step 3\nConfigError: {told.message}\n"
        f"rule: {told.rule}\nfix: {told.fix}\nlog: rank-0.log\n"
    )


def test_an_error_for_users_names_their_line(tmp_path: Path) -> None:
    told = users_code(tmp_path, "from sixfold.config import load\nload(values={'train.steps': 0})\n")
    assert told.where == f"{tmp_path}/mine.py:2, in <module>"
    assert "Traceback (most recent call last):" in render(told, world_size=2)


def test_the_exit_code_of_an_argument_parser_stays() -> None:
    with pytest.raises(SystemExit) as refused:
        argparse.ArgumentParser().error("no such")
    told = from_exception(refused.value, rank=0, step=None)
    assert (told.exit_code, told.headline) == (2, "SystemExit: 2")
    assert from_exception(SystemExit(3), rank=0, step=None).exit_code == 4
    assert from_exception(SystemExit("no data"), rank=0, step=None).exit_code == 4


def test_silent_ends() -> None:
    killed = from_exit(-signal.SIGKILL, rank=1, step=3, when=1.0, log_tail="last words")
    assert killed.message == "rank 1 was killed by SIGKILL (out of memory?)"
    assert "last words" in render(killed, world_size=2)
    assert not killed.victim
    left = from_exit(7, rank=0, step=None, when=1.0, log_tail="")
    assert left.message == "rank 0 exited with code 7 and left no exception"
    assert (left.exit_code, left.victim) == (4, False)
    assert from_exit(
        -6, rank=0, step=1, when=1.0, log_tail="Watchdog caught collective operation timeout"
    ).victim
    assert not from_exit(-6, rank=0, step=1, when=1.0, log_tail="free(): invalid pointer").victim


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    told = from_exception(ConfigError("ä", rule="b", fix="c"), rank=3, step=4)
    told.write(tmp_path / "rank-3.failure.json")
    assert Failure.read(tmp_path / "rank-3.failure.json") == told
    assert [path.name for path in tmp_path.iterdir()] == ["rank-3.failure.json"]


@pytest.mark.parametrize(
    ("given", "first", "second"),
    [
        (
            "3 problems in the configuration\n  1. a = 1\n     rule: r\n     fix:  f\n  2. b = 2\n  3. c",
            "1. a = 1",
            "2. b = 2",
        ),
        (
            "the checkpoint x is damaged:\n    one: missing\n    two: missing\n    three",
            "one: miss",
            "two: miss",
        ),
    ],
)
def test_listed_problems_begin_within_five_lines(given: str, first: str, second: str) -> None:
    told = from_exception(CheckpointError(given, rule="r", fix="f"), rank=0, step=7)
    lines = render(told, world_size=2).splitlines()
    assert lines[1] == f"CheckpointError: {given.splitlines()[0]}"
    assert first in lines[2]
    assert second in lines[3]
    assert not lines[4].strip().startswith(("3.", "three"))


def ended_job(tmp_path: Path, codes: list[int]) -> Job:
    """A job whose ranks have ended; their processes are real ones that did nothing else."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    job = Job([], tmp_path / "run", scratch, {}, None, StopRequests(), world_size=len(codes))
    for rank, code in enumerate(codes):
        process = subprocess.Popen([sys.executable, "-S", "-c", f"raise SystemExit({code})"])
        process.wait()
        job._ranks.append(_Rank(rank, process, ended_at=5.0 + rank))
        (scratch / f"rank-{rank}.progress").write_text("running 3")
    return job


def test_a_rank_that_left_early_is_the_cause_and_not_its_victim(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = ended_job(tmp_path, [4, 0])
    fail(0, 1.0, victim=True).write(tmp_path / "scratch" / "rank-0.failure.json")
    assert job.verdict() == 4
    told = capsys.readouterr().err.splitlines()
    assert told[:2] == [
        "sixfold: rank 1 of 2 failed at step 3",
        "rank 1 ended after update 3 while others went on",
    ]
    assert "also rank 0 (a consequence): E: m" in told


def test_a_rank_that_ended_well_is_not_blamed_for_anothers_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = ended_job(tmp_path, [4, 0])
    fail(0, 1.0, victim=False).write(tmp_path / "scratch" / "rank-0.failure.json")
    assert job.verdict() == 4
    assert "rank 1" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "shown"),
    [(b"plain", b"plain"), (b"\rstep 1\rstep 2", b"step 2"), (b"step 1\rstep 2\r", b"step 2\r"), (b"", b"")],
)
def test_the_log_keeps_the_last_state_of_a_live_line(line: bytes, shown: bytes) -> None:
    assert _last_state(line) == shown
