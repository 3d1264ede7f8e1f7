"""What a person sees while a run goes: one live line on a terminal, plain lines elsewhere.

The training loop of the first rank updates it and says messages through it. It starts no thread and
reads nothing; when its stream breaks it falls silent and the run goes on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.console import Console as RichConsole
from rich.live import Live
from rich.text import Text

from sixfold.base.units import bytes_text, count_text, duration_text
from sixfold.monitor.meters import StepRecord

LIVE_INTERVAL_S = 0.1
PLAIN_INTERVAL_S = 10.0

_log = logging.getLogger(__name__)

_LEAST_IMPORTANT_FIRST = ("memory", "mfu", "norm", "lr", "rate", "left", "skipped", "loss")


def line_text(record: StepRecord, total_steps: int | None, width: int | None = None) -> str:
    """One record as one line; with a width, fields are left out, the least important first, to fit."""
    total = "" if total_steps is None else f"/{total_steps}"
    fields = {
        "step": f"step {record.step}{total}",
        "loss": f"loss {record.loss:.4f}",
        "lr": f"lr {record.lr:.2e}",
        "norm": "" if record.grad_norm is None else f"norm {record.grad_norm:.3g}",
        "skipped": f"skipped at scale {record.loss_scale:g}" if record.skipped else "",
        "rate": f"{count_text(record.tokens_per_s)} tok/s",
        "mfu": "" if record.mfu is None else f"mfu {record.mfu:.1%}",
        "memory": "" if record.memory_bytes is None else f"mem {bytes_text(record.memory_bytes)}",
        "left": f"eta {duration_text(record.eta_s)}",
    }
    line = "  ".join(filter(None, fields.values()))
    for name in _LEAST_IMPORTANT_FIRST:
        if width is None or len(line) <= width:
            return line
        fields[name] = ""
        line = "  ".join(filter(None, fields.values()))
    return line[:width]


class _Terminal(RichConsole):
    def on_broken_pipe(self) -> None:
        """rich would end the process here."""
        raise BrokenPipeError


class Console:
    """The live line and the messages of one run.

    Args:
        stream: where to write, usually sys.stdout or sys.stderr.
        total_steps: updates in the run; may be set later, once it is known.
        clock: seconds from any origin.
    """

    def __init__(
        self, stream: TextIO, total_steps: int | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total_steps = total_steps
        self._stream = stream
        self._clock = clock
        self._live: Live | None = None
        self._pending: StepRecord | None = None
        self._shown_at: float | None = None
        self._is_live = False
        self._rich = _Terminal(file=stream, highlight=False)
        with self._unbreakable():
            # Asked of the stream itself: rich also takes a file for a terminal when colour is forced.
            self._is_live = stream.isatty() and not self._rich.is_dumb_terminal

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def update(self, record: StepRecord) -> None:
        """Show an update: at once on a terminal, elsewhere the first, the last and some between."""
        self._pending = record
        interval = LIVE_INTERVAL_S if self._is_live else PLAIN_INTERVAL_S
        due = self._shown_at is None or self._clock() - self._shown_at >= interval
        if due or record.step == self.total_steps:
            self._show()

    def say(self, message: str) -> None:
        """Print a message; on a terminal it scrolls by above the live line."""
        with self._unbreakable():
            self._rich.print(Text(message), soft_wrap=True)

    def close(self) -> None:
        """Show what was not shown yet and leave the line standing; messages can still be said."""
        self._show()
        with self._unbreakable():
            if self._live is not None:
                self._live.stop()
        self._live = None

    def _show(self) -> None:
        if self._pending is None:
            return
        record, self._pending, self._shown_at = self._pending, None, self._clock()
        with self._unbreakable():
            if not self._is_live:
                self._rich.print(Text(line_text(record, self.total_steps)), soft_wrap=True)
                return
            self._rich.width = self._columns()
            # One column stays free: some terminals wrap as soon as the last one is written.
            line = line_text(record, self.total_steps, self._rich.width - 1)
            if self._live is None:
                self._live = Live(console=self._rich, auto_refresh=False)
                self._live.start()
                # rich hides the cursor, and a run that is killed could not bring it back.
                self._rich.show_cursor(True)
            self._live.update(Text(line, no_wrap=True), refresh=True)

    def _columns(self) -> int:
        try:
            return max(os.get_terminal_size(self._stream.fileno()).columns, 2)
        except OSError:
            return 80

    @contextlib.contextmanager
    def _unbreakable(self) -> Iterator[None]:
        """Swallow what a closed or broken stream raises, and write nothing to it any more."""
        try:
            yield
        except (OSError, ValueError) as error:
            self._rich.quiet = True
            if isinstance(error, BrokenPipeError):
                self._discard()
            _log.warning("nothing more is shown: %s; training goes on", error or "the reader has gone")

    def _discard(self) -> None:
        """Point the stream at nothing, or what it still holds would fail again when Python exits."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
