"""What every test of this repository gets.

Test folders are packages (`tests.ranks.test_pool`), imported in pytest's plain mode: equal file names on
two floors do not collide, and helpers are imported as `from tests.<floor>.<module> import ...`.
"""

from __future__ import annotations

import os

# Two cores are shared by pytest's workers and by ranks; one compute thread each also makes sums repeatable.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["sixfold.testing.plugin"]
