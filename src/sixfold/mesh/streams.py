"""Random streams: every draw is keyed by what it is for, never by what was drawn before.

Initial weights are keyed by (seed, module name); dropout by (seed, step, replica, micro-batch, number of the
forward in it, stage), where a replica is a place along data and context; and where ranks of the tensor axis
have parts of what is dropped, by their place along it as well.
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
            _seed(self.device, key_of(self.seed, *parts))
            yield


class Branch:
    """A stream beside the one that ranks have in common, for work that each does on a part.

    Its key is drawn from the common one, so a forward that runs again, from the state that it began with,
    draws the same; and what is drawn from the branch, more on one rank than on another, leaves no trace.

    Args:
        place: of this rank among them.
        device: where random numbers are drawn besides the CPU.
    """

    def __init__(self, place: int, device: torch.device) -> None:
        self._place, self._device = place, device
        self._common: list[torch.Tensor] = []
        self._key = 0

    # A graph that is compiled ends at these: it would not see them.

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(self) -> None:
        """From now on draw from the branch; nothing where that is so already."""
        if self._is_entered:
            return
        self._key = key_of(int(torch.empty((), dtype=torch.int64).random_()), self._place)
        self._common = [torch.default_generator.get_state()]
        if self._device.type != "cpu":
            self._common.append(torch.get_device_module(self._device).get_rng_state(self._device))
        _seed(self._device, self._key)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def leave(self) -> None:
        """Go on with the common stream; nothing where it was not left."""
        if not self._is_entered:
            return
        torch.default_generator.set_state(self._common[0])
        if self._device.type != "cpu":
            torch.get_device_module(self._device).set_rng_state(self._common[1], self._device)

    @property
    def _is_entered(self) -> bool:
        # Asked of the generator: what runs again may end in the middle, and states are put back behind it.
        return bool(self._common) and torch.default_generator.initial_seed() == self._key


def _seed(device: torch.device, key: int) -> None:
    # torch.manual_seed also queues the seed, with a stack trace, for devices not in use.
    seed = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed
    seed(key)
