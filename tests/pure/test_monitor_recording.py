"""The recorded update of a run: there as a whole, or the one before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sixfold.monitor.recording import FILE_NAME, read_recording, write_recording
from sixfold.simulate import Timeline

EARLIER = Timeline.of_rows([(0, "forward 0.0", 0.0, 1.0)])
LATER = Timeline.of_rows([(0, "forward 0.0", 0.0, 2.0), (0, "backward 0.0", 2.0, 5.0)])


def test_the_last_one_is_read(tmp_path: Path) -> None:
    assert read_recording(tmp_path) is None
    for step, timeline in ((3, EARLIER), (7, LATER)):
        write_recording(tmp_path, step, timeline, warn=pytest.fail)
        assert read_recording(tmp_path) == (step, timeline)
    assert [each.name for each in tmp_path.iterdir()] == [FILE_NAME]


def test_a_write_that_breaks_off_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recording(tmp_path, 3, EARLIER, warn=pytest.fail)

    def half(path: Path, text: str) -> None:
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", half)
    said: list[str] = []
    write_recording(tmp_path, 7, LATER, warn=said.append)
    assert read_recording(tmp_path) == (3, EARLIER)
    assert "no space left" in said[0]
