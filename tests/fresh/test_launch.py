"""Real launches: signals, deaths, messages, exit codes, and that nothing is left behind.

A launcher here is a fork of a server that has loaded torch once; ranks are plain Python processes,
most without torch. Nothing waits for a guessed time: tests wait for files and for processes to end.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest

from sixfold.base.errors import ConfigError
from sixfold.base.malloc import malloc_variables
from sixfold.launch import NodePlacement, job, launch
from sixfold.launch.guardian import members
from sixfold.testing import free_port

pytestmark = pytest.mark.fresh

LIMIT_S = 10.0  # what a launch may take to leave nothing behind
START_S = 600.0


@dataclass
class Launched:
    """A launcher under test and what its ranks are told."""

    process: ForkServerProcess
    folder: Path

    def wait(self, limit_s: float = START_S) -> int | None:
        self.process.join(limit_s)
        return self.process.exitcode

    def kill(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def await_file(self, name: str) -> str:
        wait_until(lambda: (self.folder / name).exists() or not self.process.is_alive(), START_S)
        return (self.folder / name).read_text()

    def pid(self, name: str) -> int:
        return int(self.await_file(name))

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    def log(self, rank: int) -> str:
        return (self.folder / "run" / "logs" / f"rank-{rank}.log").read_text()

    def left(self) -> list[int]:
        """Processes of this launch: every rank and helper carries the test's folder in its environment."""
        return members(f"TEST_FOLDER={self.folder}", ())

    def assert_nothing_left(self) -> None:
        wait_until(lambda: not self.left(), LIMIT_S)


Start = Callable[..., Launched]


def wait_until(condition: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s} s"
        time.sleep(0.02)


def launcher_main(
    folder: str,
    arguments: list[str],
    ranks: int,
    out: str,
    node: NodePlacement | None,
    python: str,
    limits: dict[str, float],
) -> None:
    """In the forked launcher: own output files, less patience, then the real thing."""
    os.setsid()
    for name, seconds in limits.items():
        assert hasattr(job, name), name
        setattr(job, name, seconds)
    for path, number in ((out, 1), (out if out.startswith("/dev") else f"{folder}/err", 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY, 0o600), number)
    command = [python, "-m", "sixfold.launch.script", *arguments]
    extra = {"TEST_FOLDER": folder}
    sys.exit(
        launch(command, ranks=ranks, run_folder=Path(folder, "run"), environ=extra, threads=1, node=node)
    )


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sixfold.launch.agent"])
    return context


@pytest.fixture
def start(server: ForkServerContext, tmp_path: Path) -> Iterator[Start]:
    """Start a launch of a script given as text; whatever a failed test leaves is killed."""
    launches: list[Launched] = []

    def begin(
        text: str,
        *arguments: str,
        ranks: int = 2,
        out: str | None = None,
        node: NodePlacement | None = None,
        python: str = sys.executable,
        **limits: float,
    ) -> Launched:
        folder = tmp_path / f"launch-{len(launches)}"
        folder.mkdir()
        (folder / "script.py").write_text(PREAMBLE + text)
        arguments = (str(folder / "script.py"), *arguments)
        options = (list(arguments), ranks, out or f"{folder}/out", node, python, limits)
        process = server.Process(target=launcher_main, args=(str(folder), *options))
        process.start()
        launches.append(Launched(process, folder))
        return launches[-1]

    yield begin
    for one in launches:
        one.process.kill()
        for pid in one.left():
            os.kill(pid, signal.SIGKILL)


PREAMBLE = """
import os, signal, subprocess, sys, time
from pathlib import Path
from sixfold.launch import current_session
rank, folder, session = int(os.environ["RANK"]), Path(os.environ["TEST_FOLDER"]), current_session()
def tell(name, text=""):
    (folder / (name + ".draft")).write_text(str(text))
    (folder / (name + ".draft")).rename(folder / name)
def await_file(name):
    while not (folder / name).exists():
        time.sleep(0.01)
"""

