"""What a rule between options is, and how rules are collected.

Used by the modules that hold rules. A rule is a function over the values of the paths it names; it returns
the broken rule and a change that works, or None. Nothing is checked here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Verdict = tuple[str, str] | None
"""(rule, fix), or None where the rule is kept."""


@dataclass(frozen=True)
class Rule:
    """A check over the values of `paths`, in that order."""

    paths: tuple[str, ...]
    check: Callable[..., Verdict]


class Rules(list[Rule]):
    """Rules in the order in which they are told."""

    def rule(self, *paths: str) -> Callable[[Callable[..., Verdict]], Callable[..., Verdict]]:
        """Collect the function below as a rule over `paths`."""

        def register(check: Callable[..., Verdict]) -> Callable[..., Verdict]:
            self.append(Rule(paths, check))
            return check

        return register


def divisor_below(number: int, bound: int) -> int:
    """The largest divisor of `number` up to `bound`: what a fix offers in place of another one."""
    return next(candidate for candidate in range(min(bound, number), 0, -1) if number % candidate == 0)
