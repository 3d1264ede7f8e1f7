"""What a rule between options is, and how one is put into a list of them.

Used by the modules of rules beside it, read by the resolver. It holds no rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Verdict = tuple[str, str] | None
"""(rule, fix), or None where the rule is kept."""

Check = Callable[..., Verdict]


@dataclass(frozen=True)
class Rule:
    """A check over the values of `paths`, in that order."""

    paths: tuple[str, ...]
    check: Check


def into(rules: list[Rule]) -> Callable[..., Callable[[Check], Check]]:
    """A decorator, called with the paths of a check, that adds it to `rules`."""

    def rule(*paths: str) -> Callable[[Check], Check]:
        def register(check: Check) -> Check:
            rules.append(Rule(paths, check))
            return check

        return register

    return rule


def divisor_below(number: int, bound: int) -> int:
    return next(candidate for candidate in range(min(bound, number), 0, -1) if number % candidate == 0)