# Steps until asked to stop, then a save that takes a moment.
TRAINS = """
tell(f"pid-{rank}", os.getpid())
step = 0
while not session.stop_requested:
    session.step = step = step + 1
    if step == 3:
        tell(f"steps-{rank}")
    time.sleep(0.01)
with session.saving():
    time.sleep(0.3)
    tell(f"saved-{rank}", step)
session.interrupted()
"""

# A loader worker that detaches itself and ignores polite signals.
HELPER = """
helper = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"],
    start_new_session=True)
tell(f"helper-{rank}", helper.pid)
"""

HANGS = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
tell(f"pid-{rank}", os.getpid())
await_file("never")
"""


def test_success_passes_rank_0_through_and_keeps_logs(start: Start) -> None:
    one = start("print('out of', rank, sys.argv[1:]); print('err of', rank, file=sys.stderr)", "a", "b")
    assert one.wait() == 0
    assert (one.out, one.err) == ("out of 0 ['a', 'b']\n", "err of 0\n")
    assert one.log(1) == "out of 1 ['a', 'b']\nerr of 1\n"
    assert sorted(one.log(0).splitlines()) == ["err of 0", "out of 0 ['a', 'b']"]
    one.assert_nothing_left()


def test_the_environment_is_the_callers_plus_the_documented_list(tmp_path: Path) -> None:
    """Through a launcher started as any user would, with an odd environment."""
    script = "import json, os, sys; json.dump(dict(os.environ), open(f'env-{os.environ[\"RANK\"]}', 'w'))"
    (tmp_path / "script.py").write_text(script)
    code = (
        "import sys; from pathlib import Path; from sixfold.launch import launch\n"
        "command = [sys.executable, '-m', 'sixfold.launch.script', 'script.py']\n"
        "sys.exit(launch(command, ranks=2, run_folder=Path('run'), environ={'EXTRA': 'x'}, threads=3))"
    )
    mine = {**os.environ, "ODD": "a b\nc=d", "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "7"}
    mine.pop("GLIBC_TUNABLES", None)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=mine, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    documented = {
        *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
        *("ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"),
        *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"),
        *("TORCHELASTIC_USE_AGENT_STORE", "SIXFOLD_SCRATCH", "EXTRA"),
        *malloc_variables(mine),
    }
    for rank in range(2):
        theirs = json.loads((tmp_path / f"env-{rank}").read_text())
        changed = {n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n)}
        assert changed - {"PWD", "OLDPWD", "_", "SHLVL"} == documented
        assert (theirs["RANK"], theirs["WORLD_SIZE"], theirs["LOCAL_RANK"]) == (str(rank), "2", str(rank))
        assert (theirs["OMP_NUM_THREADS"], theirs["EXTRA"]) == ("3", "x")


def test_two_launches_at_once_form_two_worlds(start: Start, warm_python: str) -> None:
    text = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
tell(f"ready-{rank}"); await_file("go")
total = torch.tensor([float(sys.argv[1])]); dist.all_reduce(total)
print(total.item()); dist.destroy_process_group()
"""
    first, second = (start(text, number, python=warm_python) for number in ("1", "10"))
    for one in (first, second):
        for rank in range(2):
            one.await_file(f"ready-{rank}")
    for one in (first, second):
        (one.folder / "go").touch()
    assert [one.wait() for one in (first, second)] == [0, 0]
    assert (first.out, second.out) == ("2.0\n", "20.0\n")


def test_a_python_error_in_one_rank_while_another_hangs(start: Start) -> None:
    text = (
        HELPER
        + "if rank == 1:\n    session.step = 7\n    await_file('helper-0')\n    {}['weights']\n"
        + HANGS
    )
    one = start(text)
    assert one.wait() == 4
    line = (PREAMBLE + text).splitlines().index("    {}['weights']") + 1
    told = one.err.splitlines()
    assert told[:4] == [
        "sixfold: rank 1 of 2 failed at step 7",
        "KeyError: 'weights'",
        f"at {one.folder}/script.py:{line}, in <module>",
        "    {}['weights']",
    ]
    assert told[6] == "Traceback (most recent call last):"
    assert told[-1] == "KeyError: 'weights'"
    assert one.err.count("KeyError") == 2  # the headline and the end of the traceback: told once
    assert "Traceback" in one.log(1)
    assert json.loads((one.folder / "run/logs/rank-1.failure.json").read_text())["step"] == 7
    one.assert_nothing_left()


