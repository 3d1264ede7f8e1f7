"""The commands as a user runs them: real launches of real ranks on a tiny corpus.

One finished run of two ranks is shared by the tests that only look at it or go on from a copy of it. What a
run's ranks do however they were started is in tests/ranks/test_train.py.
Nothing waits for a guessed time: tests wait for lines in files and for processes to end.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from sixfold.checkpoint import latest, open_checkpoint
from sixfold.config import load
from sixfold.config.schema import LEAVES
from sixfold.launch.guardian import members
from sixfold.monitor.journal import read_records
from tests.one import lab
from tests.one.terminal import Terminal

pytestmark = pytest.mark.fresh

STEPS = 6
LIMIT_S = 600.0
"""What lasts longer hangs, however slow and busy the machine."""
FIRST_SIGNAL = "sixfold: asked the ranks to save and stop; Ctrl-C again ends at once\n"
FOREVER = 10_000_000
SIXFOLD = [sys.executable, "-m", "sixfold"]


@dataclass
class Place:
    """A folder with a corpus and a configuration, in which commands are run.

    Args:
        folder: working directory of the commands; holds `text`, `cache` and `my.toml`.
    """

    folder: Path

    def environment(self) -> dict[str, str]:
        foreign = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        kept = {name: value for name, value in os.environ.items() if name not in foreign}
        # HOME: a forgotten data.cache would show there. TEST_FOLDER: finds every process of a command.
        return {**kept, "HOME": str(self.folder / "home"), "TEST_FOLDER": str(self.folder), "COLUMNS": "200"}

    def start(self, *command: str | Path, **options: Any) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        everything = {**pipes, "cwd": self.folder, "env": self.environment(), "text": True, **options}
        return subprocess.Popen([*map(str, command)], start_new_session=True, **everything)

    def run(self, *command: str | Path, **options: Any) -> tuple[int, str, str]:
        process = self.start(*command, **options)
        out, err = process.communicate(timeout=LIMIT_S)
        return process.returncode, out, err

    def records(self, run: str) -> list[dict[str, Any]]:
        file = self.folder / run / "metrics.jsonl"
        return [one for one in read_records(file) if "loss" in one] if file.exists() else []

    def left(self) -> list[int]:
        return members(f"TEST_FOLDER={self.folder}", ())

    def rank(self, number: int) -> int:
        """Process id of a rank of the command that is running."""
        for pid in self.left():
            with contextlib.suppress(OSError):
                if f"\0RANK={number}\0".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
                    return pid
        raise AssertionError(f"no rank {number} is running")

    def assert_nothing_left(self) -> None:
        wait_until(lambda: not self.left(), 10.0)


def wait_until(
    condition: Callable[[], object], limit_s: float = LIMIT_S, process: subprocess.Popen[str] | None = None
) -> None:
    """Wait for something that `process` does; its end before that is a failure at once."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s} s"
        if process is not None and process.poll() is not None:
            told = process.stderr.read() if process.stderr else ""
            raise AssertionError(f"it ended with {process.returncode} before that\n{told}")
        time.sleep(0.02)


