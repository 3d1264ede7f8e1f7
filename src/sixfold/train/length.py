"""How many updates fill a given time: guessed from a rehearsal, corrected by the updates themselves.

The loop asks for it where `train.minutes` is in force. Plain arithmetic on given times: it reads no clock and
exchanges nothing, so ranks that give it the same times come to the same length.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST_LOOK = 4
"""Updates before the first correction: one by itself says little, and the first is slow by nature."""
LOOKS = 16
"""Corrections in a run that goes evenly, besides those of its beginning: the last update ends about a
sixteenth of the time from where it should, however wrong the guess was, and whoever else computes."""


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
        self._due = self.start + FIRST_LOOK

    def guess(self, pace_s: float) -> int:
        """Updates in the whole run, one at least, if each takes `pace_s`."""
        return self.start + max(1, round(self.seconds / pace_s))

    def is_due(self, step: int) -> bool:
        """Whether the length is to be corrected after update `step`: early and often, then evenly."""
        return step >= self._due

    def correct(self, step: int, *, spent_s: float, pace_s: float) -> int:
        """Updates in the whole run, if each after `step` takes `pace_s`; one more at least.

        Args:
            spent_s: what the updates since `start` took.
        """
        length = step + max(1, round((self.seconds - spent_s) / pace_s))
        self._due = step + min(step - self.start, max(1, (length - self.start) // LOOKS))
        return length