def test_an_error_of_rank_0_is_told_once(start: Start) -> None:
    one = start(
        "print('live', end='', flush=True)\nif rank == 0: raise ValueError('zero')\nawait_file('never')"
    )
    assert one.wait() == 4
    assert one.err.startswith("\nsixfold: rank 0 of 2 failed before its first step\nValueError: zero\n")
    assert one.err.count("Traceback") == 1
    one.assert_nothing_left()


def test_a_broken_connection_is_not_the_cause(start: Start) -> None:
    """Rank 0 fails first and loudest, but only because rank 1 is gone."""
    text = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
session.step = 4
dist.barrier()
if rank == 1: os.kill(os.getpid(), signal.SIGKILL)
dist.all_reduce(torch.ones(1))
"""
    one = start(text)
    assert one.wait() == 4
    told = one.err.splitlines()
    assert told[:2] == [
        "sixfold: rank 1 of 2 failed at step 4",
        "rank 1 was killed by SIGKILL (out of memory?)",
    ]
    assert told[2].startswith("also rank 0 (a consequence): RuntimeError: ")
    one.assert_nothing_left()


def test_sigkill_of_one_rank(start: Start) -> None:
    one = start(HELPER + HANGS, ranks=3)
    for rank in range(3):
        one.await_file(f"helper-{rank}")
    os.kill(one.pid("pid-2"), signal.SIGKILL)
    assert one.wait(LIMIT_S) == 4
    assert one.err.splitlines()[:2] == [
        "sixfold: rank 2 of 3 failed before its first step",
        "rank 2 was killed by SIGKILL (out of memory?)",
    ]
    assert one.left() == []


def test_sigkill_of_the_launcher(start: Start) -> None:
    one = start(HELPER + HANGS)
    for rank in range(2):
        one.await_file(f"helper-{rank}")
        one.await_file(f"pid-{rank}")
    scratch = Path(environment_of(one.pid("pid-0"))["SIXFOLD_SCRATCH"])
    assert len(one.left()) == 4
    one.kill(signal.SIGKILL)
    one.assert_nothing_left()
    wait_until(lambda: not scratch.exists(), LIMIT_S)


def environment_of(pid: int) -> dict[str, str]:
    items = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(item.decode().split("=", 1) for item in items if item)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_saves_and_ends_with_130(start: Start, number: int) -> None:
    one = start(HELPER + TRAINS)
    for rank in range(2):
        one.await_file(f"steps-{rank}")
    one.kill(number)
    assert one.wait(LIMIT_S) == 130
    for rank in range(2):
        assert int(one.await_file(f"saved-{rank}")) >= 3
    assert one.err == "sixfold: asked the ranks to save and stop; Ctrl-C again ends at once\n"
    assert one.left() == []


def test_a_rank_that_lingers_after_the_save_is_ended(start: Start) -> None:
    one = start(TRAINS + "if rank == 1: await_file('never')", LINGER_S=0.5)
    one.await_file("steps-0")
    one.await_file("steps-1")
    one.kill(signal.SIGTERM)
    assert one.wait(0.3 + LIMIT_S) == 130
    assert one.left() == []


def test_a_second_ctrl_c_ends_at_once(start: Start) -> None:
    text = """
while not session.stop_requested: tell(f'up-{rank}')
with session.saving():
    tell(f'saving-{rank}')
    await_file('never')
