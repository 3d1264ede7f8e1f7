"""Run folders as training leaves them, made by hand: for tests of what reads runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

from sixfold.config import load
from sixfold.monitor.recording import write_recording
from sixfold.program import training
from sixfold.simulate import Costs, StageCosts, simulate


def make_run(folder: Path, *, num_steps: int = 12, lr: float = 1e-3, zero: int = 0, ranks: int = 2) -> Path:
    """A finished run whose figures are those of formulas; `record_update` adds a recorded one."""
    folder.mkdir(parents=True)
    values = {"optimizer.lr": lr, "layout.zero": zero, "train.steps": num_steps}
    resolved = load(values=values).decide({"launch.ranks": ranks}, "one per core")
    (folder / "config.toml").write_text(resolved.to_toml())
    parts = {"parameters": 1, "gradients": ranks if zero >= 2 else 1, "optimizer": ranks if zero else 1}
    facts = {
        "plan": f"ranks       {ranks}: data {ranks}",
        "batch": "4 samples",
        "degrees": {"pipe": 1, "data": ranks, "context": 1, "tensor": 1},
        "parts": parts,
        "num_trained": 5_500_000,
        "compressors": {"gzip -9": 1.717},
    }
    records: list[dict[str, object]] = [{"facts": facts}]
    for step in range(1, num_steps + 1):
        records.append(
            {
                "step": step,
                "loss": 8 * math.exp(-step / 5) + 1,
                "lr": lr,
                "grad_norm": 1 + 1 / step,
                "tokens": 1000,
                "samples": 4 * step,
                "seconds": 2.0,
                "tokens_per_s": 500.0,
                "mfu": 0.4,
                "memory_bytes": 2**28,
                "eta_s": 0.0,
                "data_s": 0.1,
                "compute_s": 1.5,
                "exchange_s": 0.3,
                "host_s": 0.1,
            }
        )
    records.append({"step": num_steps, "held_out_bits_per_byte": 1.9})
    records.append({"step": num_steps, "sample": "def <b>sample</b>():\n    pass"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def record_update(run: Path) -> None:
    """Update 3 of a pipeline of two ranks, where transfers take a quarter of the time of a pass."""
    costs = Costs((StageCosts(output_bytes=1),) * 2, bandwidth=4.0, step=1.0)
    write_recording(run, 3, simulate(training("1f1b", 2, 3), costs), warn=print)
