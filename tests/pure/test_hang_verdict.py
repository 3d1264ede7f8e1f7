"""Who is behind a hang, judged from what the ranks recorded; and the record itself."""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sixfold.base import ring
from sixfold.base.places import place_of
from sixfold.base.ring import Exchange, Position, Ring, Topic, ranks_of, ranks_text
from sixfold.monitor.verdict import LEFT, Verdict, is_complete, judge

ALL = "0-3"
REDUCE, TOTAL = ("all-reduce", 1000, "train.py:10"), ("all-reduce", 1, "train.py:20")
SHARE = ("broadcast", 1000, "train.py:15")


def at(
    *calls: tuple[str, int, str],
    waits: float | None = None,
    group: str = ALL,
    here: str = "train.py:99",
    phase: str = "step",
    dtype: str = "torch.float32",
    end: str = "",
    is_alive: bool = True,
    silent_s: float = 0.0,
) -> Position:
    """A rank that made these calls; it `waits` for the last one, or is through with all."""
    last = len(calls) - 1
    exchanges = tuple(
        Exchange(
            index + 1,
            op,
            numel,
            dtype,
            4 * numel,
            group,
            place,
            wait_s=waits if index == last else None,
            is_over=index < last or waits is None,
        )
        for index, (op, numel, place) in enumerate(calls)
    )
    return Position(phase, here, end, exchanges, is_alive=is_alive, silent_s=silent_s)


def judged(*positions: Position | None) -> Verdict:
    verdict = judge(dict(enumerate(positions)))
    assert verdict is not None
    assert len(verdict.lines) == len(positions)
    assert verdict.fix in str(verdict)
    return verdict


WAITS = at(REDUCE, REDUCE, waits=12.0)

