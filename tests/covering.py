"""Pairwise covering sets: few cases in which every legal pair of options occurs.

Used to generate parametrised tests; the full product stays available under the `matrix` mark.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Case = dict[str, Any]
MOST_CANDIDATES = 3000


def all_cases(factors: Mapping[str, Sequence[Any]], legal: Callable[[Case], bool]) -> list[Case]:
    """Every legal combination."""
    cases = (dict(zip(factors, values, strict=True)) for values in product(*factors.values()))
    return [case for case in cases if legal(case)]


def covering(factors: Mapping[str, Sequence[Any]], legal: Callable[[Case], bool]) -> list[Case]:
    """Legal combinations that hold every pair of values which any legal combination holds; greedy."""
    candidates = all_cases(factors, legal)
    random.Random(0).shuffle(candidates)
    # Each rank that imports the test module comes by here. So many hold every pair; a test looks at all.
    del candidates[MOST_CANDIDATES:]
    pairs_of = [_pairs(case) for case in candidates]
    missing = set().union(*pairs_of)
    chosen: list[Case] = []
    while missing:
        best = max(range(len(candidates)), key=lambda index: len(pairs_of[index] & missing))
        missing -= pairs_of[best]
        chosen.append(candidates[best])
    return chosen


def with_factor(cases: Sequence[Case], name: str, values: Sequence[Any]) -> list[Case]:
    """The cases with one factor more, so that each of its values meets every value of the others; greedy.

    Far cheaper than one more factor of the product, and only a few cases longer than before.
    """
    missing = {(pair, value) for case in cases for pair in case.items() for value in values}
    chosen: list[Case] = []

    def choose(options: Sequence[tuple[Case, Any]]) -> None:
        case, value = max(
            options, key=lambda option: len({(p, option[1]) for p in option[0].items()} & missing)
        )
        missing.difference_update((pair, value) for pair in case.items())
        chosen.append({**case, name: value})

    for case in cases:
        choose([(case, value) for value in values])
    while missing:
        choose([(case, value) for case in cases for value in values])
    return chosen


def label(case: Case) -> str:
    """A test id."""
    return "-".join(str(value) for value in case.values())


def _pairs(case: Case) -> set[tuple[Any, ...]]:
    return set(combinations(case.items(), 2))
