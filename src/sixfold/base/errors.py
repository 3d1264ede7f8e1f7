"""One tree of errors, each made of three sentences: what was given, the rule, a change that works.

Every room raises from this tree for whatever a user can cause; internal invariants raise
AssertionError with text. The command line maps `exit_code` to the process's exit code.
This module never prints and never exits.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_USAGE = 2
EXIT_INFEASIBLE = 3
EXIT_WORKER = 4
EXIT_INTERRUPTED = 130


class SixfoldError(Exception):
    """Root of all errors meant for users.

    Args:
        given: what happened, with the values that were met.
        rule: the rule that was broken.
        fix: a concrete change that works.
    """

    exit_code = EXIT_WORKER

    def __init__(self, given: str, *, rule: str, fix: str) -> None:
        self.given, self.rule, self.fix = given, rule, fix
        super().__init__(given)

    def __str__(self) -> str:
        return f"{self.given}\n  rule: {self.rule}\n  fix:  {self.fix}"

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments need help to survive pickling between ranks.
        return (_rebuild, (type(self), self.given, self.rule, self.fix))


def _rebuild(kind: type[SixfoldError], given: str, rule: str, fix: str) -> SixfoldError:
    return kind(given, rule=rule, fix=fix)


class ConfigError(SixfoldError):
    """What the user asked for is not a legal configuration."""

    exit_code = EXIT_USAGE


class DataError(SixfoldError):
    """A corpus, tokenizer or shard is missing or damaged."""

    exit_code = EXIT_USAGE


class PlanError(SixfoldError):
    """A legal configuration that cannot be carried out on these devices."""

    exit_code = EXIT_INFEASIBLE


class MeshError(SixfoldError):
    """Ranks disagree, or a process group cannot be formed."""


class LinkError(MeshError, RuntimeError):
    """Another rank has ended, did not come or did something else: it only says that the link to it broke."""


class ModelError(SixfoldError):
    """A module cannot be trained the way it was handed over."""


class StateError(SixfoldError):
    """Model state was used outside the rules of the state engine."""


class ProgramError(SixfoldError):
    """A step program is malformed or was played out of order."""


class CheckpointError(SixfoldError):
    """A checkpoint is missing, damaged, or belongs to another model."""

    exit_code = EXIT_USAGE


class SaveError(CheckpointError):
    """A checkpoint could not be written: no fault of what was asked, so the run fails in the middle."""

    exit_code = EXIT_WORKER


class WorkerError(SixfoldError):
    """A process that does a part of the work failed or was ended: a rank, or one that tokenizes."""
