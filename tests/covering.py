"""Pairwise covering sets: few cases in which every legal pair of options occurs.

Used to generate parametrised tests; the full product stays available under the `matrix` mark.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations, islice, product
from typing import Any, overload

Case = dict[str, Any]
Pair = tuple[tuple[str, Any], ...]

CANDIDATES = 60
"""Cases that one round chooses from: more make the set a little smaller and its making slower."""


def all_cases(factors: Mapping[str, Sequence[Any]], legal: Callable[[Case], bool]) -> list[Case]:
    """Every legal combination."""
    cases = (dict(zip(factors, values, strict=True)) for values in product(*factors.values()))
    return [case for case in cases if legal(case)]


def with_drawn(
    factors: Mapping[str, Sequence[Any]], names: Sequence[str], legal: Callable[[Case], bool]
) -> Iterator[Case]:
    """Every combination of all factors but some, whose values are drawn for each so that it is legal."""
    draw = random.Random(0)
    fixed = {name: values for name, values in factors.items() if name not in names}
    for values in product(*fixed.values()):
        yield from _drawn(factors, legal, dict(zip(fixed, values, strict=True)), draw, 1)


def covering(factors: Mapping[str, Sequence[Any]], legal: Callable[[Case], bool]) -> Sequence[Case]:
    """Legal combinations that hold every pair of values which any legal combination holds.

    They are made when they are first looked at, which ranks that import a module of tests never do.
    """
    return _Cases(partial(_covered, factors, legal))


def every_value(cases: Sequence[Case], among: Callable[[Case], bool]) -> Sequence[Case]:
    """Few of some of the cases, in which each option has every value that it has in any of those."""
    return _Cases(lambda: _few([case for case in cases if among(case)]))


@dataclass(frozen=True)
class _Cases(Sequence[Case]):
    make: Callable[[], list[Case]]

    @cached_property
    def cases(self) -> list[Case]:
        return self.make()

    @overload
    def __getitem__(self, place: int) -> Case: ...
    @overload
    def __getitem__(self, place: slice) -> list[Case]: ...
    def __getitem__(self, place: int | slice) -> Case | list[Case]:
        return self.cases[place]

    def __len__(self) -> int:
        return len(self.cases)


def _covered(factors: Mapping[str, Sequence[Any]], legal: Callable[[Case], bool]) -> list[Case]:
    """Greedy: each round takes a pair that is still missing and, of some random legal cases around it, the
    one with most missing pairs; the whole product is scanned only around pairs that look illegal."""
    draw = random.Random(0)
    fixed = [dict(pair) for pair in _all_pairs(factors)]
    missing = {tuple(pair.items()) for pair in fixed if _drawn(factors, legal, pair, draw, 1)}
    chosen: list[Case] = []
    for pair in fixed:
        if tuple(pair.items()) in missing:
            candidates = _drawn(factors, legal, pair, draw, CANDIDATES)
            best = max(candidates, key=lambda case: len(_pairs(case) & missing))
            missing -= _pairs(best)
            chosen.append(best)
    return chosen


def _few(cases: Sequence[Case]) -> list[Case]:
    """Greedy: always the case that brings most missing values along."""
    missing = {value for case in cases for value in case.items()}
    chosen: list[Case] = []
    while missing:
        chosen.append(max(cases, key=lambda case: len(missing & case.items())))
        missing -= chosen[-1].items()
    return chosen


def _drawn(
    factors: Mapping[str, Sequence[Any]],
    legal: Callable[[Case], bool],
    fixed: Case,
    draw: random.Random,
    count: int,
) -> list[Case]:
    """Up to `count` legal cases that hold `fixed`; none only where there is none."""
    tries = (
        {name: fixed[name] if name in fixed else draw.choice(values) for name, values in factors.items()}
        for _ in range(10 * count + 40)
    )
    found = list(islice(filter(legal, tries), count))
    return found or _first({**factors, **{name: (value,) for name, value in fixed.items()}}, legal)


class _Noted(Mapping[str, Any]):
    """A case that notes what is read of it."""

    def __init__(self, case: Case, read: set[str]) -> None:
        self._case, self._read = case, read

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self._case[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._case)

    def __len__(self) -> int:
        return len(self._case)


def _first(factors: Mapping[str, Sequence[Any]], legal: Callable[[Case], bool]) -> list[Case]:
    """The first legal combination, or none; only what `legal` looks at is multiplied out."""
    read: set[str] = set()
    while True:
        known = frozenset(read)
        kept = [values if name in known else values[:1] for name, values in factors.items()]
        for values in product(*kept):
            case = dict(zip(factors, values, strict=True))
            if legal(_Noted(case, read)):  # type: ignore[arg-type]
                return [case]
        if read == known:
            return []


def label(case: Case) -> str:
    """A test id."""
    return "-".join(str(value) for value in case.values())


def _all_pairs(factors: Mapping[str, Sequence[Any]]) -> Iterator[Pair]:
    for one, other in combinations(factors, 2):
        for pair in product(factors[one], factors[other]):
            yield (one, pair[0]), (other, pair[1])


def _pairs(case: Case) -> set[Pair]:
    return set(combinations(case.items(), 2))