def weights(run: Path) -> dict[str, Any]:
    """Parameters, optimizer state and counters of a run's newest checkpoint, for comparison."""
    folder = latest(run / "checkpoints")
    assert folder is not None
    tensors = {
        f"{file}:{name}": tensor
        for file in ("model.safetensors", "optimizer.safetensors")
        for name, tensor in load_file(folder / file).items()
    }
    state = open_checkpoint(folder).state
    return {**tensors, "step": state["step"], "samples": state["samples"]}


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    different = [
        name
        for name in one
        if bool((one[name] != other[name]).any() if hasattr(one[name], "any") else one[name] != other[name])
    ]
    assert not different


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and the cache in which the first run prepares it."""
    folder = tmp_path_factory.mktemp("corpus")
    lab.write_corpus(folder / "text", num_files=200)
    (folder / "cache").mkdir()
    return folder


def make_place(folder: Path, corpus: Path) -> Place:
    folder.mkdir(exist_ok=True)
    settings = lab.settings(corpus, launch__ranks=2, launch__threads=1, train__steps=STEPS)
    lab.write_config(folder / "my.toml", {**settings, "train.folder": None})
    return Place(folder)


@pytest.fixture
def place(tmp_path: Path, corpus: Path) -> Iterator[Place]:
    """A place of its own for one test; whatever a failed test leaves running is killed."""
    made = make_place(tmp_path / "place", corpus)
    yield made
    for pid in made.left():
        os.kill(pid, signal.SIGKILL)


@dataclass
class Finished:
    """The shared run: its folder and what was said."""

    place: Place
    run: Path
    out: str
    err: str

    def copy_into(self, folder: Path) -> Path:
        shutil.copytree(self.run, folder / "run")
        return folder / "run"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path, warm_python: str) -> Finished:
    place = make_place(tmp_path_factory.mktemp("finished"), corpus)
    command = (warm_python, "-m", "sixfold", "train", "--config", "my.toml", "--into", "run")
    code, out, err = place.run(*command, "-s", "train.eval_every=3")
    assert code == 0, err
    return Finished(place, place.folder / "run", out, err)


# The main job.


def test_what_is_said(finished: Finished) -> None:
    assert all(line.startswith("corpus ") for line in finished.err.splitlines())
    for told in (
        " training tokens, 4 documents (",
        "ranks       2: data 2",
        "6 samples / 2 data ranks = 3 a rank",
        f"step {STEPS}/{STEPS}  loss ",
        "update 3: held-out bits per byte ",
        "gzip -9 ",
        "xz -9 ",
        "\nsample\ndef ",
        "\nrun folder run\n",
    ):
        assert told in finished.out
    assert finished.out.count("ranks       2") == 1
    assert "\x1b" not in finished.out  # plain lines where there is no terminal


def test_the_run_folder_is_complete(finished: Finished) -> None:
    assert sorted(path.name for path in finished.run.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.toml",
        "logs",
        "metrics.jsonl",
        "timeline.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    logs = {path.name: path.read_text() for path in (finished.run / "logs").glob("rank-*")}
    assert sorted(logs) == ["rank-0.log", "rank-1.log"]
    assert "held-out bits per byte" in logs["rank-0.log"]
    assert finished.place.left() == []
    assert not (finished.place.folder / "home").exists()


def test_the_configuration_is_written_with_origins(finished: Finished) -> None:
    text = (finished.run / "config.toml").read_text()
    assert "train" in text
    settings = load(finished.run / "config.toml").config
    assert (settings.train.steps, settings.train.eval_every, settings.launch.ranks) == (STEPS, 3, 2)
    for line, origin in (
        ("width = 32", "my.toml:"),
        ("eval_every = 3", "# --set"),
        ('name = "linear"', "# recipe"),
        ("rope_base = 10000.0", "# default"),
        ("# minutes is unset", "displaced by train.steps (my.toml:"),
    ):
        found = [each for each in text.splitlines() if each.startswith(line)]
        assert len(found) == 1
        assert origin in found[0] or origin.removeprefix("my.toml") in found[0]
    written = [each for each in text.splitlines() if each and not each.startswith("[")]
    assert len(written) == len(LEAVES)
    assert all("#" in each for each in written)


def test_metrics_hold_every_step_once(finished: Finished) -> None:
    records = finished.place.records("run")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [record["samples"] for record in records] == [6 * step for step in range(1, STEPS + 1)]
    assert records[-1]["loss"] < records[0]["loss"]
    raw = [json.loads(line) for line in (finished.run / "metrics.jsonl").read_text().splitlines()]
    assert [one["step"] for one in raw if "held_out_bits_per_byte" in one] == [3, STEPS]


def test_the_checkpoint_is_plain_safetensors(finished: Finished) -> None:
    folder = finished.run / "checkpoints" / f"step-{STEPS:08d}"
    tensors = load_file(folder / "model.safetensors")
    assert tuple(tensors["model.embed_tokens.weight"].shape) == (300, 32)
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert [path.name for path in (finished.run / "checkpoints").iterdir()] == [folder.name]


# Other ways to start the same.


def test_under_torchrun(finished: Finished, place: Place, warm_python: str) -> None:
    """Ranks that somebody else started find their place; the numbers are the same to the last bit."""
    torchrun = [warm_python, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    code, out, err = place.run(*torchrun, "-m", "sixfold", "train", "--config", "my.toml", "--into", "run")
    assert code == 0, err
    assert out.count("\nrun folder run") == 1
    assert_equal(weights(place.folder / "run"), weights(finished.run))
    place.assert_nothing_left()


SCRIPT = """
import os, sys, time
import torch
from torch import nn
import sixfold

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
config = {"batch": {"global": 8}, "optimizer": {"lr": 0.05}}
def error(output, batch):
    return ((output - batch[1]) ** 2).mean()
