"""What the benchmarks share: the model and its batches, ranks in processes of their own, and statistics.

Imported by the commands beside it and never by the package. The parent needs no torch: whatever imports it
does so where it is called, in the ranks.
"""

from __future__ import annotations

import json
import math
import os
import re
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

LR = 3e-4
AGREEING_STEPS = 20
AGREEMENT = {"fp32": 1e-5, "bf16": 2e-3}
"""Largest relative difference of two contestants' losses over the first `AGREEING_STEPS` updates."""
SAMPLING_S = 0.005

SIZES: dict[str, dict[str, int]] = {
    "s": {"vocab_size": 4096, "width": 384, "num_layers": 5, "num_heads": 6, "length": 128, "batch": 4},
    "m": {"vocab_size": 16384, "width": 768, "num_layers": 7, "num_heads": 12, "length": 128, "batch": 2},
    "tiny": {"vocab_size": 64, "width": 32, "num_layers": 2, "num_heads": 2, "length": 16, "batch": 2},
}
"""The reference decoder: about 10, 62 and 0.03 million parameters, and one rank's batch."""

Step = Callable[["Tensor"], float]
"""One update from this rank's tokens [batch, length + 1]; returns a loss."""


# In the ranks.


def make_model(size: str, device: str = "cpu") -> Any:
    """The reference decoder, the same weights on every rank and for every contestant."""
    import torch

    from sixfold.models.decoder import Decoder, DecoderConfig

    sizes = {key: value for key, value in SIZES[size].items() if key != "batch"}
    torch.manual_seed(0)
    return Decoder(DecoderConfig.derive(context_length=sizes.pop("length"), **sizes)).to(device)


def batches(size: str, rank: int, device: str = "cpu") -> Iterator[Tensor]:
    """Endless batches of random tokens, different on every rank."""
    import torch

    sizes = SIZES[size]
    shape = sizes["batch"], sizes["length"] + 1
    generator = torch.Generator().manual_seed(rank)
    while True:
        yield torch.randint(sizes["vocab_size"], shape, generator=generator).to(device)


def quit_rank() -> None:
    """End this process without tearing torch down.

    It keeps threads of a group that was formed before its optimizers were loaded, and the interpreter's end
    may abort on them.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


# In the parent.


class RankError(Exception):
    """Ranks that ended early or never answered, with the last line of their error output."""


def places(num_ranks: int) -> list[dict[str, str]]:
    """The environment of each rank of a job, as torch's launcher sets it; one thread each."""
    from sixfold.testing import free_port

    common = os.environ | {
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


def run_ranks(command: Sequence[str], num_ranks: int) -> Any:
    """Run one job to its end; what its first rank printed last, read as JSON.

    Raises:
        SystemExit: a rank failed.
    """
    ranks = [
        subprocess.Popen([sys.executable, *command], env=place, stdout=subprocess.PIPE, text=True)
        for place in places(num_ranks)
    ]
    told = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a rank failed; its error stands above")
    return json.loads(told[0].splitlines()[-1])


class Ranks:
    """Processes of one job that answer with JSON, one line each, and may be told lines of text.

    Args:
        command: what every rank runs; it finds its place in the environment as torch's launcher sets it.
        environment: on top of that.
        shows_errors: pass the ranks' error output on; else it is kept for the error's text.
    """

    def __init__(
        self,
        command: Sequence[str],
        num_ranks: int,
        *,
        environment: Mapping[str, str] | None = None,
        shows_errors: bool = True,
    ) -> None:
        self._logs: list[IO[bytes] | None] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank, place in enumerate(places(num_ranks)):
            self._logs.append(None if shows_errors else tempfile.TemporaryFile())  # noqa: SIM115 (lives as long as the rank)
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    env=place | (environment or {}),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._logs[rank],
                    bufsize=0,
                )
            )

    def tell(self, line: str) -> None:
        """Send one line to every rank."""
        for process in self.processes:
            assert process.stdin is not None, "ranks are started with a pipe"
            try:
                process.stdin.write(f"{line}\n".encode())
            except BrokenPipeError:
                self._fail("a rank no longer listens")

    def answers(self, timeout_s: float) -> list[Any]:
        """The next line of every rank, by rank.

        Raises:
            RankError: one of them ended, or the time is over; all are killed.
        """
        deadline = time.monotonic() + timeout_s
        return [json.loads(self._line(process, deadline)) for process in self.processes]

    def has_answer(self) -> bool:
        """Whether the first rank has answered, or ended."""
        first = self.processes[0]
        return bool(select.select([first.stdout], [], [], 0)[0]) or first.poll() is not None

    def _line(self, process: subprocess.Popen[bytes], deadline: float) -> bytes:
        assert process.stdout is not None, "ranks are started with a pipe"
        while not select.select([process.stdout], [], [], 0.2)[0]:
            if any(each.poll() for each in self.processes):
                self._fail("a rank ended early")
            if time.monotonic() > deadline:
                self._fail("no answer in time")
        line = process.stdout.readline()
        if not line:
            self._fail("a rank ended early")
        return line

    def _fail(self, what: str) -> None:
        time.sleep(0.5)  # the rank that broke has printed why, and its peers follow
        codes = [process.poll() for process in self.processes]
        self.kill()
        texts = [self._last_error(log) for log in self._logs if log is not None]
        raise RankError(next((text for text in texts if text), f"{what}, exit statuses {codes}"))

    @staticmethod
    def _last_error(log: IO[bytes]) -> str:
        """The last exception with what it says, or failing that the last line."""
        log.seek(0)
        text = re.sub(r"^\[rank\d+\]:\s?", "", log.read().decode(errors="replace"), flags=re.MULTILINE)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        errors = [place for place, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)]
        first = errors[-1] if errors else len(lines) - 1
        return "; ".join(lines[first : first + 3])[:400] if lines else ""

    def finish(self) -> None:
        """Wait for all of them; a failed one takes the others with it."""
        for process in self.processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self.processes:
            if process.wait():
                self._fail("a rank failed at its end")

    def kill(self) -> None:
        """End all of them now."""
        for process in self.processes:
            process.kill()
            process.wait()

    def pss_mb(self) -> float:
        """Proportional set size of all ranks together: a page shared by n processes counts 1/n."""
        return sum(pss_mb(process.pid) for process in self.processes)


def pss_mb(pid: int) -> float:
    """Proportional set size of a process, 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e6


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median and an interval that covers it with at least 95 % (of few values: their whole range).

    The k-th smallest and k-th largest of n values leave the median out with probability
    2 P(Binomial(n, 1/2) < k).
    """
    ordered, n = sorted(values), len(values)
    outside, k = 0.0, 0
    while (outside := outside + 2 * math.comb(n, k) / 2**n) <= 0.05:
        k += 1
    k = max(k, 1)
    return statistics.median(ordered), ordered[k - 1], ordered[n - k]


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest relative difference of two runs' losses over the updates that are compared."""
    pairs = list(zip(ours, theirs, strict=False))[:AGREEING_STEPS]
    return max(abs(a - b) / abs(b) for a, b in pairs)
