"""What every test of this repository gets.

Test folders are packages (`tests.ranks.test_pool`), imported in pytest's plain mode: equal file names on
two floors do not collide, and helpers are imported as `from tests.<floor>.<module> import ...`.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# Two cores are shared by pytest's workers and by ranks; one compute thread each also makes sums repeatable.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["sixfold.testing.plugin"]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip(f"needs a CUDA device, and torch {torch.__version__} sees none here: NOT RUN")


# How long an example takes says nothing on a machine with other work.
settings.register_profile("sixfold", deadline=None)
settings.load_profile("sixfold")
