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
from functools import partial

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

OFFERED, DONE = 0, 8
"""Words of the counters, on cache lines of their own: exchanges that a member has offered, and that it has
finished reading."""
NUM_OFFERS = 2032
"""Exchanges that may be under way in one group."""
FIRST_OFFER, OFFER_WORDS = 16, 4
"""Where offers begin, that of exchange n at the place n % NUM_OFFERS: its kind, where in the memory of who
offers, and how many bytes."""
ROW_BYTES = 8 * (FIRST_OFFER + OFFER_WORDS * NUM_OFFERS)


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


@functools.cache
def _system_call() -> Callable[..., int]:
    call: Callable[..., int] = ctypes.CDLL(None, use_errno=True).syscall
    return call


_LOOK_UP = _Time(0, 50_000_000)
"""How long a sleeper sleeps before it looks whether the other process lives."""


class Row:
    """One member's counters and offers in one group, seen by itself or by another member.

    Args:
        memory: the map of that member's memory.
        address: where this process has mapped it.
        offset: where the row begins in it.

    Attributes:
        words: the counters, by their places, and the offers; read as they are, because waiting reads often. A
            rank writes its own row alone, the offer of an exchange before OFFERED grows, and others read
            that offer after it has grown.
        places: where the counters are in the memory of this process, for calls of the system.
        wake: by counter, the call that wakes who waits for it.
    """

    def __init__(self, memory: mmap.mmap, address: int, offset: int) -> None:
        self.words = memoryview(memory)[offset : offset + ROW_BYTES].cast("Q")
        self.places = {
            counter: ctypes.c_void_p(address + offset + 8 * counter) for counter in (OFFERED, DONE)
        }
        # To be called whenever a counter was raised: who is about to sleep cannot be known without a barrier,
        # and this call is one.
        self.wake = {
            counter: partial(_system_call(), _FUTEX, place, _WAKE, _EVERYBODY, None, None, 0)
            for counter, place in self.places.items()
        }


class Process:
    """Another rank's process, to be asked whether it lives; its number may be given away again, this is not.

    Args:
        rank: what it is in the world.
        pid: its process.

    Attributes:
        ended: polls whether it has ended, cleaned up after or not.
    """

    def __init__(self, rank: int, pid: int) -> None:
        self.rank = rank
        handle = os.pidfd_open(pid)
        weakref.finalize(self, os.close, handle)
        self.ended = select.poll()
        self.ended.register(handle, select.POLLIN)


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
        place, low_half = row.places[counter], seen & 0xFFFFFFFF
        _system_call()(_FUTEX, place, _WAIT, low_half, ctypes.byref(_LOOK_UP), None, 0)
        # What it did before its end counts, so its end is looked at first.
        has_ended, waited = owner.ended.poll(0), time.monotonic() - began
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
