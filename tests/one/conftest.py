"""Fixtures of this floor."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.one.terminal import Terminal


@pytest.fixture
def sixfold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal(tmp_path, monkeypatch, capsys)
