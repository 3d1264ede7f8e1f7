"""Random streams: every draw is keyed by what it is for, never by what was drawn before.

Initial weights are keyed by (seed, module name); dropout by (seed, step, replica, micro-batch, number of the
forward in it, stage), where a replica is a place along data and context.
Used by `parallel` and `pipeline`. The process's own random state is left as it was found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


def key_of(*parts: object) -> int:
    """A 63-bit seed from any printable parts, the same on every machine and in every version."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class Streams:
    """The streams of one run on one device.

    Args:
        seed: root of every stream.
        device: where random numbers are drawn besides the CPU.
    """

    seed: int
    device: torch.device

    @contextmanager
    def keyed(self, *parts: object) -> Iterator[None]:
        """Draw from the stream of (seed, *parts) inside the block; restore the state after it."""
        devices = [self.device] if self.device.type != "cpu" else []
        # fork_rng wants the name of an accelerator even where none of its devices is forked.
        kind = self.device.type if devices else "cuda"
        with torch.random.fork_rng(devices=devices, device_type=kind):
            # torch.manual_seed also queues the seed, with a stack trace, for devices not in use.
            seed = torch.default_generator.manual_seed if self.device.type == "cpu" else torch.manual_seed
            seed(key_of(self.seed, *parts))
            yield