"""
    one = start(HELPER + text)
    one.await_file("up-0")
    one.await_file("up-1")
    one.kill(signal.SIGINT)
    one.await_file("saving-0")
    one.await_file("saving-1")
    one.kill(signal.SIGINT)
    assert one.wait(LIMIT_S) == 4
    assert one.err.endswith("sixfold: ended before the ranks had saved, because a second signal came\n")
    assert one.left() == []


def test_ranks_that_neither_save_nor_step_after_the_signal_are_ended(start: Start) -> None:
    one = start(HANGS, STALL_S=0.5)
    one.await_file("pid-0")
    one.await_file("pid-1")
    one.kill(signal.SIGTERM)
    assert one.wait(LIMIT_S) == 4
    assert "because no rank saved or made a step for" in one.err
    assert one.left() == []


def test_a_failure_during_the_save_is_a_failure(start: Start) -> None:
    one = start(
        "if rank == 0:\n    while not session.stop_requested: tell('up')\n    raise OSError('disk full')\n"
        + HANGS
    )
    one.await_file("up")
    one.kill(signal.SIGINT)
    assert one.wait(LIMIT_S) == 4
    assert "OSError: disk full" in one.err
    one.assert_nothing_left()


def test_a_script_that_never_looks_gets_a_keyboard_interrupt(start: Start) -> None:
    one = start(
        "from sixfold.launch import worker\nworker.UNANSWERED_S = 0.5\n"
        "tell(f'up-{rank}')\ntry:\n    while True: time.sleep(0.01)\nfinally:\n    tell(f'finally-{rank}')\n"
    )
    one.await_file("up-0")
    one.await_file("up-1")
    one.kill(signal.SIGINT)
    assert one.wait(LIMIT_S) == 130
    assert (one.folder / "finally-0").exists()
    assert (one.folder / "finally-1").exists()
    assert "Traceback" not in one.err + one.log(0) + one.log(1)


@pytest.mark.parametrize(
    ("text", "code", "headline"),
    [
        (
            "from sixfold.base.errors import ConfigError as E; raise E('7', rule='r', fix='f')",
            2,
            "ConfigError: 7",
        ),
        ("sys.exit('no data')", 4, "SystemExit: no data"),
        ("os._exit(9)", 4, "exited with code 9 and left no exception"),
    ],
)
def test_exit_codes(start: Start, text: str, code: int, headline: str) -> None:
    """Of an error for users, another one, and no word; which has which is in test_launch_failure.py."""
    one = start(text, ranks=1)
    assert one.wait() == code
    assert headline in one.err


def test_a_terminal_stays_a_terminal_for_rank_0(start: Start) -> None:
    ours, theirs = pty.openpty()
    text = """
if rank == 0:
    size = os.get_terminal_size(1)
    for step in range(3): print(f"\\rstep {step}", end="", flush=True)
    print(f" {sys.stdout.isatty()} {sys.stderr.isatty()} {size.columns}", flush=True)
else:
    print(sys.stdout.isatty())
