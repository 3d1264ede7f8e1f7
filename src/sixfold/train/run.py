"""A run under way on one rank: what the loop and its callbacks share.

Made by the loop, read by callbacks. It holds the parts of a run and trains nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sixfold.config import Resolved
from sixfold.data.corpus import Corpus
from sixfold.data.stream import Blend
from sixfold.engine import Engine
from sixfold.monitor.console import Console
from sixfold.monitor.journal import Journal
from sixfold.monitor.sinks import Sinks
from sixfold.plan import BatchPlan
from sixfold.train.folder import write_config
from sixfold.train.subject import fields_of


@dataclass
class Run:
    """A run under way on this rank; what callbacks see.

    Args:
        resolved: what was asked, and what was decided since.
        folder: the run folder.
        total_steps: updates in the whole run.
        journal: where metrics are written; the first rank's alone.
        sinks: where they go besides; the first rank's alone.
    """

    resolved: Resolved
    engine: Engine
    corpus: Corpus
    stream: Blend
    batch: BatchPlan
    folder: Path
    console: Console
    total_steps: int = 0
    journal: Journal | None = None
    sinks: Sinks | None = None

    def __post_init__(self) -> None:
        self._asked = self.resolved
        self._kept: Resolved | None = None

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and talks."""
        return self.engine.mesh.rank == 0

    def end_after(self, steps: int, why: str | None = None) -> None:
        """Make `steps` the number of updates in the whole run: for its end, its schedule and what is shown.

        Args:
            why: the reason where it was decided, and not asked for; it may be decided anew.
        """
        if why is not None:
            self.resolved = self._asked.decide({"train.steps": steps}, why)
        self.total_steps = self.console.total_steps = steps
        self.engine.learning_rate = self.engine.learning_rate.ending_at(steps)

    def keep_config(self) -> None:
        """Write the configuration into the run folder, unless this process has written the same there.

        Raises:
            SaveError: it cannot be written.
        """
        if self.resolved is not self._kept:
            write_config(self.folder, self.resolved)
            self._kept = self.resolved

    def record(self, values: Mapping[str, Any]) -> None:
        """Write one record of JSON values down, once over all ranks."""
        if self.journal is not None:
            self.journal.write(values)
        if self.sinks is not None:
            self.sinks.write(values)

    def say(self, message: str) -> None:
        """Tell the user, once over all ranks."""
        if self.is_first:
            self.console.say(message)

    def next_batch(self) -> dict[str, Any]:
        """This rank's part of the global batch that comes next."""
        part = self.batch.share(self.engine.data_rank)
        samples = self.stream.batch(self.engine.num_samples, part)
        return fields_of(self.resolved.config, self.corpus, samples)
