"""A run as its folder tells it: settings with origins, records of updates, evaluations, facts, sample, times.

Read by the pages of the report. Plain data; a run that was killed in the middle is told as far as it went.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from sixfold.base.errors import DataError
from sixfold.config import Resolved, load
from sixfold.config.resolved import CONFIG
from sixfold.config.schema import flat
from sixfold.monitor.journal import FILE_NAME, read_records
from sixfold.monitor.recording import read_recording
from sixfold.simulate import Timeline, simulated_again

SPENT = ("compute_s", "exchange_s", "data_s", "host_s")
"""Where the time of an update went, by the names in its record."""


@dataclass(frozen=True)
class Story:
    """One run.

    Args:
        name: the folder's own.
        resolved: settings with the origin of every value.
        updates: one record for each update that was written down, in order.
        evaluations: (update, bits per byte of the held-out part).
        facts: layout and sizes, as the run wrote them at its start; empty where it did not.
        sample: the completion at its end.
        recorded: an update and what its first pipeline did when; None where the run has recorded none.
        loads: by update and router, the part of all choices that fell on each expert.
    """

    name: str
    folder: Path
    resolved: Resolved
    updates: tuple[dict[str, Any], ...]
    evaluations: tuple[tuple[int, float], ...]
    facts: dict[str, Any]
    sample: str | None
    recorded: tuple[int, Timeline] | None = None
    loads: tuple[tuple[int, dict[str, list[float]]], ...] = ()

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """(updates, values) of one field, where it has a value."""
        rows = [(one["step"], float(one[name])) for one in self.updates if one.get(name) is not None]
        return [step for step, _ in rows], [value for _, value in rows]

    def spent(self) -> dict[str, float]:
        """Parts of the time of all updates but the first, which is slow by nature; empty if not recorded."""
        rows = [one for one in self.updates[1:] if one.get("host_s") is not None]
        whole = sum(one["seconds"] for one in rows)
        return {name: sum(one[name] for one in rows) / whole for name in SPENT} if whole else {}

    def lanes(self) -> dict[str, Timeline]:
        """The recorded update as it was measured, and as the simulator plays it; empty if none was."""
        if self.recorded is None:
            return {}
        measured = self.recorded[1].aligned()
        return {"measured": measured, "simulated": simulated_again(measured)}

    def makespans(self) -> dict[str, float]:
        """Of both in seconds, and how far the measured one is off, as a part of the simulated."""
        found = {name: timeline.makespan for name, timeline in self.lanes().items()}
        return {**found, "off": found["measured"] / found["simulated"] - 1} if found else {}

    def summary(self) -> dict[str, Any]:
        """The figures that runs are compared by; None where there is none."""
        last = self.updates[-1] if self.updates else {}
        rates = self.column("tokens_per_s")[1]
        shares = self.column("mfu")[1]
        return {
            "updates": last.get("step", 0),
            "loss": last.get("loss"),
            "held-out bits per byte": self.evaluations[-1][1] if self.evaluations else None,
            "seconds of updates": sum(one["seconds"] for one in self.updates),
            "tokens": sum(one["tokens"] for one in self.updates),
            "tokens/s": median(rates) if rates else None,
            "utilisation": median(shares) if shares else None,
            "memory of rank 0, bytes": max(self.column("memory_bytes")[1], default=None),
            "trained parameters": self.facts.get("num_trained"),
            "ranks": self.resolved.config.launch.ranks,
        }


def read_story(folder: Path) -> Story:
    """The run in a folder.

    Raises:
        DataError: it holds none, one that has not made an update yet, or damaged times.
    """
    config, metrics = folder / CONFIG, folder / FILE_NAME
    if not config.is_file():
        raise DataError(
            f"{folder} holds no {CONFIG}",
            rule="a report is made of run folders",
            fix="name a folder that `sixfold train` made, for example runs/*",
        )
    records = read_records(metrics)
    updates = tuple(one for one in records if "loss" in one and "step" in one)
    if not updates:
        raise DataError(
            f"{metrics} holds no update",
            rule="a report is made of runs that have made at least one update",
            fix="wait for its first update, or leave it out",
        )
    return Story(
        name=folder.resolve().name,
        folder=folder,
        resolved=load(config).recall(config.read_text(), config),
        updates=updates,
        evaluations=tuple(
            (one["step"], float(one["held_out_bits_per_byte"]))
            for one in records
            if "held_out_bits_per_byte" in one
        ),
        facts=next((one["facts"] for one in reversed(records) if "facts" in one), {}),
        sample=next((one["sample"] for one in reversed(records) if "sample" in one), None),
        recorded=read_recording(folder),
        loads=tuple((one["step"], _numbers(one["expert_loads"])) for one in records if "expert_loads" in one),
    )


def _numbers(loads: dict[str, list[Any]]) -> dict[str, list[float]]:
    """With numbers that JSON lacks as what they are."""
    return {name: [float(part) for part in load] for name, load in loads.items()}


def differing(stories: Sequence[Story]) -> dict[str, list[object]]:
    """Settings that are not the same in all runs, each with its value in every run."""
    values = [flat(story.resolved.config) for story in stories]
    rows = {path: [each[path] for each in values] for path in values[0]}
    return {path: row for path, row in rows.items() if any(value != row[0] for value in row)}
