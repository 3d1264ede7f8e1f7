"""From what every rank sent to one readable failure: the causing rank first, then its victims.

Called by pool.py when a run did not pass everywhere. It judges and words; it never asks a rank anything.
"""

from __future__ import annotations

from collections.abc import Callable

from sixfold.base.errors import WorkerError
from sixfold.base.units import duration_text
from sixfold.testing import stacks
from sixfold.testing.wire import Outcome

_VICTIM_WORDS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "Timed out waiting",
    "while this rank waited for its part",
    "Application timeout caused pair closure",
)
_LOG_LINES = 30


class RankFailure(WorkerError):
    """A function did not pass on every rank; `details` holds each rank's traceback, the causing one first."""

    def __init__(self, given: str, *, rule: str, fix: str, details: str = "") -> None:
        super().__init__(given, rule=rule, fix=fix)
        self.details = details

    def __str__(self) -> str:
        return f"{super().__str__()}\n\n{self.details}".rstrip()

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.given, self.rule, self.fix, self.details))


def _rebuild(given: str, rule: str, fix: str, details: str) -> RankFailure:
    return RankFailure(given, rule=rule, fix=fix, details=details)


def failure(name: str, outcomes: list[Outcome], limit_s: float, log_of: Callable[[int], str]) -> RankFailure:
    """Word a run in which some rank failed, died or did not end.

    Args:
        name: the function, as people know it.
        outcomes: one per rank; a stuck rank's `trace` is its stack dump.
        limit_s: the time the run had.
        log_of: what a rank printed.
    """
    errors = sorted((o for o in outcomes if o.kind in ("failed", "died")), key=lambda o: o.ended_s)
    causes = [o for o in errors if not _is_victim(o)] or errors
    # A death is the cause of whatever its peers met, however late it was noticed.
    causes.sort(key=lambda o: o.kind != "died")
    if causes:
        return _after_error(name, causes[0], outcomes, limit_s, log_of)
    stuck = [o for o in outcomes if o.kind == "stuck"]
    if stuck:
        return _after_limit(name, stuck, outcomes, limit_s, log_of)
    return RankFailure(
        f"{name} ended differently on its ranks: "
        + "; ".join(f"rank {o.rank} {o.kind} {o.summary}".rstrip() for o in outcomes),
        rule="a function is skipped on all ranks or on none",
        fix="skip on a condition that is the same on every rank",
    )


def leak(name: str, found: list[Outcome]) -> RankFailure:
    """Word a run that passed but left something behind; ranks that left the same are named together."""
    ranks_by_leaks: dict[tuple[str, ...], list[int]] = {}
    for outcome in found:
        if outcome.closing is not None and outcome.closing.leaks:
            ranks_by_leaks.setdefault(outcome.closing.leaks, []).append(outcome.rank)
    words = "; ".join(
        f"{_ranks(ranks, len(found))}: {', '.join(leaks)}" for leaks, ranks in ranks_by_leaks.items()
    )
    return RankFailure(
        f"{name} left something behind on {words}",
        rule="a test leaves its ranks as they were, because the next test runs in the same processes",
        fix="undo it in the test: destroy_process_group(group), thread.join(), file.close(), monkeypatch",
    )


def _ranks(ranks: list[int], num_ranks: int) -> str:
    if len(ranks) == num_ranks:
        return "every rank"
    return f"rank {', '.join(map(str, ranks))}"


def _after_error(
    name: str, cause: Outcome, outcomes: list[Outcome], limit_s: float, log_of: Callable[[int], str]
) -> RankFailure:
    parts = [_section(cause, "the cause", log_of)]
    for outcome in outcomes:
        if outcome is not cause:
            parts.append(_section(outcome, _role(outcome), log_of))
    verb = "died with" if cause.kind == "died" else "failed:"
    return RankFailure(
        f"rank {cause.rank} of {len(outcomes)} {verb} {cause.summary} in {name}",
        rule=f"a function run on ranks returns on every rank within {duration_text(limit_s)}",
        fix=f"start from rank {cause.rank}'s {'output' if cause.kind == 'died' else 'traceback'} below; "
        "what the other ranks met follows from it unless marked otherwise",
        details="\n\n".join(parts),
    )


def _after_limit(
    name: str, stuck: list[Outcome], outcomes: list[Outcome], limit_s: float, log_of: Callable[[int], str]
) -> RankFailure:
    places = {o.rank: stacks.where(o.trace) for o in stuck}
    waiting = [o.rank for o in stuck if places[o.rank].waits]
    missing = [o.rank for o in outcomes if o.rank not in waiting]
    calls = {places[rank].waits for rank in waiting}
    words = [
        f"rank {o.rank} {places.get(o.rank, f'{o.kind} without it')}"
        for o in sorted(outcomes, key=lambda o: o.rank in waiting)
    ]
    if waiting and missing:
        late = ", ".join(str(rank) for rank in missing)
        fix = f"make rank {late} issue {' and '.join(sorted(calls))} as well, or no rank"
    elif len(calls) > 1:
        fix = "issue the same collectives in the same order on every rank: " + ", ".join(
            f"rank {rank} is in {places[rank].waits}" for rank in waiting
        )
    elif waiting:
        fix = "all wait, none is missing: compare groups and the order of collectives before these lines"
    else:
        fix = f"raise the limit, timeout_s={2 * limit_s:g}, if the work at these lines takes that long"
    return RankFailure(
        f"{name} did not end within {duration_text(limit_s)}: {'; '.join(words)}",
        rule="every rank issues the same collectives, and the function ends in time",
        fix=fix,
        details="\n\n".join(_section(o, _role(o), log_of) for o in outcomes if o.kind == "stuck"),
    )


def _is_victim(outcome: Outcome) -> bool:
    return outcome.kind == "failed" and any(word in outcome.trace for word in _VICTIM_WORDS)


def _role(outcome: Outcome) -> str:
    if outcome.kind == "stuck":
        return f"ended by the pool; it {stacks.where(outcome.trace)}"
    if _is_victim(outcome):
        return f"a victim: {outcome.summary}"
    return "also an error of its own" if outcome.kind in ("failed", "died") else outcome.kind


def _section(outcome: Outcome, role: str, log_of: Callable[[int], str]) -> str:
    lines = [f"--- rank {outcome.rank}: {role}"]
    if outcome.kind == "stuck":
        lines.append(stacks.text(outcome.trace))
    elif not role.startswith("a victim"):
        lines.append(outcome.trace.rstrip())
    log = log_of(outcome.rank).strip().splitlines()
    if log:
        lines.append(f"  printed by rank {outcome.rank} (the last {min(len(log), _LOG_LINES)} lines):")
        lines.extend(f"    {line}" for line in log[-_LOG_LINES:])
    return "\n".join(line for line in lines if line)
