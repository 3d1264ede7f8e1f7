"""What Sixfold aims at in `zero.py`, and whether a run's figures reach it.

Reads figures only; it neither measures nor hides: a target whose figures are missing is listed as not judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from competitors import COMPETITORS, LIMITS

ON_HOST = 1.05
OF_LIMIT = 0.95
ON_NETWORK = {2: 0.95, 3: 0.80}
OF_PEERS = ((3, 1.2, ""), (2, 1.1, "fairscale"), (2, 1.3, "deepspeed"))
"""(stage, times the speed of the best peer, family of those peers; all where empty)."""


def judge(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of the targets for the rows of one model and type."""
    measured = {row["competitor"]: row for row in rows if "reason" not in row}
    lines = ["| target | at least | measured | |", "|---|---|---|---|"]
    for what, bound, found in _targets(measured):
        verdict = "not judged" if found is None else "reached" if found >= bound else "MISSED"
        lines.append(f"| {what} | {bound:.2f} | {'' if found is None else f'{found:.3f}'} | {verdict} |")
    return "\n".join(lines)


def _targets(measured: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, float, float | None]]:
    """(what is compared, what it shall be, what it is)."""
    speeds = {name: row["speed"][0] for name, row in measured.items()}
    for stage in range(4):
        mine = speeds.get(f"sixfold-{stage}-host")
        yield f"stage {stage} on one host / DDP", ON_HOST, mine
        limit = max((speeds[name] for name in LIMITS if name in speeds), default=None)
        yield f"stage {stage} on one host / no communication (goal)", OF_LIMIT, _ratio(mine, limit)
    for stage, bound in ON_NETWORK.items():
        yield f"stage {stage} over gloo / DDP", bound, speeds.get(f"sixfold-{stage}")
    for name in _own(measured):
        stage = COMPETITORS[name].stage
        for peer_stage, bound, family in OF_PEERS:
            if stage == peer_stage:
                rivals = [speeds[peer] for peer in _peers(measured, stage, family)]
                best = max(rivals, default=None)
                yield (
                    f"{name} / best of {family or 'all'} at stage {stage}",
                    bound,
                    _ratio(speeds[name], best),
                )
        rivals = [measured[peer]["peak_mb"] for peer in _peers(measured, stage)]
        leanest = min(rivals, default=None)
        yield f"leanest peer's memory / {name}'s", 1.0, _ratio(leanest, measured[name]["peak_mb"])


def _own(measured: Mapping[str, Any]) -> list[str]:
    return [name for name in measured if name.startswith("sixfold") and name not in LIMITS]


def _peers(measured: Mapping[str, Any], stage: int | None, family: str = "") -> list[str]:
    """Those of the same stage that are not Sixfold; at stage 0 that is DDP."""
    return [
        name
        for name in measured
        if COMPETITORS[name].stage == stage
        and not name.startswith("sixfold")
        and COMPETITORS[name].family.startswith(family)
    ]


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below
