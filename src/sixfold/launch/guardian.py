"""Ends every process a launch has left behind; also runs alone, as the guardian of a launcher.

The supervisor calls `sweep` when a launch is over. Because a launcher can be killed before it gets
there, it first starts this file as a small process of its own, which does the same as soon as the
launcher is gone. A process belongs to a launch when it carries the launch's marker in the environment
it was started with, or sits in the session of one of its ranks: so loader workers, helpers that
detached themselves and ranks that hang inside native code are all found. It never touches a process
of another launch or another user, and imports the standard library only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Collection


def sweep(marker: str, sessions: Collection[int], patience_s: float = 5.0) -> list[int]:
    """SIGKILL every process of a launch and wait until they are gone.

    Args:
        marker: a `NAME=value` that only processes of this launch have in their environment.
        sessions: session ids of the ranks.
        patience_s: seconds to wait; a process inside an uninterruptible system call outlasts it.

    Returns:
        Process ids still there.
    """
    if not os.path.isdir("/proc/self"):
        _kill_groups(sessions)
        return []
    deadline = time.monotonic() + patience_s
    while left := members(marker, sessions):
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return left
        time.sleep(0.02)
    return []


def members(marker: str, sessions: Collection[int]) -> list[int]:
    """Process ids that belong to a launch, from /proc; the caller and the already dead are left out."""
    needle, found = marker.encode(), []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        # Processes vanish while they are looked at, and those of other users cannot be read.
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{name}").st_uid != os.getuid():
                continue
            with open(f"/proc/{name}/stat", "rb") as stat:
                state, _, _, session = stat.read().rpartition(b")")[2].split()[:4]
            if state in (b"Z", b"X"):
                continue
            with open(f"/proc/{name}/environ", "rb") as environ:
                if int(session) in sessions or needle in environ.read().split(b"\0"):
                    found.append(int(name))
    return found


def _kill_groups(sessions: Collection[int]) -> None:
    # Without /proc only what stayed in a rank's own group can be found.
    for session in sessions:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(session, signal.SIGKILL)


def main(marker: str, scratch: str) -> None:
    """Collect the ranks' session ids from standard input; at its end, sweep unless the last word is "done".

    The end of standard input is the launcher's death, whatever its cause, or its orderly goodbye.
    """
    words = sys.stdin.read().split()
    if words[-1:] != ["done"]:
        sweep(marker, {int(word) for word in words})
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
