"""How many updates fill a given time: guessed from a rehearsal, corrected by the updates themselves.

The loop asks for it where `train.minutes` is in force. Plain arithmetic on given times: it reads no clock and
exchanges nothing, so ranks that give it the same times come to the same length.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST_LOOK = 4
"""Updates before the first correction, where there are that many: one by itself says little, and the first
is slow by nature."""
LOOKS = 16
"""Corrections in a run that goes evenly, besides those of its beginning: the last update ends about a
sixteenth of the time from where it should, however wrong the guess was, and whoever else computes."""
TELLING = 0.1
"""Part by which the length of a run changes for it to be told; metrics.jsonl has every change."""


@dataclass
class TimeBudget:
    """A time for updates.

    Args:
        seconds: for all updates of this process, without evaluations and saves.
        start: updates that were made before.
    """

    seconds: float
    start: int = 0

    def __post_init__(self) -> None:
        self._due = self._length = self._told = self.start

    def guess(self, pace_s: float) -> int:
        """Updates in the whole run, one at least, if each takes `pace_s`."""
        updates = max(1, round(self.seconds / pace_s))
        self._length = self._told = self.start + updates
        self._due = self.start + min(FIRST_LOOK, max(1, updates - 1))
        return self._length

    def is_due(self, step: int) -> bool:
        """Whether the length is to be corrected after update `step`: early and often, then evenly, and at
        the last one, since a run is not to end while there is time."""
        return step >= self._due

    def correct(self, step: int, *, spent_s: float, pace_s: float) -> int:
        """Updates in the whole run, if each after `step` takes `pace_s`; at least one more, or it has ended.

        Args:
            spent_s: what the updates since `start` took.
        """
        fewest = 0 if step == self._length else 1  # a schedule reaches its end in the last update
        self._length = length = step + max(fewest, round((self.seconds - spent_s) / pace_s))
        self._due = min(step + min(step - self.start, max(1, (length - self.start) // LOOKS)), length)
        return length

    def outdated(self, length: int) -> int | None:
        """The length that was told last, where `length` is far from it; that is the one told from now on."""
        told = self._told
        if abs(length - told) <= TELLING * told:
            return None
        self._told = length
        return told
