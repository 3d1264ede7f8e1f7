"""From the times of updates to rates: seconds per update, tokens per second, utilisation, time left.

The training loop brackets each update with `start` and `stop`, so evaluation and saving do not count
as training time. Plain arithmetic on given numbers: no tensors, no files, no printing.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

MEMORY_SHARE = 0.01
"""Part of the time that reading the memory may take."""


@dataclass(frozen=True)
class StepRecord:
    """What is known after one update; None where it does not apply.

    Args:
        step: the update just finished, counted from 1.
        loss: mean loss of the global batch, nats per target.
        lr: learning rate the update used.
        grad_norm: norm of the whole gradient before clipping.
        tokens: targets in this update, over all ranks.
        samples: samples consumed since the start of the run, over all ranks.
        seconds: duration of this update, its data included; below, where it went on this rank.
        data_s: getting the batch.
        compute_s: playing instructions: forward, backward, optimizer.
        exchange_s: standing still for other ranks: communication that nothing hides.
        host_s: the rest: what the library does around instructions.
        tokens_per_s: over all ranks, the median of the last updates.
        mfu: matrix-product operations per second as a fraction of what the ranks can do.
        memory_bytes: memory of this rank.
        eta_s: seconds of updates still to come.
        loss_scale: the factor on the loss in backward under fp16.
        skipped: whether this update changed nothing because gradients overflowed.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float | None
    tokens: int
    samples: int
    seconds: float
    tokens_per_s: float
    mfu: float | None
    memory_bytes: int | None
    eta_s: float
    loss_scale: float | None = None
    skipped: bool = False
    data_s: float | None = None
    compute_s: float | None = None
    exchange_s: float | None = None
    host_s: float | None = None

    def as_dict(self) -> dict[str, int | float | None]:
        return asdict(self)


class Meter:
    """Turns updates into records with smoothed rates.

    Args:
        total_steps: updates in the whole run; may be set later.
        flops_per_token: operations per target, forward and backward; None when unknown.
        peak_flops: operations per second that all ranks together can do; None when unknown.
        window: how many of the last updates a rate is the median of. A median, because the first
            update is slow by nature and single ones are slow by accident.
        memory: reads the memory of this rank in bytes. Called after an update, so seldom that it takes
            at most a hundredth of the time: for a large process the system's answer is slow.
        clock: seconds from any origin.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        window: int = 20,
        memory: Callable[[], int] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.total_steps = total_steps
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self._memory = memory
        self._memory_bytes: int | None = None
        self._memory_due = -math.inf
        self._clock = clock
        self._started: float | None = None
        self.spent_s = 0.0
        """What all updates took that were started here."""
        self._seconds: deque[float] = deque(maxlen=window)
        self._rates: deque[float] = deque(maxlen=window)

    @property
    def pace_s(self) -> float:
        """Seconds an update, the median of the last ones."""
        return median(self._seconds)

    def left_s(self, step: int) -> float:
        """Seconds of the updates after `step`, at the pace of the last ones."""
        return self.pace_s * max(self.total_steps - step, 0)

    def start(self) -> None:
        """An update begins now."""
        self._started = self._clock()

    def stop(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        grad_norm: float | None,
        tokens: int,
        samples: int,
        loss_scale: float | None = None,
        skipped: bool = False,
        data_s: float | None = None,
        compute_s: float | None = None,
        exchange_s: float | None = None,
    ) -> StepRecord:
        """The update has ended now. Arguments are fields of `StepRecord`; what is left of the time is
        `host_s`, where any part of it is known.

        Raises:
            RuntimeError: when no update was started.
        """
        if self._started is None:
            raise RuntimeError(f"stop({step}) without a start() before it")
        # A clock may stand still between two readings; a rate must not divide by that zero.
        seconds = max(self._clock() - self._started, 1e-9)
        self._started = None
        self.spent_s += seconds
        self._seconds.append(seconds)
        self._rates.append(tokens / seconds)
        tokens_per_s = median(self._rates)
        spent = [each for each in (data_s, compute_s, exchange_s) if each is not None]
        return StepRecord(
            step=step,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens=tokens,
            samples=samples,
            seconds=seconds,
            tokens_per_s=tokens_per_s,
            mfu=self._utilisation(tokens_per_s),
            memory_bytes=self._read_memory(),
            eta_s=self.left_s(step),
            loss_scale=loss_scale,
            skipped=skipped,
            data_s=data_s,
            compute_s=compute_s,
            exchange_s=exchange_s,
            host_s=max(0.0, seconds - sum(spent)) if spent else None,
        )

    def _utilisation(self, tokens_per_s: float) -> float | None:
        if self.flops_per_token is None or self.peak_flops is None:
            return None
        return self.flops_per_token * tokens_per_s / self.peak_flops

    def _read_memory(self) -> int | None:
        begun = self._clock()
        if self._memory is not None and begun >= self._memory_due:
            self._memory_bytes = self._memory()
            ended = self._clock()
            self._memory_due = ended + (ended - begun) / MEMORY_SHARE
        return self._memory_bytes
