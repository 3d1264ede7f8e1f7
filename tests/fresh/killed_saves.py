"""Two ranks that save one checkpoint after another until they are killed; started by `test_killed_saves`.

One process forks the pairs, so that torch is loaded once. Prints a line for each kill.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from sixfold.checkpoint import MODEL, Content, Keep, Piece, Spec, latest, open_checkpoint, prune, step_folder
from sixfold.checkpoint.writing import Save, plan

SIZE = 600_000


def numbers(step: int) -> torch.Tensor:
    """What step `step` saves."""
    return torch.arange(SIZE, dtype=torch.float32) * step


def save_for_ever(root: Path, rank: int, first: int) -> None:
    """One rank; the other one is another process."""
    for step in range(first, 10**6):
        half = numbers(step)[rank * SIZE // 2 : (rank + 1) * SIZE // 2]
        content = Content(
            {MODEL: {"w": Spec((SIZE,), torch.float32)}},
            [Piece(MODEL, "w", rank * SIZE // 2, half)],
            {"step": step},
        )
        # Every fourth save goes to the name of the one before.
        folder = step_folder(root, step - (step % 4 == 0))
        Save(folder, content, plan(content), rank, 2, f"{first}-{step}", keep=Keep(2)).run()


def main() -> None:
    """Kill pair after pair: one rank, or both at once, at any moment."""
    root, num_kills = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    draw = random.Random(0)
    before = 0
    for number in range(num_kills):
        ranks = []
        for rank in range(2):
            pid = os.fork()
            if not pid:
                try:
                    save_for_ever(root, rank, before + 1)
                finally:
                    os._exit(1)
            ranks.append(pid)
        while latest(root) is None or open_checkpoint(latest(root)).step <= before:  # type: ignore[arg-type]
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.2))
        victims = (ranks[:1], ranks[1:], ranks)[number % 3]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)  # the survivor goes on as far as it can
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        newest = latest(root)
        assert newest is not None
        saved = open_checkpoint(newest)
        saved.verify()
        assert torch.equal(saved.read_model("w"), numbers(saved.step))
        assert saved.step > before, (saved.step, before)
        print(f"killed {len(victims)} after {saved.step}", flush=True)
        before = saved.step
    prune(root, Keep(2))
    left = sorted(path.name for path in root.iterdir())
    assert all(name.startswith("step-") for name in left), left
    assert len(left) <= 2


if __name__ == "__main__":
    main()
