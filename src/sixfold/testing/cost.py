"""Measure what the pool costs: `python -m sixfold.testing.cost` prints start, cost per run, rebuild.

For docs/numbers.md and for whoever changes the pool. It runs nothing but an empty function.
"""

from __future__ import annotations

import os
import statistics
import time

from sixfold.testing.pool import Pool

_ROUNDS = 50
_REBUILDS = 9


def nothing() -> None:
    """The cheapest test there is."""


def main() -> None:
    """Print one line per number, in milliseconds, medians where repeated."""
    print(f"{os.cpu_count()} cores; medians of {_ROUNDS} runs and {_REBUILDS} rebuilds; milliseconds")
    with Pool() as pool:
        first = _timed(lambda: pool.run(nothing, ranks=1))
        print(f"start, first run of one rank included   {first:8.1f}")
        for ranks in (1, 2, 4):
            pool.run(nothing, ranks=ranks)
            kept = [_timed(lambda ranks=ranks: pool.run(nothing, ranks=ranks)) for _ in range(_ROUNDS)]
            rebuilt = []
            for _ in range(_REBUILDS):
                pool.discard(ranks)
                rebuilt.append(_timed(lambda ranks=ranks: pool.run(nothing, ranks=ranks)))
            print(f"a run on {ranks} rank(s), world kept            {statistics.median(kept):8.1f}")
            print(f"a run on {ranks} rank(s), new processes         {statistics.median(rebuilt):8.1f}")


def _timed(call: object) -> float:
    assert callable(call), "only calls are timed"
    began = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