engine = sixfold.initialize(model, config=config, loss_fn=error)
x = torch.linspace(-1, 1, 256).reshape(64, 4)
data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True).sin())
losses = [engine.train_step(batch) for epoch in range(2) for batch in engine.loader(data)]
assert losses[-1] < losses[0], losses
engine.save(sys.argv[1])
if engine.mesh.rank == 0:
    print(f"{engine.data_ranks} ranks, {engine.num_samples} samples")
engine.close()

def gloo_threads():
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    return [name.strip() for name in names if "gloo" in name]

deadline = time.monotonic() + 5
while gloo_threads() and time.monotonic() < deadline:
    time.sleep(0.05)
assert not gloo_threads(), gloo_threads()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="thread names are read from /proc")
def test_a_users_own_script(place: Place, warm_python: str) -> None:
    """Which, closed, leaves no threads of gloo behind, or that may abort a rank on its way out."""
    (place.folder / "mine.py").write_text(SCRIPT)
    code, out, err = place.run(
        *(warm_python, "-m", "sixfold", "run", "--ranks", "2", "--into", "logs", "mine.py", "saved")
    )
    assert (code, err) == (0, "")
    assert out == "2 ranks, 128 samples\n"
    assert open_checkpoint(place.folder / "saved").state["step"] == 16
    assert sorted(load_file(place.folder / "saved" / "model.safetensors")) == [
        "0.bias",
        "0.weight",
        "2.bias",
        "2.weight",
    ]
    place.assert_nothing_left()


# Stopping and going on.


@pytest.mark.usefixtures("finished")  # which has prepared the corpus, and said so
def test_a_stopped_run_says_how_it_goes_on(place: Place, warm_python: str) -> None:
    """SIGTERM somewhere in a long run."""
    long = ("train", "--config", "my.toml", "--into", "stopped", "-s", f"train.steps={FOREVER}")
    process = place.start(warm_python, "-m", "sixfold", *long)
    wait_until(lambda: len(place.records("stopped")) >= 3, process=process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, err) == (130, FIRST_SIGNAL)
    place.assert_nothing_left()
    done = place.records("stopped")[-1]["step"]
    assert f"stopped and saved after update {done}; go on with:\n  sixfold train --resume stopped\n" in out
    saved = latest(place.folder / "stopped" / "checkpoints")
    assert saved is not None
    assert open_checkpoint(saved).step == done


