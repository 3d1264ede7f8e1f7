"""From the positions of all ranks to one verdict: who is behind a hang.

The watcher calls `judge` when an exchange was waited for too long or broke. It is a pure function of what
the ranks recorded; it asks nobody, prints nothing and ends nothing.

Note "How it is judged". Ranks that wait blame the members of their exchange that are not in it: those
that went another way, ended, or have not come. A blamed rank that waits elsewhere for somebody who is
himself blamed is only a link of the chain. Records that differ weigh more than a death, because a
backend may abort a process that receives what it does not expect; a death weighs more than lateness.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sixfold.base.ring import Exchange, Position, ranks_of
from sixfold.base.units import bytes_text, duration_text

Kind = Literal["skipped", "mismatched", "died", "left", "slow", "network"]
_WEIGHT: tuple[Kind, ...] = ("skipped", "mismatched", "died", "left", "slow")
LEFT = "has ended"
"""The last word of a rank that ended in peace, while others may still count on it."""
_FIX: dict[Kind, str] = {
    "skipped": "let every rank reach this line, or none: look for a condition on rank or data before it",
    "mismatched": "exchange tensors of one size and type on every rank",
    "died": "look into the log of that rank",
    "left": "let every rank make the same number of updates",
    "slow": "if the work at that line takes so long, raise the timeout of its phase, as launch.timeout_s",
    "network": "check the links between these ranks, or raise launch.timeout_s if they are slow",
}


SILENT_S = 4.0
"""A live process whose beat is older is stopped, or in native code that keeps the interpreter."""


@dataclass(frozen=True)
class Verdict:
    """Who is behind a hang.

    Args:
        kind: what was done: "network" when nobody did anything.
        guilty: the ranks, lowest first.
        headline: one line that names rank, deed and source lines.
        fix: a change that helps.
        lines: where every rank stands, one line each.
    """

    kind: Kind
    guilty: tuple[int, ...]
    headline: str
    fix: str
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([f"hang: {self.headline}", f"fix: {self.fix}", *self.lines])


def judge(positions: Mapping[int, Position | None]) -> Verdict | None:
    """Name the ranks behind a hang.

    Args:
        positions: by rank; None for one of which nothing could be learned.

    Returns:
        None when nobody waits for anything.
    """
    scene = _Scene(positions)
    if not scene.waits:
        return None
    deeds = _deeds(scene)
    kind: Kind = next((kind for kind in _WEIGHT if any(deed.kind == kind for deed in deeds)), "network")
    chosen = [deed for deed in deeds if deed.kind == kind]
    # Ranks that cannot be heard are blamed only where no other has died for certain.
    chosen = [deed for deed in chosen if positions.get(deed.rank) is not None] or chosen
    headline = _headline(scene, kind, chosen) if chosen else _all_wait(scene)
    return Verdict(
        kind=kind,
        guilty=tuple(deed.rank for deed in chosen),
        headline=headline,
        fix=_FIX[kind],
        lines=tuple(_line(rank, positions[rank]) for rank in sorted(positions)),
    )


def is_complete(positions: Mapping[int, Position | None], own: Position) -> bool:
    """Whether everyone has come to what `own` waits for, or has ended: then it shows who is alone."""
    blocked = own.blocked
    return blocked is not None and all(
        position is None or not _lives(position) or position.number_in(blocked.group) >= blocked.number
        for rank in ranks_of(blocked.group)
        for position in [positions.get(rank)]
    )


@dataclass(frozen=True)
class _Deed:
    """What one rank did to one exchange that others wait in: `instead` is what it has in its place."""

    kind: Kind
    rank: int
    exchange: Exchange
    instead: Exchange | None = None


_Way = tuple[str, str]


class _Scene:
    """All positions, and who waits in which exchange."""

    def __init__(self, positions: Mapping[int, Position | None]) -> None:
        self.positions = positions
        self.waits: dict[tuple[str, int], list[int]] = {}
        self._usual: dict[tuple[str, int], Exchange] = {}
        self._by_number: dict[tuple[str, int], list[Exchange]] = {}
        for rank, position in sorted(positions.items()):
            for each in position.exchanges if position is not None else ():
                self._by_number.setdefault((each.group, each.number), []).append(each)
            blocked = position.blocked if position is not None else None
            if blocked is not None:
                self.waits.setdefault((blocked.group, blocked.number), []).append(rank)

    def usual(self, group: str, number: int) -> Exchange:
        """What most ranks have under this number; of equally many, what came after the same one before."""
        if (group, number) not in self._usual:
            found = self._by_number[group, number]
            counts = Counter(each.content for each in found)
            most = max(counts.values())
            best = [each for each in found if counts[each.content] == most]
            if sum(count == most for count in counts.values()) > 1:
                before = {_way(each) for each in self._by_number.get((group, number - 1), ())}
                pairs = self._pairs(group, number)
                best.sort(key=lambda each: not any((way, _way(each)) in pairs for way in before))
            self._usual[group, number] = best[0]  # the lowest rank's, if nothing tells them apart
        return self._usual[group, number]

    def _pairs(self, group: str, number: int) -> set[tuple[_Way, _Way]]:
        """What followed what in a group before this number."""
        pairs: set[tuple[_Way, _Way]] = set()
        for position in self.positions.values():
            own = [each for each in position.exchanges if each.group == group] if position else []
            earlier = [_way(each) for each in own if each.number < number]
            pairs.update(itertools.pairwise(earlier))
        return pairs

    def is_blocked(self, rank: int) -> bool:
        position = self.positions.get(rank)
        return position is not None and _lives(position) and position.blocked is not None


def _deeds(scene: _Scene) -> list[_Deed]:
    """What was done by ranks that do not merely wait for another blamed one."""
    blamed = {wait: _blamed(scene, *wait) for wait in scene.waits}
    clear = [deed for deeds in blamed.values() for deed in deeds if not _only_waits(scene, deed)]
    if not clear and all(blamed.values()):
        # Ranks wait for each other in a circle: the fewest went the other way.
        most = max(blamed, key=lambda wait: len(scene.waits[wait]))
        clear = [
            _Deed("skipped", deed.rank, deed.exchange, _blocked_in(scene, deed.rank)) for deed in blamed[most]
        ]
    by_rank = {deed.rank: deed for deed in sorted(clear, key=lambda deed: -_WEIGHT.index(deed.kind))}
    return [by_rank[rank] for rank in sorted(by_rank)]


def _only_waits(scene: _Scene, deed: _Deed) -> bool:
    return deed.kind == "slow" and scene.is_blocked(deed.rank)


def _blocked_in(scene: _Scene, rank: int) -> Exchange | None:
    position = scene.positions[rank]
    return position.blocked if position is not None else None


def _blamed(scene: _Scene, group: str, number: int) -> list[_Deed]:
    """The members of a group that keep others waiting in one of its exchanges."""
    found = []
    for rank in ranks_of(group):
        position = scene.positions.get(rank)
        parting = _parting(scene, rank, group, number)
        if parting is not None:
            found.append(parting)
        elif position is None or (not _lives(position) and not _has_ended(position, group, number)):
            kind: Kind = "left" if position is not None and position.end == LEFT else "died"
            found.append(_Deed(kind, rank, scene.usual(group, number)))
        elif position.number_in(group) < number:
            found.append(_Deed("slow", rank, scene.usual(group, number)))
    return found


def _parting(scene: _Scene, rank: int, group: str, number: int) -> _Deed | None:
    """Where this rank's exchanges in a group first part from what most ranks have."""
    position = scene.positions.get(rank)
    for each in position.exchanges if position is not None else ():
        if each.group != group or each.number > number:
            continue
        usual = scene.usual(group, each.number)
        if each.content != usual.content:
            kind: Kind = "skipped" if _went_on(scene, rank, usual, each) else "mismatched"
            return _Deed(kind, rank, usual, each)
    return None


