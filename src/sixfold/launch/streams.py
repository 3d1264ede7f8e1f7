"""Rank 0 on the terminal: passes its output through as it comes and keeps the log beside it.

Used by the supervisor for rank 0; other ranks write straight to their logs. Where the launcher's own
stream is a terminal, rank 0 gets a pseudo terminal of the same size, so that live lines, colours and
`isatty` work; else a pipe. Bytes are passed unchanged. It never interprets them, except that the log
keeps of a line redrawn with carriage returns only its last state.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import termios
import threading
import time
from pathlib import Path

_READ_BYTES = 65_536
_RESIZE_S = 0.5
_JOIN_S = 5.0


class Relay:
    """Carries rank 0's stdout and stderr to the launcher's descriptors and to a log.

    Args:
        log: file to append to.
        out: descriptor of the launcher's stdout.
        err: descriptor of its stderr; where both are the same file their order is kept.
    """

    def __init__(self, log: Path, out: int = 1, err: int = 2) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._streams = [_Stream(out, self._log)]
        if not os.path.sameopenfile(out, err):
            self._streams.append(_Stream(err, self._log))
        self._thread = threading.Thread(target=self._pump, name="sixfold-relay", daemon=True)

    @property
    def child_out(self) -> int:
        """Descriptor to give rank 0 as stdout."""
        return self._streams[0].inner

    @property
    def child_err(self) -> int:
        """Descriptor to give rank 0 as stderr."""
        return self._streams[-1].inner

    def start(self) -> None:
        """Begin, once rank 0 has been started: from here the inner ends belong to it alone."""
        for stream in self._streams:
            os.close(stream.inner)
        self._thread.start()

    @property
    def is_inside_line(self) -> bool:
        """Whether the last output ended without a newline, as a live line does."""
        return any(stream.is_inside_line for stream in self._streams)

    def close(self) -> None:
        """Wait for the end, after rank 0 and all its children are gone; harmless when repeated.

        Not for ever: a terminal that was stopped takes nothing more. What was read is in the log by then.
        """
        self._thread.join(_JOIN_S)

    def _pump(self) -> None:
        with selectors.DefaultSelector() as selector:
            for stream in self._streams:
                selector.register(stream.outer, selectors.EVENT_READ, stream)
            while selector.get_map():
                for key, _ in selector.select(_RESIZE_S):
                    if not key.data.carry():
                        selector.unregister(key.fd)
                for stream in self._streams:
                    stream.match_size()
        for stream in self._streams:
            stream.finish()
        os.close(self._log)


class _Stream:
    """One stream of rank 0: `inner` is its end, `outer` ours, `target` the launcher's own."""

    def __init__(self, target: int, log: int) -> None:
        self._target, self._log = target, log
        self._is_terminal, self._is_open = os.isatty(target), True
        self._pending = b""
        self.is_inside_line = False
        if self._is_terminal:
            self.outer, self.inner = os.openpty()
            settings = termios.tcgetattr(self.inner)
            settings[1] &= ~termios.OPOST  # the real terminal does that once already
            termios.tcsetattr(self.inner, termios.TCSANOW, settings)
            self.match_size()
        else:
            self.outer, self.inner = os.pipe()

    def carry(self) -> bool:
        """Pass on what has come; False at the end."""
        try:
            data = os.read(self.outer, _READ_BYTES)
        except OSError:  # how a pseudo terminal says that its other end is closed
            return False
        if data:
            self._keep(data)  # first: the terminal may block
            self._pass_on(data)
        return bool(data)

    def match_size(self) -> None:
        """Give the pseudo terminal the size of the real one."""
        if self._is_terminal:
            with contextlib.suppress(OSError, termios.error):
                termios.tcsetwinsize(self.outer, termios.tcgetwinsize(self._target))

    def finish(self) -> None:
        """Write the last, unfinished line to the log and release the descriptor."""
        if self._pending:
            self._keep(b"\n")
        os.close(self.outer)

    def _pass_on(self, data: bytes) -> None:
        self.is_inside_line = self._is_open and not data.endswith(b"\n")
        while data and self._is_open:
            try:
                data = data[os.write(self._target, data) :]
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:  # the reader or the terminal is gone: the log goes on
                self._is_open = False

    def _keep(self, data: bytes) -> None:
        *lines, rest = (self._pending + data).split(b"\n")
        self._pending = _last_state(rest)
        text = b"".join(_last_state(line).rstrip(b"\r") + b"\n" for line in lines)
        with contextlib.suppress(OSError):  # a full disk must not stop the run for its log
            os.write(self._log, text)


def _last_state(line: bytes) -> bytes:
    """What a terminal shows of a line redrawn with carriage returns."""
    return line[line.rstrip(b"\r").rfind(b"\r") + 1 :]
