"""How much memory this process may still take: of the machine, and of every control group around it.

Asked before shared memory is reserved. The kernel does not refuse what is too much, it ends a process, so
the arithmetic has to come first. It changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> tuple[int, str] | None:
    """Bytes that can be taken, and the limit that says so, in words; pages of files count as free. None where
    the system does not say."""
    available = _field(proc / "meminfo", "MemAvailable:") * 1024
    return min([(available, "of the machine"), *_headrooms(proc, groups)]) if available else None


def total_bytes(proc: Path = Path("/proc")) -> int:
    """Memory of the machine."""
    return _field(proc / "meminfo", "MemTotal:") * 1024


def _headrooms(proc: Path, groups: Path) -> Iterator[tuple[int, str]]:
    for line in _lines(proc / "self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, names = (groups, _V2) if not controllers else (groups / "memory", _V1)
        place = Path(path.lstrip("/"))
        # A container may see its own group as the root, whatever the path says; so what exists counts.
        for each in (root / place, *(root / parent for parent in place.parents)):
            if all((each / name).exists() for name in names[:2]):
                yield from _headroom(each, *names)


def _headroom(group: Path, limit: str, used: str, reclaimable: str) -> Iterator[tuple[int, str]]:
    text = (group / limit).read_text().strip()
    if text != "max":
        held = int((group / used).read_text()) - _field(group / "memory.stat", reclaimable)
        yield max(0, int(text) - held), f"under {group / limit} = {int(text) / 1e6:.0f} MB"


def _field(path: Path, name: str) -> int:
    return next((int(line.split()[1]) for line in _lines(path) if line.startswith(name)), 0)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
