"""What a real DeepSpeed on two ranks saved, imported and trained on; by hand, since it takes minutes."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import sixfold
from sixfold.checkpoint import open_checkpoint
from sixfold.checkpoint.importing import import_folder
from tests.fresh.deepspeed_saves import Small, groups_of, tokens

pytestmark = [
    pytest.mark.fresh,
    pytest.mark.matrix,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_it_saved_goes_on_here(stage: int, precision: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("deepspeed_saves.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), str(stage), precision, str(tmp_path / "theirs")],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    truth = torch.load(tmp_path / "theirs" / "truth", weights_only=True)
    import_folder(tmp_path / "theirs", tmp_path / "native")
    saved = open_checkpoint(tmp_path / "native")
    for name, weight in truth["weights"].items():
        held = saved.read_optimizer(name)
        assert torch.equal(held.get("master", saved.read_model(name)), weight), name
    model = Small()
    if precision == "bf16":
        model = model.bfloat16()
        model.seen = model.seen.float()
    engine = sixfold.initialize(
        model,
        optimizer=torch.optim.AdamW(groups_of(model), lr=0.01),
        config={"precision": {"compute": "bf16", "storage": "bf16"} if precision == "bf16" else {}},
    )
    engine.load(tmp_path / "native")
    assert engine.num_steps == 3
    assert engine.num_samples == 12
    # The second loss shows that the moments came along.
    for step, loss in zip((3, 4), truth["losses"], strict=True):
        assert engine.train_step({"tokens": tokens(step)}) == pytest.approx(
            loss, rel=1e-5 if precision == "fp32" else 1e-2
        )
