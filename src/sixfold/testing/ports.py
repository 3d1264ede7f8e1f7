"""A port for ranks that are told where to meet before anybody listens there.

For tests and benchmarks that start processes by themselves. It holds nothing: between the answer and its
use only somebody who asks for exactly this port could take it.
"""

from __future__ import annotations

import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST, _USUAL_END = 10_000, 32_768


def free_port() -> int:
    """A port that is free now, none of those that the system gives to whoever asks for any."""
    end = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else _USUAL_END
    draw = random.SystemRandom()  # a seeded one would draw the same port in every process
    while True:
        port = draw.randrange(min(_LOWEST, end - 1000), end)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
