"""`zero.py` on a GPU, in one command: one rank over NCCL, then two gloo ranks that share the card.

    python benchmarks/gpu.py [any option of zero.py]

Sixfold's presets beside DDP and FSDP2. Two ranks on one card compete for it, and gloo takes every message
through host memory: those figures show that layouts run and train alike, not how fast two cards are. Memory
is then torch's peak of allocated device memory in a rank. DeepSpeed and FairScale can be named with --only.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import zero

COMPETITORS = ("ddp", "no-communication", "sixfold-?", "fsdp2*")
LAYOUTS = (("1", "nccl"), ("2", "gloo"))


def main() -> None:
    """Run `zero.py` once for each layout."""
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here; on the CPU run benchmarks/zero.py")
    results: list[dict[str, Any]] = []
    for ranks, backend in LAYOUTS:
        layout = ["--device", "cuda", "--ranks", ranks, "--backend", backend]
        zero.main([*layout, "--only", *COMPETITORS, *sys.argv[1:]], results)


if __name__ == "__main__":
    main()