def _went_on(scene: _Scene, rank: int, usual: Exchange, own: Exchange) -> bool:
    """Whether a rank left out `usual` and went on to `own`, rather than doing `usual` in another way.

    It did if `own` is a line where the others come too, or calls something else, or stands further
    down in the same file.
    """
    if own.place == usual.place:
        return False
    others = {
        each.place
        for other, position in scene.positions.items()
        if position is not None and other != rank
        for each in position.exchanges
    }
    file, _, line = own.place.rpartition(":")
    usual_file, _, usual_line = usual.place.rpartition(":")
    is_below = file == usual_file and line.isdigit() and usual_line.isdigit() and int(line) > int(usual_line)
    return own.place in others or own.op != usual.op or is_below


def _way(each: Exchange) -> _Way:
    return each.content, each.place


def _lives(position: Position) -> bool:
    return position.is_alive and not position.end


def _has_ended(position: Position, group: str, number: int) -> bool:
    each = position.exchange(group, number)
    return each is not None and each.is_over


# Wording.


def _headline(scene: _Scene, kind: Kind, deeds: list[_Deed]) -> str:
    first = deeds[0]
    who = _ranks([deed.rank for deed in deeds])
    exchange = _exchange(first.exchange, with_type=kind == "mismatched" and _same_size(deeds))
    waiting = [
        rank
        for rank in scene.waits.get((first.exchange.group, first.exchange.number), [])
        if rank not in {deed.rank for deed in deeds}
    ]
    since = max((_wait_s(scene, rank) for rank in waiting), default=None)
    others = f"{_ranks(waiting)} waited in it for {duration_text(since)}" if since is not None else ""
    position = scene.positions.get(first.rank)
    if kind == "skipped":
        text = f"{who} skipped {exchange}"
    elif kind == "mismatched":
        assert first.instead is not None, "a mismatch is between two exchanges"
        own = _exchange(first.instead, with_type=_same_size(deeds))
        text = f"{who} called {own} where others called {exchange}"
    elif kind == "died":
        reason = f": {position.end}" if position is not None and position.end else ""
        text = f"{who} died before the end of {exchange}{reason}"
    elif kind == "left":
        text = f"{who} ended before {exchange}"
    else:
        text = f"{who} is slow and has not come to {exchange}"
        text = text.replace(" is slow and has", " are slow and have") if len(deeds) > 1 else text
    return "; ".join(part for part in (text, others, _whereabouts(first, position)) if part)


