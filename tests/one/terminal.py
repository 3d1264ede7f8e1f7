"""Calls of the command line in this process, as the entry point makes them.

Used by tests of what commands say, refuse and write without starting ranks.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sixfold.cli.app import main
from tests.one import lab


class Terminal:
    """Calls `sixfold ARGUMENTS...` in a folder of its own."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.folder, self.out, self.err = folder, "", ""
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str | Path) -> int:
        self._monkeypatch.setattr(sys, "argv", ["sixfold", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        self.out, self.err = self._capsys.readouterr()
        code = ended.value.code
        return code if isinstance(code, int) else 0

    def config(self, **changes: object) -> Path:
        return lab.write_config(self.folder / "my.toml", lab.settings(self.folder, **changes))
