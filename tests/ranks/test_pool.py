"""The pool itself: results, failures, hangs, leaks, rebuilds, and that nothing outlives pytest."""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from sixfold.base.errors import WorkerError
from sixfold.testing import Pool, RankFailure, plugin
from sixfold.testing import pool as pool_module

_KEPT: list[Any] = []  # what bodies below leak on purpose


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """A pool of this module's own: its failures are meant, and say nothing about the session's pool."""
    with Pool(max_ranks=4, preload=("torch", "torch.distributed", "numpy")) as made:
        yield made


def failure_of(pool: Pool, body: Callable[..., object], *args: object, timeout_s: float = 20) -> RankFailure:
    with pytest.raises(RankFailure) as caught:
        pool.run(body, *args, ranks=2, timeout_s=timeout_s)
    return caught.value


# --- through the plugin: these bodies run on ranks


@pytest.mark.ranks(1, 2, 4)
@pytest.mark.parametrize("factor", [1, 3])
def test_body_runs_on_every_rank_of_its_world(factor: int, num_ranks: int, tmp_path: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    rank = dist.get_rank()
    assert [int(os.environ[name]) for name in names] == [rank, rank, num_ranks, num_ranks]
    assert dist.get_world_size() == num_ranks
    assert torch.get_num_threads() == 1
    (tmp_path / f"{rank}").touch()
    total = torch.tensor(float(factor))
    dist.all_reduce(total)
    assert total.item() == factor * num_ranks
    assert len(list(tmp_path.iterdir())) == num_ranks  # the all-reduce came after every rank's file


@pytest.mark.ranks
@pytest.mark.parametrize(("factor", "num_ranks"), [(1, 1), (2, 3)])
def test_sizes_may_go_with_other_parameters(factor: int) -> None:
    assert dist.get_world_size() == 2 * factor - 1


@pytest.mark.parametrize(
    ("asked", "own"),
    [
        (pytest.mark.ranks, pytest.mark.parametrize("factor", [1])),
        (pytest.mark.ranks(2), pytest.mark.parametrize(("factor", "num_ranks"), [(1, 1)])),
        (pytest.mark.ranks(9), pytest.mark.parametrize("factor", [1])),
        (pytest.mark.ranks(2, patience_s=1), pytest.mark.parametrize("factor", [1])),
    ],
)
def test_marks_without_sizes_or_with_others_are_refused(
    asked: pytest.MarkDecorator, own: pytest.MarkDecorator
) -> None:
    definition = SimpleNamespace(
        get_closest_marker=lambda name: asked.mark, iter_markers=lambda name: [own.mark]
    )
    with pytest.raises(pytest.UsageError, match=r"mark ranks\("):
        plugin.pytest_generate_tests(SimpleNamespace(definition=definition))  # type: ignore[arg-type]


@pytest.mark.ranks(2)
def test_monkeypatch_acts_on_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONLY_HERE", "1")
    assert os.environ["ONLY_HERE"] == "1"  # and the leak check sees that it is undone


@pytest.mark.ranks(2, fresh=True)
def test_fresh_world_may_be_destroyed() -> None:
    dist.destroy_process_group()
    assert not dist.is_initialized()


class TestMethod:
    @pytest.mark.ranks(2)
    def test_methods_get_an_object_of_their_class(self) -> None:
        assert isinstance(self, TestMethod)
        assert dist.is_initialized()


# --- through Pool


def rank_and_draws() -> tuple[int, list[float]]:
    return dist.get_rank(), [random.random(), float(np.random.rand()), torch.rand(()).item()]


def test_results_come_back_by_rank_and_every_run_starts_from_the_same_seeds(pool: Pool) -> None:
    first, second = pool.run(rank_and_draws, ranks=4), pool.run(rank_and_draws, ranks=4)
    assert [rank for rank, _ in first] == [0, 1, 2, 3]
    assert first == second


def pid_of_rank() -> int:
    return os.getpid()


def test_processes_are_kept_and_rebuilt_after_a_failure(pool: Pool) -> None:
    before = pool.run(pid_of_rank, ranks=2)
    assert pool.run(pid_of_rank, ranks=2) == before
    other = pool.run(pid_of_rank, ranks=3)
    failure_of(pool, raise_on, 0)
    after = pool.run(pid_of_rank, ranks=2)
    assert not set(before) & set(after)
    assert not any(map(is_alive, before))
    assert pool.run(pid_of_rank, ranks=3) == other  # another world is not touched


def test_worn_ranks_are_replaced(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.discard(1)
    monkeypatch.setattr(pool_module, "_MAX_RUNS", 2)
    pids = [pool.run(pid_of_rank, ranks=1)[0] for _ in range(4)]
    assert pids[0] == pids[1] != pids[2] == pids[3]


def grow(num_bytes: int) -> None:
    _KEPT.append(torch.ones(num_bytes, dtype=torch.uint8))


def test_growth_is_recorded_and_grown_ranks_are_replaced(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_MAX_GROWTH_BYTES", 30_000_000)
    before = pool.run(pid_of_rank, ranks=1)
    pool.run(grow, 40_000_000, ranks=1)
    assert pool.stats.growths["grow"] > 30_000_000
    assert pool.run(pid_of_rank, ranks=1) != before


def raise_on(rank: int) -> None:
    mine = dist.get_rank()
    if mine == rank:
        raise ValueError(f"broken on {mine}")
    dist.barrier()


def test_failing_rank_is_named_first_and_the_waiting_one_is_a_victim(pool: Pool) -> None:
    failure = failure_of(pool, raise_on, 1)
    assert failure.given == "rank 1 of 2 failed: ValueError: broken on 1 in raise_on"
    assert "mine = 1" in failure.details  # the locals of the failing frame
    cause, victim = (
        failure.details.index("rank 1: the cause"),
        failure.details.index("rank 0: ended by the pool"),
    )
    assert cause < victim
    assert "waits in barrier" in failure.details[victim:]
    assert str(pickle.loads(pickle.dumps(failure))) == str(failure)


def die_on(rank: int) -> None:
    print(f"rank {dist.get_rank()} was here")
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def test_dead_rank_is_the_cause_and_its_peer_a_victim(pool: Pool) -> None:
    failure = failure_of(pool, die_on, 1)
    assert failure.given == "rank 1 of 2 died with SIGKILL in die_on"
    assert "rank 0: a victim" in failure.details
    assert "rank 1 was here" in failure.details


def sleep_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(600)
    dist.all_reduce(torch.ones(1))


def skip_collective_on(rank: int) -> None:
    if dist.get_rank() != rank:
        dist.all_reduce(torch.ones(1))


def mismatch() -> None:
    if dist.get_rank() == 0:
        dist.recv(torch.ones(1), src=1)
    dist.barrier()


@pytest.mark.parametrize(
    ("body", "args", "said", "fix"),
    [
        (sleep_on, (1,), "rank 1 is elsewhere", "make rank 1 issue all_reduce"),
        (skip_collective_on, (1,), "rank 1 passed without it", "make rank 1 issue all_reduce"),
        (mismatch, (), "rank 0 waits in recv", "rank 0 is in recv, rank 1 is in barrier"),
    ],
)
def test_hang_becomes_a_result_that_names_who_is_missing(
    pool: Pool, body: Callable[..., None], args: tuple[int, ...], said: str, fix: str
) -> None:
    pool.run(pid_of_rank, ranks=2)
    failure = failure_of(pool, body, *args, timeout_s=1)
    assert f"{body.__name__} did not end within 1.0s" in failure.given
    assert said in failure.given
    assert fix in failure.fix
    assert f"in {body.__name__}" in failure.details  # a stack


def stray_collective() -> None:
    if dist.get_rank() == 0:
        _KEPT.append(dist.all_reduce(torch.ones(1), async_op=True))


def test_collective_without_partner_is_found_before_the_next_test(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "_CLOSE_LIMIT_S", 1)
    assert (
        "stray_collective, whose ranks issued different collectives"
        in failure_of(pool, stray_collective).given
    )


def leave(what: str) -> None:
    match what:
        case "variable":
            os.environ["LEFT_BEHIND"] = "1"
        case "thread":
            threading.Thread(target=time.sleep, args=(600,), name="left", daemon=True).start()
        case "group":
            _KEPT.append(dist.new_group([0, 1]))
        case "dtype":
            torch.set_default_dtype(torch.float64)
        case "file":
            _KEPT.append(open(__file__))  # noqa: SIM115
        case "child":
            _KEPT.append(subprocess.Popen(["sleep", "600"]))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("variable", "environment variable LEFT_BEHIND set"),
        ("thread", "thread left"),
        ("group", "process groups 1 -> 2"),
        ("dtype", "default dtype torch.float32 -> torch.float64"),
        ("file", f"open file {os.path.realpath(__file__)}"),
        ("child", "a child process"),
    ],
)
def test_what_a_body_leaves_is_a_failure(pool: Pool, what: str, said: str) -> None:
    failure = failure_of(pool, leave, what)
    assert f"leave left something behind on every rank: {said}" in failure.given


def skip(only_on: int | None) -> None:
    if only_on in (None, dist.get_rank()):
        pytest.skip("not today")


def test_skip_on_all_ranks_skips_and_on_some_fails(pool: Pool) -> None:
    with pytest.raises(pytest.skip.Exception, match="not today"):
        pool.run(skip, None, ranks=2)
    assert "ended differently" in failure_of(pool, skip, 1).given


def test_what_cannot_travel_is_refused_before_it_is_sent(pool: Pool) -> None:
    with pytest.raises(WorkerError, match="at the top of a module"):
        pool.run(lambda: None, ranks=1)
    with pytest.raises(WorkerError, match="argument 0 of leave is a lock"):
        pool.run(leave, threading.Lock(), ranks=1)
    with pytest.raises(WorkerError, match=r"Pool\(max_ranks=5\)"):
        pool.run(pid_of_rank, ranks=5)


# --- pytest as a user runs it, in a process of its own

_USER_TEST = """
import os, pathlib, threading, time
import pytest, torch.distributed as dist

@pytest.mark.ranks(2)
def test_fails():
    assert [dist.get_rank()] == [7]

@pytest.mark.ranks(2)
def test_skips():
    pytest.skip("with reason")

def test_leaks():
    os.environ["LEFT_BEHIND"] = "1"

def test_after_leak():
    assert "LEFT_BEHIND" not in os.environ

@pytest.mark.ranks(2, timeout_s=600)
def test_hangs():
    pathlib.Path(f"pid-{dist.get_rank()}").write_text(str(os.getpid()))
    time.sleep(600)
"""


@pytest.fixture
def user_folder(tmp_path: Path) -> Path:
    # A suite started in the background inherits an ignored SIGINT; the one tested here must not.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    (tmp_path / "conftest.py").write_text(f'pytest_plugins = ["sixfold.testing.plugin"]\n{heed}\n')
    (tmp_path / "test_user.py").write_text(_USER_TEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


def start_pytest(folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rsE", *options]
    source = Path(pool_module.__file__).parents[2]
    (folder / "tmp").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(source), "TMPDIR": str(folder / "tmp")}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def is_alive(pid: int) -> bool:
    """Whether a process still runs; one that only waits to be collected by its parent does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z" if stat.parent.parent.exists() else True
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], limit_s: float = 60) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def check_report(output: str) -> None:
    assert "1 failed, 2 passed, 1 skipped, 1 error" in output
    assert output.count("--- rank 1:") == 1
    assert "assert [0] == [7]" in output  # explained as pytest explains asserts in its own process
    assert "with reason" in output
    assert "test_leaks left something behind: environment variable LEFT_BEHIND set" in output
    assert "rank pool: 1 runs" in output


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_pytest_and_what_it_has_found_is_told(
    user_folder: Path, stop: signal.Signals
) -> None:
    """Ended in the middle of its last test, which hangs."""
    files = [user_folder / f"pid-{rank}" for rank in range(2)]
    temporary = user_folder / "tmp"
    with start_pytest(user_folder) as process:
        assert wait_for(lambda: all(file.exists() and file.read_text() for file in files))
        pids = [int(file.read_text()) for file in files]
        assert all(map(is_alive, pids))
        assert list(temporary.glob("sixfold-ranks-*"))
        process.send_signal(stop)
        try:
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert wait_for(lambda: not any(map(is_alive, pids)), limit_s=10)
    assert wait_for(lambda: not list(temporary.glob("sixfold-ranks-*")), limit_s=10)
    if stop == signal.SIGINT:
        check_report(output)