def _whereabouts(deed: _Deed, position: Position | None) -> str:
    if deed.kind == "skipped" and deed.instead is not None:
        return f"rank {deed.rank} went on to {_exchange(deed.instead)}"
    if deed.kind == "slow" and position is not None:
        if position.silent_s > SILENT_S:
            silence = duration_text(position.silent_s)
            return f"rank {deed.rank} has not stirred for {silence}, since {position.here}"
        return f"rank {deed.rank} is at {position.here}, phase {position.phase}"
    if deed.kind == "died" and position is not None and not position.end:
        return f"rank {deed.rank} was last at {position.here}"
    return ""


def _all_wait(scene: _Scene) -> str:
    innocent = {wait: ranks for wait, ranks in scene.waits.items() if not _blamed(scene, *wait)}
    (group, number), waiting = max(innocent.items(), key=lambda item: len(item[1]))
    since = max(_wait_s(scene, rank) for rank in waiting)
    return (
        f"{_ranks(waiting)} all wait in {_exchange(scene.usual(group, number))} for {duration_text(since)} "
        "and none is missing: the network or the backend does not deliver"
    )


def _same_size(deeds: list[_Deed]) -> bool:
    return any(deed.instead is not None and deed.instead.numel == deed.exchange.numel for deed in deeds)


def _exchange(each: Exchange, *, with_type: bool = False) -> str:
    size = f"{each.numel} x {each.dtype}" if with_type else bytes_text(each.num_bytes)
    return f"{each.op} #{each.number} ({size}, {each.place})"


def _wait_s(scene: _Scene, rank: int) -> float:
    blocked = _blocked_in(scene, rank)
    return (blocked.wait_s or 0.0) if blocked is not None else 0.0


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _line(rank: int, position: Position | None) -> str:
    if position is None:
        return f"rank {rank}: nothing is known of it"
    last = position.exchanges[-1] if position.exchanges else None
    blocked = position.blocked
    if position.end:
        told = position.end
    elif not position.is_alive:
        told = "gives no sign of life"
    elif blocked is not None:
        told = f"has waited in {_exchange(blocked)} for {duration_text(blocked.wait_s or 0.0)}"
    else:
        told = f"is at {position.here}"
    after = (
        f", last {_exchange(last)}"
        if last is not None and (last is not blocked or not _lives(position))
        else ""
    )
    return f"rank {rank}: {told}{after}, phase {position.phase}"
