"""Pairwise covering sets: few cases in which every legal pair of options occurs.

Used to generate parametrised tests; the full product stays available under the `matrix` mark.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Case = dict[str, Any]


def all_cases(factors: Mapping[str, Sequence[Any]], legal: Callable[[Case], bool]) -> list[Case]:
    """Every legal combination."""
    cases = (dict(zip(factors, values, strict=True)) for values in product(*factors.values()))
    return [case for case in cases if legal(case)]


def covering(factors: Mapping[str, Sequence[Any]], legal: Callable[[Case], bool]) -> list[Case]:
    """Legal combinations that hold every pair of values which any legal combination holds; greedy."""
    candidates = all_cases(factors, legal)
    random.Random(0).shuffle(candidates)
    pairs_of = [_pairs(case) for case in candidates]
    missing = set().union(*pairs_of)
    chosen: list[Case] = []
    while missing:
        best = max(range(len(candidates)), key=lambda index: len(pairs_of[index] & missing))
        missing -= pairs_of[best]
        chosen.append(candidates[best])
    return chosen


def label(case: Case) -> str:
    """A test id."""
    return "-".join(str(value) for value in case.values())


def _pairs(case: Case) -> set[tuple[Any, ...]]:
    return set(combinations(case.items(), 2))
