"""What is known about a rank that failed, which failure caused the others, and how it is told.

A rank writes its `Failure` as a file when an exception ends it; the supervisor writes one for a rank
that died without a word, picks the causal one and prints it. Nothing here starts or ends a process,
and no tensor library is imported: faults of a broken connection are recognised by their text.
"""

from __future__ import annotations

import json
import linecache
import re
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

from sixfold.base.errors import EXIT_USAGE, EXIT_WORKER, SixfoldError
from sixfold.base.places import is_library

# What the transports say when the *other* end died, hung or never came.
_BROKEN_LINK = re.compile(
    r"gloo.*(closed by peer|reset by peer|broken pipe|timed out waiting|pair closure|connectFullMesh failed)"
    r"|ncclRemoteError|remote process exited|communicator was aborted|watchdog caught collective"
    r"|connection was likely closed|failed to recv, got 0 bytes|recvVector failed|sendBytes failed"
    r"|Received data size doesn't match expected size"
    r"|while this rank waited for its part of exchange|offers .* where this rank has"
    r"|wait timeout after \d+ms|waiting for clients",
    re.IGNORECASE | re.DOTALL,
)

HANG = "hang"
"""The `kind` of a failure that was judged from what all ranks did."""

_NUMBERED = re.compile(r"\s*\d+\. ")


