"""The README's two commands as text, for whoever runs them: .ci/run and the tests.

`python -m tests.readme 2` prints the second one. They are written down in the README alone, so that
what is tested cannot drift from what is promised. Uses the standard library only: it runs before
anything is installed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
SECTION = "## Two commands"


def commands() -> tuple[str, str]:
    """The two bash blocks of the section: install and train, install and test."""
    text = README.read_text(encoding="utf-8")
    _, found, rest = text.partition(f"\n{SECTION}\n")
    section = re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0]
    blocks = re.findall(r"^```bash\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    if not found or len(blocks) != 2:
        raise SystemExit(f"{README}: {SECTION!r} has {len(blocks)} bash blocks, and it is two commands")
    return blocks[0].strip(), blocks[1].strip()


if __name__ == "__main__":
    print(commands()[int(sys.argv[1]) - 1])