"""
    termios.tcsetwinsize(theirs, (40, 123))
    one = start(text, out=os.ttyname(theirs))
    assert one.wait() == 0
    assert os.read(ours, 4096).decode() == "\rstep 0\rstep 1\rstep 2 True True 123\r\n"
    assert one.log(0) == "step 2 True True 123\n"
    assert one.log(1) == "False\n"
    os.close(ours)
    os.close(theirs)


def test_two_nodes_on_one_machine(start: Start) -> None:
    port = free_port()
    text = "print(*[os.environ[n] for n in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR')], flush=True)"
    both = [start(text, node=NodePlacement(n, 2, None, "127.0.0.1", port)) for n in range(2)]
    assert [one.wait() for one in both] == [0, 0]
    said = [both[rank // 2].log(rank) for rank in range(4)]
    assert said == [f"{rank} {rank % 2} 4 127.0.0.1\n" for rank in range(4)]


def test_a_module_runs_as_under_python_m(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").touch()
    (tmp_path / "mine/neighbour.py").write_text("name = 'neighbour'")
    (tmp_path / "mine/main.py").write_text(
        "import sys; from . import neighbour; print(__name__, neighbour.name, sys.argv[1:])"
    )
    command = [sys.executable, "-m", "sixfold.launch.script", "-m", "mine.main", "x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "__main__ neighbour ['x']\n", "")


def test_a_script_sees_what_plain_python_shows(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/neighbour.py").touch()
    script = "import sys, neighbour; print(__name__, __file__, sys.argv, sys.path[0])"
    (tmp_path / "sub/script.py").write_text(script)
    told = [
        subprocess.run(
            [*command, "sub/script.py", "a"], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        for command in ([sys.executable], [sys.executable, "-m", "sixfold.launch.script"])
    ]
    assert told[0].stdout == told[1].stdout


PLACED = """
import os
from sixfold.launch import current_session, discover
place = discover(os.environ)
session = current_session()
line = f"{place.rank} {place.world_size} {place.source} {session.rank} {session.supervised}\\n"
os.write(1, line.encode())  # in one piece: ranks of torchrun share an unbuffered stream
"""


def test_under_torchrun(tmp_path: Path, warm_python: str) -> None:
    (tmp_path / "script.py").write_text(PLACED)
    torchrun = [warm_python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "sixfold.launch.script", "script.py"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert sorted(done.stdout.splitlines()) == ["0 2 elastic 0 False", "1 2 elastic 1 False"]


def test_sigkill_of_torchrun_takes_the_ranks_along(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(PREAMBLE + "tell(f'pid-{rank}', os.getpid())\nawait_file('never')")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*torchrun, "-m", "sixfold.launch.script", "script.py"],
        cwd=tmp_path,
        env=os.environ | {"TEST_FOLDER": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    for rank in range(2):
        wait_until((tmp_path / f"pid-{rank}").exists, START_S)
    process.kill()
    process.wait()
    wait_until(lambda: not members(f"TEST_FOLDER={tmp_path}", ()), LIMIT_S)


def test_a_missing_script_is_a_usage_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sixfold.launch.script", "absent.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "ConfigError: no script at 'absent.py'" in done.stderr


SLURM_TASK = {
    "SLURM_JOB_ID": "5",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
}


def test_under_slurm_a_rank_tells_its_own_failure(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(PLACED + "session.step = 3\nraise ValueError('mine')\n")
    command = [sys.executable, "-m", "sixfold.launch.script", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | SLURM_TASK)
    assert done.stdout == "1 2 slurm 1 False\n"
    assert done.returncode == 4
    assert done.stderr.splitlines()[:2] == ["sixfold: rank 1 of 2 failed at step 3", "ValueError: mine"]


def test_without_a_launcher_an_interrupted_session_ends_with_130(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import os, signal\nfrom sixfold.launch import current_session\nsession = current_session()\n"
        "os.kill(os.getpid(), signal.SIGTERM)\nassert session.stop_requested\nsession.interrupted()\n"
    )
    command = [sys.executable, "-m", "sixfold.launch.script", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")


def test_a_forked_helper_does_not_inherit_the_answer_to_signals(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import os, signal, time\nready, up = os.pipe()\nchild = os.fork()\n"
        "if not child:\n    os.write(up, b'x')\n    time.sleep(60)\nos.read(ready, 1)\n"
        "os.kill(child, signal.SIGTERM)\nprint(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    command = [sys.executable, "-m", "sixfold.launch.script", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert done.stdout == "-15\n"


def test_what_cannot_be_started_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no-such-program"):
        launch(["no-such-program"], ranks=1, run_folder=tmp_path)
    with pytest.raises(ConfigError, match="0 ranks"):
        launch([sys.executable], ranks=0, run_folder=tmp_path)
    nowhere = NodePlacement(0, 2, None, "no-such-host.invalid", 1)
    with pytest.raises(ConfigError, match=r"no-such-host\.invalid"):
        launch([sys.executable], ranks=1, run_folder=tmp_path, node=nowhere)
