"""The metrics file: each step once after any stop, and no failure that reaches the run."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from sixfold.base.errors import DataError
from sixfold.monitor.journal import FILE_NAME, Journal, read_records


def write(folder: Path, steps: range, resume_step: int = 0) -> Path:
    journal = Journal(folder, resume_step)
    for step in steps:
        journal.write({"step": step, "loss": step / 2})
    journal.close()
    return folder / FILE_NAME


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_records(path)]


def test_each_record_is_one_json_line_in_the_file_at_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run")
    journal.write({"step": 1, "loss": 0.5, "mfu": None})
    lines = (tmp_path / "run" / FILE_NAME).read_text().splitlines()
    journal.close()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 0.5, "mfu": None}]


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    write(tmp_path, range(1, 10))
    path = write(tmp_path, range(7, 12), resume_step=6)
    assert steps(path) == list(range(1, 12))


def test_a_new_run_in_an_old_folder_starts_over(tmp_path: Path) -> None:
    write(tmp_path, range(1, 10))
    assert steps(write(tmp_path, range(1, 3))) == [1, 2]


def test_records_without_a_step_stay(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write({"note": "begin"})
    journal.write({"step": 5})
    journal.close()
    Journal(tmp_path, 4).close()
    assert read_records(tmp_path / FILE_NAME) == [{"note": "begin"}]


@pytest.mark.parametrize("cut", [1, 2, 9, 15])
def test_a_line_torn_by_a_kill_is_left_out_and_written_again(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path, range(1, 5))
    os.truncate(path, path.stat().st_size - cut)
    # Without its newline only, the last record is whole.
    assert steps(path) == [1, 2, 3, 4][: 4 if cut == 1 else 3]
    assert steps(write(tmp_path, range(4, 6), resume_step=3)) == [1, 2, 3, 4, 5]


def test_numbers_that_json_lacks_come_back_through_float(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    loads = {"layers.0": [0.5, math.nan], "layers.1": (math.inf,)}
    journal.write({"step": 1, "loss": math.nan, "norm": math.inf, "expert_loads": loads})
    journal.close()
    (record,) = read_records(tmp_path / FILE_NAME)
    assert record["expert_loads"] == {"layers.0": [0.5, "nan"], "layers.1": ["inf"]}
    assert math.isnan(float(record["loss"]))
    assert float(record["norm"]) == math.inf


@pytest.mark.parametrize("value", [{1, 2}, {"inside": [object()]}, {("a", "b"): 1}])
def test_what_json_cannot_hold_is_reported_and_survived(tmp_path: Path, value: object) -> None:
    warnings: list[str] = []
    journal = Journal(tmp_path, warn=warnings.append)
    journal.write({"step": 1, "value": value})
    journal.write({"step": 2})
    journal.close()
    assert steps(journal.path) == [2]
    (warning,) = warnings
    assert "training goes on" in warning


def test_a_folder_that_cannot_be_made_is_reported_once_and_survived(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    warnings: list[str] = []
    journal = Journal(tmp_path / "file" / "run", warn=warnings.append)
    journal.write({"step": 1})
    journal.write({"step": 2})
    journal.close()
    (warning,) = warnings
    assert FILE_NAME in warning
    assert "Not a directory" in warning


def test_metrics_that_cannot_be_read_are_an_error_with_a_way_out_and_stop_no_run(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(DataError, match=r"metrics\.jsonl cannot be read: Is a directory"):
        read_records(tmp_path / FILE_NAME)
    warnings: list[str] = []
    Journal(tmp_path, warn=warnings.append).write({"step": 1})
    (warning,) = warnings
    assert "Is a directory; training goes on" in warning
    assert read_records(tmp_path / "absent" / FILE_NAME) == []


class NearlyFull:
    """A file on a disk with `room` bytes left; what does not fit is cut off, then refused."""

    def __init__(self, path: Path, room: int) -> None:
        self.file, self.room = path.open("ab", buffering=0), room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def truncate(self, size: int) -> int:
        return self.file.truncate(size)

    def close(self) -> None:
        self.file.close()


def test_a_full_disk_is_reported_once_and_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    journal = Journal(tmp_path, warn=warnings.append)
    disk = NearlyFull(journal.path, room=25)
    monkeypatch.setattr(journal, "_file", disk)
    for step in range(1, 5):
        journal.write({"step": step})  # 12 bytes each: the third is cut, the fourth refused
    disk.room = 100
    journal.write({"step": 5})
    journal.close()
    assert steps(journal.path) == [1, 2, 5]
    assert len(warnings) == 1
    assert "training goes on" in warnings[0]
