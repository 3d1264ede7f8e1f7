"""The benchmark commands still run, from start to table; their figures are hardly judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.fresh

ROOT = Path(__file__).parents[2]
ROWS = ("step, wall time", "step, CPU time", "tokens/s", "start to first step", "peak memory")


def test_data_parallel_prints_its_table(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "data_parallel.py"), "--smoke", "--rounds", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for row in ROWS:
        cells = [line.split("|")[2:6] for line in lines if line.startswith(f"| {row}")]
        assert len(cells) == 1, f"{row} in\n{done.stdout}"
        assert all(float(cell) > 0 for cell in cells[0][:3]), cells


def test_the_dispatcher_costs_little(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "dispatcher.py"), "--json", "--model", "tiny"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert 0 < figures["zero 0: share_percent"] < 1.0, figures
    assert 0 < figures["zero 2: share_percent"] < 1.0, figures


def test_exchange_prints_every_exchange_of_both_transports(tmp_path: Path) -> None:
    file = ROOT / "benchmarks" / "exchange.py"
    command = [sys.executable, str(file), "--rounds", "1", "--mb", "1", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    medians = json.loads(done.stdout)
    assert len(medians) == 2 * (3 * 2 + 1)
    assert all(float(value) > 0 for value in medians.values())


def test_checkpoint_prints_its_table(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "checkpoint.py"), "--smoke"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for row in ("raw", "sixfold", "torch.save", "distributed"):
        cells = [line.split("|")[2:8] for line in lines if line.startswith(f"| {row} |")]
        assert len(cells) == 1, f"{row} in\n{done.stdout}"
        assert all(float(cell) >= 0 for cell in cells[0]), cells
    assert "blocked" in lines[-1]


def test_zero_measures_sixfold_beside_ddp_and_says_why_another_cannot_run(tmp_path: Path) -> None:
    (tmp_path / "fairscale.py").write_text("raise ImportError('not for this Python')\n")
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(ROOT / "benchmarks" / "zero.py"), "--models", "tiny", "--dtype", "fp32"]
    command += ["--rounds", "1", "--memory-steps", "1", "--json", "figures.json"]
    command += ["--only", "sixfold-3", "fairscale-oss"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = {row["competitor"]: row for row in json.loads((tmp_path / "figures.json").read_text())}
    assert rows.keys() == {"sixfold-3", "fairscale-oss"}
    row = rows["sixfold-3"]
    assert "reason" not in row, row["reason"]
    assert row["num_compared"] == 4
    assert all(row[key] > 0 for key in ("step_ms", "ddp_ms", "peak_mb", "sent_mb"))
    assert f"| sixfold-3 | {row['speed'][0]:.3f} |" in done.stdout
    assert "| stage 3 over gloo / DDP | 0.80 |" in done.stdout
    assert "Could not run: fairscale-oss: ImportError: not for this Python" in done.stdout


def test_the_main_job_is_compared_with_a_plain_script(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "main_job.py"), "--smoke", "--rounds", "1", "--json"]
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["sixfold tokens/s"] > 0
    assert figures["least"] <= figures["ratio"] <= figures["most"]


def test_pipeline_prints_its_table(tmp_path: Path) -> None:
    file = ROOT / "benchmarks" / "pipeline.py"
    command = [sys.executable, str(file), "--tiny", "--only", "torch-1f1b", "--rounds", "1", "--steps", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (cells,) = [line.split("|")[2:8] for line in done.stdout.splitlines() if line.startswith("| torch-1f1b")]
    assert float(cells[0]) > 0
    assert "NOT THE SAME WORK" not in done.stdout


def test_tensor_sends_what_the_formula_says(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "axes.py"), "--only", "tensor", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--json"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["tensor"]
    assert found["times"].keys() == {"sixfold, host", "sixfold, network", "torch styles"}
    assert all(values[0] > 0 for values in found["times"].values())
    assert found["facts"]["bytes given to exchange in a turn"] == found["facts"]["formula"] > 0
