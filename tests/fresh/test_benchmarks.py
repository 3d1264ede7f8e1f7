"""The benchmark commands still run, from start to table; their figures are hardly judged here."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.fresh

ROOT = Path(__file__).parents[2]
ROWS = ("step, wall time", "step, CPU time", "tokens/s", "start to first step", "peak memory")
HUNG_S = 600.0
"""After this long a command hangs, however slow and busy the machine."""

Run = Callable[..., str]


@pytest.fixture
def run(warm_python: str, tmp_path: Path) -> Run:
    """Run a benchmark with arguments, and variables on top of the environment; returns what it prints."""

    def run(name: str, *arguments: str, **variables: str) -> str:
        done = subprocess.run(
            [warm_python, str(ROOT / "benchmarks" / name), *arguments],
            cwd=tmp_path,
            env=os.environ | variables,
            capture_output=True,
            text=True,
            timeout=HUNG_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_data_parallel_prints_its_table(run: Run) -> None:
    told = run("data_parallel.py", "--smoke", "--rounds", "1")
    for row in ROWS:
        cells = [line.split("|")[2:6] for line in told.splitlines() if line.startswith(f"| {row}")]
        assert len(cells) == 1, f"{row} in\n{told}"
        assert all(float(cell) > 0 for cell in cells[0][:3]), cells


def test_the_dispatcher_costs_little(run: Run) -> None:
    figures = json.loads(run("dispatcher.py", "--json", "--model", "tiny"))
    for preset in (0, 2):
        assert figures[f"zero {preset}: exchanges a step"] > 0
        assert 0 < figures[f"zero {preset}: share_percent"] < 1.0, figures


def test_exchange_prints_every_exchange_of_both_transports(run: Run) -> None:
    medians = json.loads(run("exchange.py", "--rounds", "1", "--mb", "1", "--json"))
    assert len(medians) == 2 * (3 * 2 + 1)
    assert all(float(value) > 0 for value in medians.values())


def test_checkpoint_prints_its_table(run: Run) -> None:
    lines = run("checkpoint.py", "--smoke").splitlines()
    for row in ("raw", "sixfold", "torch.save", "distributed"):
        cells = [line.split("|")[2:8] for line in lines if line.startswith(f"| {row} |")]
        assert len(cells) == 1, f"{row} in\n{lines}"
        assert all(float(cell) >= 0 for cell in cells[0]), cells
    assert "blocked" in lines[-1]


def test_zero_measures_sixfold_beside_ddp_and_says_why_another_cannot_run(run: Run, tmp_path: Path) -> None:
    (tmp_path / "fairscale.py").write_text("raise ImportError('not for this Python')\n")
    told = run(
        *("zero.py", "--models", "tiny", "--dtype", "fp32"),
        *("--rounds", "1", "--memory-steps", "1", "--json", "figures.json"),
        *("--only", "sixfold-3", "fairscale-oss"),
        PYTHONPATH=os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]),
    )
    rows = {row["competitor"]: row for row in json.loads((tmp_path / "figures.json").read_text())}
    assert rows.keys() == {"sixfold-3", "fairscale-oss"}
    row = rows["sixfold-3"]
    assert "reason" not in row, row["reason"]
    assert row["num_compared"] == 4
    assert all(row[key] > 0 for key in ("step_ms", "ddp_ms", "peak_mb", "sent_mb"))
    assert f"| sixfold-3 | {row['speed'][0]:.3f} |" in told
    assert "| stage 3 over gloo / DDP | 0.80 |" in told
    assert "Could not run: fairscale-oss: ImportError: not for this Python" in told


def test_the_main_job_is_compared_with_a_plain_script(run: Run, tmp_path: Path) -> None:
    figures = json.loads(run("main_job.py", "--smoke", "--rounds", "1", "--json", HOME=str(tmp_path)))
    assert figures["sixfold tokens/s"] > 0
    assert figures["from"] <= figures["ratio"] <= figures["to"]


def test_pipeline_prints_its_table(run: Run) -> None:
    told = run("pipeline.py", "--tiny", "--only", "torch-1f1b", "--rounds", "1", "--steps", "1")
    (cells,) = [line.split("|")[2:8] for line in told.splitlines() if line.startswith("| torch-1f1b")]
    assert float(cells[0]) > 0
    assert "NOT THE SAME WORK" not in told


def test_tensor_sends_what_the_formula_says(run: Run) -> None:
    found = json.loads(run("axes.py", "--only", "tensor", "--rounds", "1", "--json"))["tensor"]
    assert found["times"].keys() == {"sixfold, host", "sixfold, network", "torch styles"}
    assert all(values[0] > 0 for values in found["times"].values())
    assert found["facts"]["bytes given to exchange in a turn"] == found["facts"]["formula"] > 0
