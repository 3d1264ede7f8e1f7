"""Run functions and tests on several gloo ranks of this machine, from a pool that is started once.

For Sixfold's own tests and for yours: `Pool` from any script, or in a conftest.py
`pytest_plugins = ["sixfold.testing.plugin"]` and `@pytest.mark.ranks(2)` on a test.
Not a launcher: ranks of the pool are thrown away after any failure and never span machines.
"""

from __future__ import annotations

from sixfold.testing.pool import Pool
from sixfold.testing.ports import free_port
from sixfold.testing.report import RankFailure

__all__ = ["Pool", "RankFailure", "free_port"]
