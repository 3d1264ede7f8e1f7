"""`sixfold config` and `sixfold doctor`, and --json where commands would only show something."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from sixfold.base.errors import EXIT_DONE, EXIT_INFEASIBLE, EXIT_USAGE
from sixfold.config import describe, load
from sixfold.monitor import checkup, selftest
from sixfold.monitor.checkup import Finding
from tests.one import lab
from tests.one.terminal import Terminal


def test_show_is_what_train_would_take(sixfold: Terminal) -> None:
    assert sixfold("config", "show", "--set", "optimizer.lr=1e-4") == EXIT_DONE
    (sixfold.folder / "shown.toml").write_text(sixfold.out)
    shown = load(sixfold.folder / "shown.toml").config
    assert (shown.optimizer.lr, shown.optimizer.name) == (1e-4, "adamw")
    assert "lr = 0.0001" in sixfold.out
    assert "# --set" in sixfold.out
    assert sixfold("config", "show", "--json") == EXIT_DONE
    assert json.loads(sixfold.out)["seed"] == {"value": 0, "origin": "default"}


def test_show_of_a_run_keeps_the_origins_it_had(sixfold: Terminal) -> None:
    run = sixfold.folder / "run"
    run.mkdir()
    resolved = load(values={"train.steps": 3}).decide({"launch.ranks": 2}, "one per core")
    (run / "config.toml").write_text(resolved.to_toml())
    assert sixfold("config", "show", "run") == EXIT_DONE
    assert "# decided: one per core" in sixfold.out


def test_check_says_all_that_is_wrong_with_each_file(sixfold: Terminal) -> None:
    good = sixfold.config(launch__ranks=2)
    (sixfold.folder / "bad.toml").write_text("[optimizer]\nlr = 'x'\nmomentun = 0.9\n")
    assert sixfold("config", "check", good) == EXIT_DONE
    assert sixfold.out == f"{good}: right\n"
    assert sixfold("config", "check", good, "bad.toml", "nowhere.toml", "--json") == EXIT_USAGE
    rows = json.loads(sixfold.out)
    assert [row["problem"] is None for row in rows] == [True, False, False]
    assert "bad.toml:2" in rows[1]["problem"]
    assert "bad.toml:3" in rows[1]["problem"]


def test_check_tries_a_number_of_ranks(sixfold: Terminal) -> None:
    config = sixfold.config(layout__zero=2, layout__shard=3)
    assert sixfold("config", "check", config) == EXIT_DONE
    assert sixfold("config", "check", config, "--ranks", "4") == EXIT_INFEASIBLE
    assert "layout.shard" in sixfold.out


def test_schema_has_every_option(sixfold: Terminal) -> None:
    assert sixfold("config", "schema") == EXIT_DONE
    for path, takes, _, words in describe():
        assert f"{path}   {takes}" in sixfold.out
        assert words in sixfold.out
    assert sixfold("config", "schema", "--json") == EXIT_DONE
    schema = json.loads(sixfold.out)
    assert "global" in schema["$defs"]["BatchConfig"]["properties"]


def test_dry_runs_as_json(sixfold: Terminal) -> None:
    lab.write_corpus(sixfold.folder / "text", num_files=8)
    assert sixfold("train", "--config", sixfold.config(launch__ranks=2), "--dry-run", "--json") == EXIT_DONE
    shown = json.loads(sixfold.out)
    assert shown["plan"]["ranks"].startswith("2: ")
    assert shown["config"]["launch.ranks"]["value"] == 2
    (sixfold.folder / "mine.py").write_text("")
    assert sixfold("run", "-n", "3", "--dry-run", "--json", "mine.py") == EXIT_DONE
    assert json.loads(sixfold.out)["ranks"] == 3
    assert sixfold("train", "--json") == EXIT_USAGE
    assert "--dry-run" in sixfold.err


def test_the_doctor_tells_what_fails_and_how_to_mend_it(
    sixfold: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sixfold("doctor", "--no-self-test", "--json") == EXIT_DONE
    names = [row["what"] for row in json.loads(sixfold.out)]
    assert {"torch", "devices", "backends", "links", "/dev/shm", "open files", "packages"} <= set(names)
    assert "self-test" not in names
    monkeypatch.setattr(checkup.torch, "__version__", "2.3.1+cpu")
    monkeypatch.setattr(checkup, "run", lambda *_: selftest.Outcome("rank 1: no route", {}))
    assert sixfold("doctor") == EXIT_INFEASIBLE
    assert "FAIL  torch       2.3.1+cpu, older than 2.11" in sixfold.out
    assert "fix: pip install 'torch>=2.11'" in sixfold.out
    assert "FAIL  self-test   rank 1: no route" in sixfold.out


def test_findings_that_are_notes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_name(name: str) -> str:
        raise OSError("unknown")

    monkeypatch.setattr(checkup.socket, "gethostbyname", no_name)
    monkeypatch.setattr(checkup, "SHM_BYTES", 2**80)
    monkeypatch.setattr(checkup, "OPEN_FILES", 2**40)
    found: list[Finding] = [
        checkup._host_name(),
        checkup._shared_memory(tmp_path),
        checkup._shared_memory(tmp_path / "nowhere"),
        checkup._compiler(lambda name: None),
    ]
    if sys.platform == "linux":
        found.append(checkup._open_files())
    assert {each.status for each in found} == {"note"}
    assert all(each.fix for each in found if each.found and "there is none" not in each.found)
    monkeypatch.setattr(checkup, "free_bytes", lambda: None)
    assert checkup._memory() == Finding("memory", "note", "the system does not say how much is free")