@dataclass(frozen=True)
class Failure:
    """The end of one rank.

    Args:
        rank: which rank.
        step: the last step it had announced; None before the first.
        time: seconds since the epoch.
        kind: name of the exception's class, or "" when there was no exception.
        message: what the exception said, or how the process ended.
        where: `file:line, in function` of the user's line; "" when unknown, or when none led to an error that
            has a rule and a remedy.
        source: the text of that line.
        details: the traceback, or the end of the log where there is none.
        rule: the rule of a SixfoldError; else "".
        fix: the remedy of a SixfoldError; else "".
        exit_code: what the launcher should return if this is the cause.
        victim: whether it only says that the connection to another rank broke.
    """

    rank: int
    step: int | None
    time: float
    kind: str
    message: str
    where: str
    source: str
    details: str
    rule: str
    fix: str
    exit_code: int
    victim: bool

    @property
    def problems(self) -> list[str]:
        """Where an error for users lists several problems, the first two; the traceback has them all."""
        listed = self.message.splitlines()[1:] if self.rule else []
        numbered = [line for line in listed if _NUMBERED.match(line)]
        return [line.strip()[:500] for line in (numbered or listed) if line.strip()][:2]

    @property
    def headline(self) -> str:
        """Exception and the first line of its message, in one line."""
        first = self.message.strip().partition("\n")[0][: 1000 if self.kind == HANG else 500]
        return ": ".join(part for part in (self.kind, first) if part)

    def write(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        draft.replace(path)

    @classmethod
    def read(cls, path: Path) -> Failure:
        """Read what `write` has written."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def from_exception(error: BaseException, *, rank: int, step: int | None) -> Failure:
    """Describe an exception that reached the top of a rank."""
    trace = _without_launcher(error.__traceback__)
    where, source = _users_line(error, trace)
    lines = traceback.TracebackException(type(error), error, trace).format()
    told = error if isinstance(error, SixfoldError) else None
    return Failure(
        rank=rank,
        step=step,
        time=time.time(),
        kind=_kind(error),
        message=told.given if told else str(error),
        where=where,
        source=source,
        details="".join(lines),
        rule=told.rule if told else "",
        fix=told.fix if told else "",
        exit_code=told.exit_code if told else _plain_exit_code(error),
        victim=is_victim(error),
    )


def from_exit(code: int, *, rank: int, step: int | None, when: float, log_tail: str) -> Failure:
    """Describe a rank that ended without leaving an exception.

    Args:
        code: exit code; minus the signal's number when a signal ended it.
        rank: which rank.
        step: the last step it had announced.
        when: seconds since the epoch at which its end was seen.
        log_tail: the last lines of its log.
    """
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        message = f"rank {rank} was killed by {name}{hint}"
    else:
        message = f"rank {rank} exited with code {code} and left no exception"
    return Failure(
        rank=rank,
        step=step,
        time=when,
        kind="",
        message=message,
        where="",
        source="",
        details=f"The end of its log:\n{log_tail}" if log_tail else "Its log is empty.",
        rule="",
        fix="",
        exit_code=EXIT_WORKER,
        # An abort by a transport's own watchdog leaves its reason only in the log.
        victim=code == -signal.SIGABRT and bool(_BROKEN_LINK.search(log_tail)),
    )


def from_early_end(*, rank: int, step: int | None, when: float, log_tail: str) -> Failure:
    """Describe a rank that ended with code 0 while others still counted on it; arguments as `from_exit`."""
    after = "before its first update" if step is None else f"after update {step}"
    return replace(
        from_exit(0, rank=rank, step=step, when=when, log_tail=log_tail),
        message=f"rank {rank} ended {after} while others went on",
        fix="let every rank make the same number of updates; this one left with exit code 0",
    )


def from_hang(verdict: str, *, fix: str, positions: Sequence[str], rank: int, step: int | None) -> Failure:
    """Describe a hang.

    Args:
        verdict: one line that names who is behind it.
        fix: a change that helps.
        positions: a line about each rank.
        rank: who is behind it, the first of several.
        step: the last step that was announced where it was found out.
    """
    return Failure(
        rank=rank,
        step=step,
        time=time.time(),
        kind=HANG,
        message=verdict,
        where="",
        source="",
        details="\n".join(positions) + "\n",
        rule="every rank issues the same exchanges in the same order, in time",
        fix=fix,
        exit_code=EXIT_WORKER,
        victim=False,
    )


def told_elsewhere(*, rank: int, step: int | None) -> Failure:
    """Describe a rank that was ended because another has told a hang; arguments as `from_hang`."""
    text = "the verdict is told where the rank runs that found it out"
    hang = from_hang(text, fix="look at the output of the other machines", positions=(), rank=rank, step=step)
    return replace(hang, victim=True)


def is_victim(error: BaseException) -> bool:
    """Whether an exception, or one it grew out of, only says that the connection to another rank broke."""
    return any(isinstance(e, RuntimeError) and _BROKEN_LINK.search(str(e)) for e in _chain(error))


def causal(failures: Sequence[Failure]) -> Failure:
    """The failure to tell: the earliest that is no victim, else the earliest.

    A hang was judged from what all ranks did: it explains the deaths that it made.
    """
    told = [failure for failure in failures if failure.kind]
    known = told if any(failure.kind == HANG for failure in told) else failures
    return min(known, key=lambda failure: (failure.victim, failure.time))


def render(
    cause: Failure, *, world_size: int, others: Sequence[Failure] = (), log: Path | None = None
) -> str:
    """The message: within five lines rank, step, exception, problems and the user's line; then the rest.

    Of an error for users that no line of theirs led to, the rest is in the log alone.
    """
    at = "before its first step" if cause.step is None else f"at step {cause.step}"
    if cause.kind == HANG:
        lines = [f"sixfold: {cause.headline}"]
    else:
        lines = [f"sixfold: rank {cause.rank} of {world_size} failed {at}", cause.headline]
    lines += [f"    {problem}" for problem in cause.problems]
    if cause.where:
        lines += [f"at {cause.where}", f"    {cause.source}"]
    lines += [f"{label}: {text}" for label, text in (("rule", cause.rule), ("fix", cause.fix)) if text]
    for other in sorted(others, key=lambda failure: failure.rank):
        lines.append(
            f"also rank {other.rank}{' (a consequence)' if other.victim else ''}: {other.headline[:200]}"
        )
    if log is not None:
        lines.append(f"log: {log}")
        if cause.rule and not cause.where and cause.kind != HANG:
            return "\n".join([*lines, ""])
    return "\n".join([*lines, "", cause.details.rstrip(), ""])


def _plain_exit_code(error: BaseException) -> int:
    # Argument parsers end a script with code 2: that stays a usage error.
    is_usage = isinstance(error, SystemExit) and error.code == EXIT_USAGE
    return EXIT_USAGE if is_usage else EXIT_WORKER


def _kind(error: BaseException) -> str:
    kind = type(error)
    plain = kind.__module__ in ("builtins", "__main__") or isinstance(error, SixfoldError)
    return kind.__qualname__ if plain else f"{kind.__module__}.{kind.__qualname__}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _without_launcher(trace: TracebackType | None) -> TracebackType | None:
    """Drop the leading frames that only started the user's code."""
    start = trace
    while start is not None:
        file = start.tb_frame.f_code.co_filename
        if not file.startswith("<frozen") and Path(file).parent != Path(__file__).parent:
            return start
        start = start.tb_next
    return trace


def _users_line(error: BaseException, trace: TracebackType | None) -> tuple[str, str]:
    """Place and text of the deepest frame outside libraries, else of the deepest; none else of an error that
    says itself what to change."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}", (error.text or "").strip()
    frames = list(traceback.walk_tb(trace))
    if not frames:
        return "", ""
    theirs = [(frame, line) for frame, line in frames if not is_library(frame.f_code.co_filename)]
    if isinstance(error, SixfoldError) and not theirs:
        return "", ""
    frame, line = (theirs or frames)[-1]
    code = frame.f_code
    text = linecache.getline(code.co_filename, line, frame.f_globals).strip()
    return f"{code.co_filename}:{line}, in {code.co_name}", text