CASES: dict[str, tuple[list[Position | None], str, tuple[int, ...], str]] = {
    "rank 2 skips one and goes on to another line": (
        [WAITS, WAITS, at(REDUCE, TOTAL, waits=11.0), WAITS],
        "skipped",
        (2,),
        "rank 2 skipped all-reduce #2 (3.9 KiB, train.py:10); ranks 0, 1, 3 waited in it for 12s; "
        "rank 2 went on to all-reduce #2 (4 B, train.py:20)",
    ),
    "rank 1 calls another shape": (
        [WAITS, at(REDUCE, ("all-reduce", 7, "train.py:10"), waits=1.0), WAITS, WAITS],
        "mismatched",
        (1,),
        "rank 1 called all-reduce #2 (28 B, train.py:10) where others called all-reduce #2 (3.9 KiB, "
        "train.py:10); ranks 0, 2, 3 waited in it for 12s",
    ),
    "rank 1 calls another operation at the same line": (
        [WAITS, at(REDUCE, ("broadcast", 1000, "train.py:10"), waits=1.0), WAITS, WAITS],
        "mismatched",
        (1,),
        "rank 1 called broadcast #2 (1000 x torch.float32, train.py:10)",
    ),
    "another type": (
        [at(REDUCE, waits=1.0), at(REDUCE, waits=1.0, dtype="torch.int32"), at(REDUCE, waits=1.0), None],
        "mismatched",
        (1,),
        "rank 1 called all-reduce #1 (1000 x torch.int32, train.py:10) where others called all-reduce #1 "
        "(1000 x torch.float32, train.py:10)",
    ),
    "another shape in a branch of its own, above": (
        [WAITS, at(REDUCE, ("all-reduce", 7, "train.py:8"), waits=1.0), WAITS, WAITS],
        "mismatched",
        (1,),
        "rank 1 called all-reduce #2 (28 B, train.py:8)",
    ),
    "rank 3 raises": (
        [WAITS, WAITS, WAITS, at(REDUCE, end="ended with ValueError: boom, at train.py:9")],
        "died",
        (3,),
        "rank 3 died before the end of all-reduce #2 (3.9 KiB, train.py:10): ended with ValueError: boom, "
        "at train.py:9; ranks 0, 1, 2 waited in it for 12s",
    ),
    "rank 3 is killed in the middle of it": (
        [WAITS, WAITS, WAITS, at(REDUCE, REDUCE, waits=1.0, is_alive=False)],
        "died",
        (3,),
        "rank 3 died before the end of all-reduce #2 (3.9 KiB, train.py:10); ranks 0, 1, 2 waited in it for "
        "12s; rank 3 was last at train.py:99",
    ),
    "rank 0 sleeps": (
        [at(REDUCE, here="train.py:7"), WAITS, WAITS, WAITS],
        "slow",
        (0,),
        "rank 0 is slow and has not come to all-reduce #2 (3.9 KiB, train.py:10); ranks 1, 2, 3 waited in it "
        "for 12s; rank 0 is at train.py:7, phase step",
    ),
    "a rank in another phase": (
        [at(REDUCE, here="engine.py:5", phase="save"), WAITS, WAITS, WAITS],
        "slow",
        (0,),
        "rank 0 is at engine.py:5, phase save",
    ),
    "a stopped process": (
        [at(REDUCE, silent_s=30.0), WAITS, WAITS, WAITS],
        "slow",
        (0,),
        "rank 0 has not stirred for 30s, since train.py:99",
    ),
    "two are slow": (
        [at(REDUCE, here="train.py:7"), WAITS, at(REDUCE), WAITS],
        "slow",
        (0, 2),
        "ranks 0, 2 are slow and have not come to all-reduce #2",
    ),
    "two skip": (
        [WAITS, at(REDUCE, TOTAL, waits=1.0), at(REDUCE, TOTAL, waits=1.0), WAITS, WAITS],
        "skipped",
        (1, 2),
        "ranks 1, 2 skipped all-reduce #2",
    ),
    "one ends in peace": (
        [WAITS, at(REDUCE, end=LEFT), WAITS, WAITS],
        "left",
        (1,),
        "rank 1 ended before all-reduce #2 (3.9 KiB, train.py:10)",
    ),
    "one ended after all had come": (
        [WAITS, at(REDUCE, REDUCE, end=LEFT), WAITS, WAITS],
        "network",
        (),
        "ranks 0, 2, 3 all wait in all-reduce #2",
    ),
    "nobody is missing": (
        [WAITS] * 4,
        "network",
        (),
        "ranks 0, 1, 2, 3 all wait in all-reduce #2 (3.9 KiB, train.py:10) for 12s and none is missing",
    ),
    "nothing is known of one": ([WAITS, None, WAITS, WAITS], "died", (1,), "rank 1 died before the end"),
    "the unheard are not blamed beside the dead": (
        [WAITS, None, at(REDUCE, is_alive=False), WAITS],
        "died",
        (2,),
        "rank 2 died before the end",
    ),
    "a backend aborts the innocent": (
        [
            at(REDUCE, REDUCE, waits=1.0, is_alive=False),
            at(REDUCE, ("all-reduce", 2000, "train.py:10"), waits=1.0),
            WAITS,
            WAITS,
        ],
        "mismatched",
        (1,),
        "rank 1 called all-reduce #2 (7.8 KiB, train.py:10)",
    ),
    "the paths parted earlier than the hang": (
        [
            at(REDUCE, SHARE, TOTAL, waits=9.0),
            at(REDUCE, SHARE, TOTAL, waits=9.0),
            at(REDUCE, TOTAL, ("broadcast", 1, "train.py:30"), waits=9.0),
            at(REDUCE, SHARE, TOTAL, waits=9.0),
        ],
        "skipped",
        (2,),
        "rank 2 skipped broadcast #2 (3.9 KiB, train.py:15)",
    ),
    "of two ranks the one that left the usual way": (
        [
            at(REDUCE, TOTAL, REDUCE, REDUCE, waits=1.0, group="0-1"),
            at(REDUCE, TOTAL, REDUCE, TOTAL, waits=1.0, group="0-1"),
        ],
        "skipped",
        (0,),
        "rank 0 skipped all-reduce #4 (4 B, train.py:20)",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_verdicts(name: str) -> None:
    positions, kind, guilty, headline = CASES[name]
    verdict = judged(*positions)
    assert (verdict.kind, verdict.guilty) == (kind, guilty)
    assert headline in verdict.headline
    assert "\n" not in verdict.headline


def test_a_chain_leads_to_its_end() -> None:
    """Rank 0 waits for 1 and 2; they wait in another group for 3, which is busy."""
    inner = Exchange(1, "all-gather", 8, "torch.float32", 32, "1-3", "train.py:5", wait_s=30.0)
    position = Position("step", "train.py:5", exchanges=(inner,))
    verdict = judged(at(REDUCE, waits=20.0), position, position, Position("step", "train.py:3"))
    assert (verdict.kind, verdict.guilty) == ("slow", (3,))
    assert verdict.headline.startswith("rank 3 is slow and has not come to all-gather #1 (32 B, train.py:5)")


def test_a_circle_is_broken_where_the_fewest_went() -> None:
    """Rank 2 went past the world's exchange into one of its pair, where rank 3 will not come."""
    inner = Exchange(1, "all-gather", 8, "torch.float32", 32, "2,3", "train.py:12", wait_s=30.0)
    verdict = judged(
        at(REDUCE, waits=20.0),
        at(REDUCE, waits=20.0),
        Position("step", "train.py:12", exchanges=(inner,)),
        at(REDUCE, waits=20.0),
    )
    assert (verdict.kind, verdict.guilty) == ("skipped", (2,))
    assert "rank 2 went on to all-gather #1 (32 B, train.py:12)" in verdict.headline


def test_a_link_at_the_end_of_a_chain() -> None:
    inner = Exchange(1, "all-gather", 8, "torch.float32", 32, "2,3", "train.py:12", wait_s=30.0)
    pair = Position("step", "train.py:12", exchanges=(inner,))
    verdict = judged(at(REDUCE, waits=2.0), at(REDUCE, waits=2.0), pair, pair)
    assert (verdict.kind, verdict.guilty) == ("network", ())
    assert verdict.headline.startswith("ranks 2, 3 all wait in all-gather #1")


def test_a_thousand_ranks_are_judged_in_a_moment() -> None:
    everybody = "0-1023"
    calls = [REDUCE, TOTAL] * 32
    waiting = at(*calls, waits=12.0, group=everybody)
    positions: dict[int, Position | None] = dict.fromkeys(range(1024), waiting)
    positions[700] = at(*calls[:-2], TOTAL, waits=11.0, group=everybody)
    positions[3] = at(*calls[:-1], group=everybody)
    began = time.process_time()
    verdict = judge(positions)
    assert time.process_time() - began < 5.0
    assert verdict is not None
    assert (verdict.kind, verdict.guilty) == ("skipped", (700,))


def test_without_anybody_waiting_there_is_no_verdict() -> None:
    assert judge({0: at(REDUCE), 1: at(REDUCE), 2: None}) is None


def test_a_verdict_on_what_broke_waits_for_those_who_will_come() -> None:
    late = at(REDUCE)
    assert not is_complete({0: WAITS, 1: WAITS, 2: late, 3: WAITS}, WAITS)
    assert is_complete({0: WAITS, 1: WAITS, 2: at(REDUCE, is_alive=False), 3: WAITS}, WAITS)
    assert not is_complete({0: late}, late)


# The record.


SUM = Topic("all-reduce", 8, "torch.float32", 32, ALL)


def filled(num: int) -> tuple[Ring, list[int]]:
    made = Ring()
    return made, [made.post(SUM, number, "train.py:3") for number in range(1, num + 1)]


def test_a_ring_keeps_the_latest_exchanges_and_how_far_they_are() -> None:
    made, at = filled(ring.SLOTS + 5)
    assert made.position().blocked is not None  # a backend may block where an exchange begins
    for each in at:
        made.times[each + ring.WANTED] = 0.0
    made.times[at[-2] + ring.OVER] = time.time()
    made.times[at[-1] + ring.WANTED] = time.time()
    made.write("phase", "save")
    made.beat("train.py:4")
    found = made.position()
    last = ring.SLOTS + 4
    assert [each.number for each in found.exchanges] == list(range(6, ring.SLOTS + 6))
    assert [each.number for each in found.exchanges if each.is_over] == [last]
    assert found.blocked is not None
    assert found.blocked.number == last + 1
    assert (found.phase, found.here, found.number_in(ALL)) == ("save", "train.py:4", last + 1)
    made.times[at[-1] + ring.OVER] = time.time()
    assert made.position().blocked is None


def test_a_ring_is_read_from_its_file_while_it_changes(tmp_path: Path) -> None:
    (made, _), path = filled(2), str(tmp_path / "ring")
    assert ring.opened(path) is None
    made.share(path)
    block = ring.opened(path)
    assert block is not None
    made.write("end", "x" * 5000)
    made.post(Topic("broadcast", 1, "torch.int64", 8, ALL), 3, "p" * 500 + ".py:7")
    found = ring.read(block)
    assert [each.number for each in found.exchanges] == [1, 2, 3]
    assert set(found.end) == {"x"}
    assert found.exchanges[-1].op == "broadcast"


def test_announcements_differ_only_under_the_same_number_of_the_same_group() -> None:
    made = Ring()
    made.post(SUM, 3, "train.py:3")
    block = made.snapshot()
    other, elsewhere = replace(SUM, numel=9), replace(SUM, group="0,1")
    assert ring.differs(block, other, 3)
    assert not ring.differs(block, SUM, 3)
    assert not ring.differs(block, other, 3 + ring._CELLS)  # the same cell
    same_cell = next(n for n in range(64) if (elsewhere.group_key + n - SUM.group_key - 3) % ring._CELLS == 0)
    assert not ring.differs(block, elsewhere, same_cell)


@pytest.mark.parametrize("ranks", [[0, 1, 2, 3], [1, 3, 5], [0, 4], [7], [0, 1, 5], [2, 3, 4, 6]])
def test_groups_have_short_names(ranks: list[int]) -> None:
    assert ranks_of(ranks_text(ranks)) == ranks_of(ranks_text(ranks) + ":sums") == ranks
    assert len(ranks_text(list(range(0, 4096, 4)))) < 12


def test_a_place_is_the_users_line_before_any_other() -> None:
    import inspect

    frame = inspect.currentframe()
    assert frame is not None
    assert place_of(frame).rpartition(":")[0].endswith("test_hang_verdict.py")
    assert place_of(None) == "no Python line"


def test_an_announcement_that_is_being_written_says_nothing_wrong(tmp_path: Path) -> None:
    # The same cell again and again, with another content each time, read by another process meanwhile.
    made = ring.Ring()
    made.share(str(tmp_path / "ring"))
    stop = mmap.mmap(-1, 1)
    writer = os.fork()
    if writer == 0:
        number = 0
        while not stop[0]:
            number += ring._CELLS
            made.post(replace(SUM, numel=number), number, "train.py:3")
        os._exit(0)
    try:
        block = ring.opened(str(tmp_path / "ring"))
        assert block is not None
        began, wrong, seen = time.monotonic(), [], set()
        # For some time, and on a busy machine until the writer has had its turns.
        while (passed := time.monotonic() - began) < 0.3 or (len(seen) <= 10 and passed < 20):
            (number,) = ring._WORD.unpack_from(
                block, ring._BOARD_AT + SUM.group_key % ring._CELLS * ring._CELL_BYTES
            )
            seen.add(number)
            for each in (number, number + ring._CELLS):
                if each and ring.differs(block, replace(SUM, numel=each), each):
                    wrong.append(each)
    finally:
        stop[0] = 1
        os.waitpid(writer, 0)
    assert len(seen) > 10
    assert not wrong
