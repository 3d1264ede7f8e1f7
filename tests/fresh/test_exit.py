"""A rank that has finished leaves no communication threads behind, or gloo may abort it on its way out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sixfold.launch import launch

SCRIPT = """
import os, time, torch, sixfold

model = torch.nn.Linear(4, 1)
engine = sixfold.initialize(model, loss_fn=lambda output, batch: output.square().mean())
engine.train_step(torch.ones(2, 4))
engine.close()
deadline = time.monotonic() + 5
while True:
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    left = [name.strip() for name in names if "gloo" in name]
    if not left:
        break
    if time.monotonic() > deadline:
        raise RuntimeError(f"threads left after close: {left}")
    time.sleep(0.05)
"""


@pytest.mark.fresh
@pytest.mark.skipif(sys.platform != "linux", reason="thread names are read from /proc")
def test_closing_the_engine_ends_every_gloo_thread(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "sixfold.launch.script", str(script)]
    assert launch(command, ranks=2, run_folder=tmp_path, threads=1) == 0
