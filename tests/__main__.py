"""`python -m tests`: everything that has to hold before a change is good, the quickest first.

The README's second command and, through it, .ci/run call this. It ends at the first step that fails.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]

FLOORS = [f"tests/{floor}" for floor in ("fresh", "ranks", "one", "pure")]
"""The slowest files first and many small ones last, so that nobody is left with a long one in the end."""

STEPS: dict[str, list[str]] = {
    "lint": ["ruff", "check", "."],
    "format": ["ruff", "format", "--check", "."],
    "types": ["mypy"],
    # Two files at a time: many tests wait, or compute on one core. Whoever has files with ranks has a pool.
    "tests": ["pytest", "-q", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", *FLOORS],
}


def main() -> int:
    """The exit code of the first step that fails, or 0."""
    for name, command in STEPS.items():
        print(f"=== {name}", flush=True)
        began = time.monotonic()
        code = subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode
        if code:
            print(f"=== {name} failed after {time.monotonic() - began:.0f} s", flush=True)
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