def test_a_complete_run_is_left_as_it_is(finished: Finished, sixfold: Terminal) -> None:
    """Which the launcher finds out: it starts no ranks."""
    run = finished.copy_into(sixfold.folder)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert sixfold("train", "--resume", run) == 0
    told = f"already complete after update {STEPS}; nothing to do (raise train.steps to go on)\n"
    assert (sixfold.out, sixfold.err) == (told, "")
    assert sixfold("train", "--resume", run, "-s", "train.steps=3") == 2
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_ctrl_c_twice_on_a_terminal(place: Place) -> None:
    """A live line; a rank that cannot answer the first Ctrl-C; the second one ends all at once."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, b"\x28\x00\x78\x00\x00\x00\x00\x00")  # 40 rows, 120 columns

    def take_terminal() -> None:
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    process = place.start(
        *(*SIXFOLD, "train", "--config", "my.toml", "--into", "run", "-s", f"train.steps={FOREVER}"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=take_terminal,
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    shown = b""

    def see() -> bytes:
        nonlocal shown
        with contextlib.suppress(OSError):  # nothing new, or the terminal has been left
            shown += os.read(ours, 65536)
        return shown

    # A line that is written again and again in its place.
    wait_until(lambda: see().count(b"\r\x1b[2K") >= 3 and b"tok/s" in shown, process=process)
    os.kill(place.rank(1), signal.SIGSTOP)
    os.write(ours, b"\x03")
    wait_until(lambda: b"Ctrl-C again ends at once" in see(), process=process)
    os.write(ours, b"\x03")
    wait_until(lambda: see() and process.poll() is not None)
    assert process.returncode == 4
    os.close(ours)
    assert b"ended before the ranks had saved, because a second signal came" in shown
    assert latest(place.folder / "run" / "checkpoints") is None
    place.assert_nothing_left()


@pytest.mark.usefixtures("finished")  # which has prepared the corpus, and said so
def test_a_killed_worker(place: Place) -> None:
    process = place.start(
        *(*SIXFOLD, "train", "--config", "my.toml", "--into", "run", "-s", f"train.steps={FOREVER}")
    )
    wait_until(lambda: place.records("run"), process=process)
    os.kill(place.rank(1), signal.SIGKILL)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 4
    first, second = err.splitlines()[:2]
    assert first.startswith("sixfold: rank 1 of 2 failed at step ")
    assert second.startswith("rank 1 was killed by SIGKILL")
    place.assert_nothing_left()


# A disk that is full while saving.


def test_a_file_that_may_not_grow_while_saving(finished: Finished, place: Place) -> None:
    """Without any right to mount: files are limited to less than the model, more than metrics and logs."""
    run = finished.copy_into(place.folder)
    before = weights(run)
    limit = (run / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors").stat().st_size // 2

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code, _, err = place.run(
        *(*SIXFOLD, "train", "--resume", "run", "-s", f"train.steps={STEPS + 2}"),
        preexec_fn=limited,
    )
    assert_told_and_intact(code, err, run, before)
    place.assert_nothing_left()


def test_a_disk_without_room_for_a_save_is_told_before_the_first_update(
    finished: Finished, place: Place
) -> None:
    """A small tmpfs, in a mount namespace of its own so that nothing of it outlives the command."""
    probe = ["unshare", "--mount", "--map-root-user", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a tmpfs")
    run = finished.copy_into(place.folder)
    before = weights(run)
    used = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    script = (
        f"mkdir disk && mount -t tmpfs -o size={used + 200_000} tmpfs disk && cp -r run disk/run || exit 99\n"
        f'"$@" train --resume disk/run -s train.steps={STEPS + 2}\n'
        "code=$?; rm -r run; cp -r disk/run run; exit $code"
    )
    code, _, err = place.run("unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh", *SIXFOLD)
    assert code == 4, err
    assert re.match(r"sixfold: rank [01] of 2 failed.*\nSaveError: .*one checkpoint takes", err)
    assert [record["step"] for record in place.records("run") if "loss" in record] == list(
        range(1, STEPS + 1)
    )
    assert_equal(weights(run), before)
    place.assert_nothing_left()


def assert_told_and_intact(code: int, err: str, run: Path, before: dict[str, Any]) -> None:
    assert code == 4, err
    # Every rank tells what rank 0 met; which one is heard first is chance.
    lines = err.splitlines()
    if "ranks exchange over the network" in lines[0]:  # shared memory is bound by the same limit
        err = "\n".join(lines[1:])
    assert re.match(rf"sixfold: rank [01] of 2 failed at step {STEPS + 2}\nSaveError: .*saving ", err)
    assert f"checkpoints/step-{STEPS + 2:08d} failed: " in err.splitlines()[1]
    assert "\n  fix: " in err or "\nfix: " in err
    assert_equal(weights(run), before)
