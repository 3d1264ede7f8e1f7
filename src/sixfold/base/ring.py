"""What a rank exchanged lately and where it stands, as one block of bytes.

Written by the mesh's dispatcher before and after every exchange, read by the hang watcher of any rank:
from a file mapped into memory, which outlives a process that dies, or as bytes sent by a store. Nothing
here waits, and nothing here knows tensors.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from zlib import crc32

Block = bytes | bytearray | mmap.mmap
UNEVEN = frozenset({"all-to-all"})
"""Exchanges in which members may send unequally much."""
SLOTS = 64
_SLOT_BYTES = 256
_TEXT_BYTES = _SLOT_BYTES - 24
_BOARD_AT, _CELLS = 1024, 64
_CELL_BYTES = 16  # two words: the number; which group, and what is exchanged
_WORD_BYTES = 8
_HEAD_BYTES = _BOARD_AT + _CELLS * _CELL_BYTES
_SIZE = _HEAD_BYTES + SLOTS * _SLOT_BYTES
_FACTS = struct.Struct("<Qd")  # process id, time of the last beat
_FACTS_AT, _FIELDS_AT = 0, {"phase": (16, 48), "here": (64, 320), "end": (384, 640)}
POSTED, WANTED, OVER = 0, 1, 2
"""Times in a slot: when it was posted, when somebody began to wait for it (0: nobody waits), when it was over
(0: it is not)."""
_REST = struct.Struct(f"=dd{_TEXT_BYTES}s")  # of a slot, behind POSTED
_WORD = struct.Struct("=Q")
_TIMES = struct.Struct("=ddd")


@dataclass(frozen=True)
class Topic:
    """What stays the same of an exchange that is made again and again; see `Exchange` for its fields."""

    op: str
    numel: int
    dtype: str
    num_bytes: int
    group: str

    @cached_property
    def text(self) -> bytes:
        """As a slot holds it, between number and place."""
        return f"|{self.op}|{self.numel}|{self.dtype}|{self.num_bytes}|{self.group}|".encode()

    @cached_property
    def group_key(self) -> int:
        """Which group it is, in 32 bits."""
        return crc32(self.group.encode())

    @cached_property
    def keys(self) -> int:
        """Which group it is and what all members have in common, as they announce it."""
        return self.group_key << 32 | crc32(content_text(self.op, self.numel, self.dtype).encode())


@dataclass(frozen=True)
class Exchange:
    """One exchange as a rank recorded it.

    Args:
        number: how many exchanges this rank had posted in this group, with this one.
        op: what was called.
        numel: elements of the tensor.
        dtype: their type.
        num_bytes: their size.
        group: its ranks, as `ranks_text` writes them, and ":lane" where a group has several.
        place: the source line.
        wait_s: how long the rank has been waiting for it; None when it does not.
        is_over: whether it has ended here.
    """

    number: int
    op: str
    numel: int
    dtype: str
    num_bytes: int
    group: str
    place: str
    wait_s: float | None = None
    is_over: bool = False

    @property
    def content(self) -> str:
        """What all members have in common."""
        return content_text(self.op, self.numel, self.dtype)


@dataclass(frozen=True)
class Position:
    """Where one rank stands.

    Args:
        phase: "start", "step", "save", ...
        here: the line its main thread is at.
        end: how it ended, in its own words; empty while it lives.
        exchanges: the latest, oldest first.
        pid: its process.
        beat: when it last gave a sign of life, in seconds since the epoch of its own clock.
        is_alive: whether its process lives, as far as can be known.
        silent_s: how long ago its last beat was.
    """

    phase: str
    here: str
    end: str = ""
    exchanges: tuple[Exchange, ...] = ()
    pid: int = 0
    beat: float = 0.0
    is_alive: bool = True
    silent_s: float = 0.0

    @property
    def blocked(self) -> Exchange | None:
        """The exchange that it waits for, the longest waited for of several."""
        waited = [each for each in self.exchanges if each.wait_s is not None]
        return max(waited, key=lambda each: each.wait_s or 0.0, default=None)

    def number_in(self, group: str) -> int:
        """The number of its latest exchange in a group, 0 before the first."""
        return max((each.number for each in self.exchanges if each.group == group), default=0)

    def exchange(self, group: str, number: int) -> Exchange | None:
        """An exchange by its number; None when it has not been posted, or was long ago."""
        found = [each for each in self.exchanges if (each.group, each.number) == (group, number)]
        return found[0] if found else None


class Ring:
    """The block of one rank: its latest exchanges and a few facts, written in place.

    Attributes:
        num_posted: exchanges recorded so far.
        times: the block as times. Who has posted an exchange marks it here himself, by storing a time at the
            place that `post` gave plus WANTED or OVER, as long as `num_posted` says that the slot is its own.
            That is done for every exchange, and twice.
    """

    def __init__(self) -> None:
        self.num_posted = 0
        self._use(bytearray(_SIZE))
        self.write("phase", "start")
        self.beat("")

    def share(self, path: str) -> None:
        """From now on live in a file that other processes read."""
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(handle, _SIZE)
            block = mmap.mmap(handle, _SIZE)
        finally:
            os.close(handle)
        block[:] = bytes(self._block)
        self._use(block)

    def _use(self, block: bytearray | mmap.mmap) -> None:
        # Both store an aligned word in one piece, so that others never read half of one.
        self._block, view = block, memoryview(block)
        self.times, self._words = view.cast("d"), view.cast("Q")

    def write(self, field: str, text: str) -> None:
        """Set "phase", "here" or "end"; what does not fit is cut off."""
        start, size = _FIELDS_AT[field]
        data = text.encode()[: size - 1]
        self._block[start : start + size] = data.ljust(size, b"\0")

    def beat(self, here: str) -> None:
        """Give a sign of life and say where the main thread is."""
        _FACTS.pack_into(self._block, _FACTS_AT, os.getpid(), time.time())
        self.write("here", here)

    def post(self, topic: Topic, number: int, place: str) -> int:
        """Record an exchange that begins, and that somebody waits for: a backend may block in starting it.
        It is put up for `differs` of other ranks, too.

        Args:
            number: how many were posted in its group, with this one.
            place: the source line; it stands last, because it may be cut off.

        Returns:
            Where its slot is in `times`.
        """
        times, words = self.times, self._words
        # A neighbour may read between any two stores, and these become visible in their order: without its
        # number a cell says nothing, so the old content is never read under the new number.
        cell = (_BOARD_AT + (topic.group_key + number) % _CELLS * _CELL_BYTES) // _WORD_BYTES
        words[cell] = 0
        words[cell + 1] = topic.keys
        words[cell] = number
        # Nor does a slot without the time at which it was posted.
        start = _HEAD_BYTES + self.num_posted % SLOTS * _SLOT_BYTES
        self.num_posted += 1
        at, now = start // _WORD_BYTES, time.time()
        times[at + POSTED] = 0.0
        text = b"%d%b%b" % (number, topic.text, place.encode())
        _REST.pack_into(self._block, start + _WORD_BYTES, now, 0.0, text)
        times[at + POSTED] = now
        return at

    def snapshot(self) -> bytes:
        """The whole block."""
        return bytes(self._block)

    def position(self) -> Position:
        """What others would read."""
        return read(self.snapshot())


def differs(block: Block, topic: Topic, number: int) -> bool:
    """Whether the rank behind `block` has announced something else under this number of the group."""
    at = _BOARD_AT + (topic.group_key + number) % _CELLS * _CELL_BYTES
    if _WORD.unpack_from(block, at)[0] != number:
        return False
    keys: int = _WORD.unpack_from(block, at + _WORD_BYTES)[0]
    # The number once more: the cell may have been given to a later exchange in between.
    is_of_group = keys >> 32 == topic.group_key and _WORD.unpack_from(block, at)[0] == number
    return bool(is_of_group and keys != topic.keys)


def content_text(op: str, numel: int, dtype: str) -> str:
    """What all members of an exchange have in common."""
    return f"{op} {dtype}" if op in UNEVEN else f"{op} {numel} {dtype}"


def read(live: Block) -> Position:
    """Read what a `Ring` has written; a slot that is just being written is left out."""
    block = bytes(live)
    pid, beat = _FACTS.unpack_from(block, _FACTS_AT)
    fields = {
        name: block[start : start + size].rstrip(b"\0").decode(errors="replace")
        for name, (start, size) in _FIELDS_AT.items()
    }
    found: list[tuple[float, Exchange]] = []
    for at in range(_HEAD_BYTES, _SIZE, _SLOT_BYTES):
        posted, wanted, over = _TIMES.unpack_from(block, at)
        text = block[at + _TIMES.size : at + _SLOT_BYTES].rstrip(b"\0").decode(errors="replace")
        parts = text.split("|", 6)
        if not posted or len(parts) != 7:
            continue
        number, op, numel, dtype, num_bytes, group, place = parts
        wait_s = max(0.0, beat - wanted) if wanted and not over else None
        found.append(
            (
                posted,
                Exchange(
                    int(number), op, int(numel), dtype, int(num_bytes), group, place, wait_s, bool(over)
                ),
            )
        )
    exchanges = tuple(each for _, each in sorted(found, key=lambda pair: pair[0]))
    return Position(fields["phase"], fields["here"], fields["end"], exchanges, pid, beat)


def opened(path: str) -> Block | None:
    """The block of another rank of this host, as it changes; None where there is none."""
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), _SIZE, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # not there, or not yet as long as it will be
        return None


def ranks_text(ranks: Sequence[int]) -> str:
    """`[0, 1, 2, 3]` -> "0-3", `[1, 3, 5]` -> "1-5/2", anything else "0,1,7"."""
    if len(ranks) > 2:
        stride = ranks[1] - ranks[0]
        if stride > 0 and list(ranks) == list(range(ranks[0], ranks[-1] + 1, stride)):
            return f"{ranks[0]}-{ranks[-1]}" + (f"/{stride}" if stride > 1 else "")
    return ",".join(map(str, ranks))


def ranks_of(text: str) -> list[int]:
    """What `ranks_text` was given; a lane after it does not count."""
    text = text.partition(":")[0]
    if "-" not in text:
        return [int(part) for part in text.split(",")]
    ends, _, stride = text.partition("/")
    first, last = ends.split("-")
    return list(range(int(first), int(last) + 1, int(stride or 1)))
