"""What a user sees of a hang: under this library's launcher, and where each rank was started by itself.

Every kind of verdict is in tests/ranks/test_hang.py; here one comes by the time that is up, one by an end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sixfold.launch import launch
from sixfold.testing import free_port

pytestmark = pytest.mark.fresh

SCRIPT = """
import sys, torch, sixfold
case = sys.argv[1]
# Short only where it is what tells the hang; elsewhere a slow machine must not be told in its place.
timeout_s = 2.0 if case == "skip" else 600.0
settings = {"launch": {"timeout_s": timeout_s, "start_timeout_s": 600.0}}
engine = sixfold.initialize(torch.nn.Linear(4, 1), config=settings, loss_fn=lambda out, _: out.sum())
mesh = engine.mesh
for _ in range(2):
    engine.train_step(torch.ones(2, 4))
    with mesh.phase("start"):
        mesh.barrier()  # nobody is late for what follows
if case == "skip" and mesh.rank != 2:
    mesh.replicas.all.all_reduce(torch.ones(1000)).wait()
if case == "raise" and mesh.rank == 1:
    raise ValueError("boom")
if case == "leave" and mesh.rank == 1:
    sys.exit()
mesh.barrier()  # the last
engine.close()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def line_of(text: str) -> int:
    return next(number for number, line in enumerate(SCRIPT.splitlines(), 1) if text in line)


@pytest.mark.parametrize(
    ("case", "ranks", "words", "place"),
    [
        (
            "skip",
            3,
            "rank 2 skipped all-reduce #{} (3.9 KiB, {}); ranks 0, 1 waited",
            "ones(1000)",
        ),
        (
            "leave",
            2,
            "rank 1 ended before all-reduce #{} (8 B, {}); rank 0 waited",
            "the last",
        ),
    ],
    ids=["skip", "leave"],
)
def test_the_launcher_tells_the_verdict_and_nothing_before_it(
    case: str,
    ranks: int,
    words: str,
    place: str,
    script: Path,
    warm_python: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    command = [warm_python, "-m", "sixfold.launch.script", str(script), case]
    assert launch(command, ranks=ranks, run_folder=script.parent, threads=1) == 4
    first, *rest = capfd.readouterr().err.splitlines()
    number = first.partition("#")[2].partition(" ")[0]
    assert first.startswith(f"sixfold: hang: {words.format(number, f'{script}:{line_of(place)}')}"), first
    assert sum(line.startswith(f"rank {rank}: ") for rank in range(ranks) for line in rest) == ranks
    assert not [line for line in rest if line.startswith("also ")]
    (waiting,) = [line for line in rest if line.startswith("rank 0: ")]
    assert waiting.endswith(", phase step")


def test_ranks_without_a_launcher_tell_it_once_and_all_end(
    script: Path, tmp_path: Path, warm_python: str
) -> None:
    """Plain processes, as under Slurm: rank 1 dies of an exception that only it prints."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    place |= {"WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    ranks = [
        subprocess.Popen(
            [warm_python, str(script), "raise"],
            env={**os.environ, **place, "RANK": str(rank), "TMPDIR": str(tmp_path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    told = [one.communicate(timeout=600)[1] for one in ranks]
    assert all(one.returncode for one in ranks)
    assert "ValueError: boom" in told[1]
    verdicts = [line for text in (told[0], told[2]) for line in text.splitlines() if "hang: " in line]
    assert len(verdicts) == 1
    assert verdicts[0].startswith("sixfold: hang: rank 1 died before the end of all-reduce #")
    assert f"{script}:{line_of('the last')}" in verdicts[0]
    assert "ended with ValueError: boom" in verdicts[0]
    assert "Traceback" not in told[0] + told[2]
    assert not list(tmp_path.glob("*.ring"))
    assert time.monotonic() - began < 120


PIPELINE = """
import os, signal, sys, time, torch, sixfold
from torch import nn
case = sys.argv[1]

class Block(nn.Linear):
    armed = False
    def forward(self, x):
        if Block.armed and case == "raise":
            raise ValueError("boom")
        if Block.armed and case == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)

settings = {
    "layout": {"pipe": 3},
    "batch": {"micro": 1},
    "launch": {"timeout_s": 600.0, "start_timeout_s": 600.0},
}
model = nn.Sequential(*(Block(4, 4) for _ in range(3)))
engine = sixfold.initialize(model, config=settings, loss_fn=lambda out, _: out.mean())
for step in range(3):
    Block.armed = step == 2 and engine.mesh.pipe_rank == 1  # in the middle
    engine.train_step(torch.ones(6, 4))
"""


@pytest.mark.parametrize(("case", "words"), [("raise", "ValueError: boom"), ("kill", "SIGKILL")])
def test_a_pipeline_ends_with_the_name_of_its_culprit(
    case: str, words: str, tmp_path: Path, warm_python: str, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(PIPELINE)
    began = time.monotonic()
    # Of a fork that is killed its launcher learns from another process.
    python = sys.executable if case == "kill" else warm_python
    command = [python, "-m", "sixfold.launch.script", str(script), case]
    assert launch(command, ranks=3, run_folder=tmp_path, threads=1) != 0
    said = capfd.readouterr().err
    assert words in said, said
    assert "rank 1" in said.splitlines()[0], said
    assert time.monotonic() - began < 90
