"""Counters in shared memory by which ranks of a host tell each other how far they are, and waiting for them.

Used by `HostGroup`. A counter has one writer and only grows. Waiting yields the core some times, then sleeps
on a futex, and ends with an error when the other process has ended or the time is up. No rank ever spins
on a core that another one needs.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import select
import time
import weakref
from collections.abc import Callable

from sixfold.base.errors import LinkError
from sixfold.base.units import duration_text

# Why plain stores are enough. An aligned 8-byte store is one instruction, and x86-64 makes the stores of a
# core visible in their order (libraries end streaming stores with a fence of their own) and never moves a
# load before an older load: who sees a counter grown sees the numbers that were written before it. Other
# processors need a barrier between numbers and counter on both sides (the system call membarrier, say), so
# `Host` refuses them.
_FUTEX, _WAIT, _WAKE = 202, 0, 1  # system call and operations, Linux x86-64
_EVERYBODY = 2**31 - 1
_NUM_YIELDS = 100
_LOOK_UP_S = 0.05
"""How long a sleeper sleeps before it looks whether the other process lives."""

OFFERED, DONE = 0, 8
"""Words of the counters, on cache lines of their own: exchanges that a member has offered, and that it has
finished reading."""
_FIRST_OFFER, _OFFER_WORDS = 16, 4
NUM_OFFERS = 2032
"""Exchanges that may be under way in one group."""
ROW_BYTES = 8 * (_FIRST_OFFER + _OFFER_WORDS * NUM_OFFERS)


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


@functools.cache
def _system_call() -> Callable[..., int]:
    call: Callable[..., int] = ctypes.CDLL(None, use_errno=True).syscall
    return call


class Row:
    """One member's counters and offers in one group, seen by itself or by another member.

    Args:
        memory: the map of that member's memory.
        address: where this process has mapped it.
        offset: where the row begins in it.

    Attributes:
        words: the counters, by their places, and the offers; read as they are, because waiting reads often.
    """

    def __init__(self, memory: mmap.mmap, address: int, offset: int) -> None:
        self.words = memoryview(memory)[offset : offset + ROW_BYTES].cast("Q")
        self._address = address + offset

    def raise_to(self, counter: int, value: int) -> None:
        """Set a counter of this rank's own row, and wake who waits for it."""
        self.words[counter] = value
        # Always called: who is about to sleep cannot be known without a barrier, and this call is one.
        self._futex(counter, _WAKE, _EVERYBODY, None)

    def sleep(self, counter: int, value: int, limit_s: float) -> None:
        """Return when the counter is no longer `value`, or the limit is over."""
        limit = _Time(int(limit_s), int(limit_s % 1 * 1e9))
        self._futex(counter, _WAIT, value & 0xFFFFFFFF, ctypes.byref(limit))

    def write_offer(self, number: int, *words: int) -> None:
        """Say where the others find what exchange `number` is about; before OFFERED grows."""
        start = _FIRST_OFFER + number % NUM_OFFERS * _OFFER_WORDS
        for place, word in enumerate(words):
            self.words[start + place] = word

    def read_offer(self, number: int) -> tuple[int, ...]:
        """What `write_offer` has written; after OFFERED has grown beyond `number`."""
        start = _FIRST_OFFER + number % NUM_OFFERS * _OFFER_WORDS
        return tuple(self.words[start : start + _OFFER_WORDS])

    def _futex(self, counter: int, operation: int, value: int, limit: object) -> None:
        address = ctypes.c_void_p(self._address + 8 * counter)
        _system_call()(_FUTEX, address, operation, value, limit, None, 0)


class Process:
    """Another rank's process, to be asked whether it lives; its number may be given away again, this is not.

    Args:
        rank: what it is in the world.
        pid: its process.
    """

    def __init__(self, rank: int, pid: int) -> None:
        self.rank = rank
        handle = os.pidfd_open(pid)
        weakref.finalize(self, os.close, handle)
        self._ended = select.poll()
        self._ended.register(handle, select.POLLIN)

    def has_ended(self) -> bool:
        """Whether it has, cleaned up after or not."""
        return bool(self._ended.poll(0))


def wait_beyond(row: Row, counter: int, number: int, owner: Process, limit_s: float) -> None:
    """Return when a counter is larger than `number`.

    Args:
        owner: who raises it.
        limit_s: how long to wait.

    Raises:
        LinkError: it has ended without raising it, or has not raised it in time.
    """
    for _ in range(_NUM_YIELDS):
        if row.words[counter] > number:
            return
        os.sched_yield()
    began = time.monotonic()
    while (seen := row.words[counter]) <= number:
        row.sleep(counter, seen, _LOOK_UP_S)
        # What it did before its end counts, so its end is looked at first.
        has_ended, waited = owner.has_ended(), time.monotonic() - began
        if row.words[counter] > number:
            return
        if has_ended or waited > limit_s:
            raise _absence(owner.rank, number, waited if not has_ended else None)


def _absence(rank: int, number: int, waited_s: float | None) -> LinkError:
    how = "ended" if waited_s is None else f"did not come within {duration_text(waited_s)}"
    return LinkError(
        f"rank {rank} {how} while this rank waited for its part of exchange {number}",
        rule="every rank takes part in every exchange, in the same order",
        fix=f"see why rank {rank} "
        + ("ended" if waited_s is None else "was elsewhere; launch.timeout_s is how long others wait for it"),
    )
