"""Whether ranks can share memory, decided from facts alone; and what is free, read from made-up files."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from sixfold.base.errors import PlanError
from sixfold.config import load
from sixfold.mesh.host.host import Facts, Host, objection
from sixfold.mesh.host.limits import free_bytes
from sixfold.plan import ParameterFacts, decide, exchange_memory

RANK = Facts(
    asked=None,
    device="cpu",
    place="here",
    pid=1,
    handle=3,
    needed=2**30,
    free=4 * 2**30,
    limit="of the machine",
    problem="",
)


def test_ranks_of_one_host_may_share() -> None:
    assert objection([RANK, RANK], [[0, 1]]) is None
    elsewhere = replace(RANK, place="there")
    assert objection([RANK, RANK, elsewhere, elsewhere], [[0, 1], [2, 3]]) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "cuda"}, "rank 1 computes on cuda"),
        ({"problem": "darwin on arm64"}, "rank 1: darwin on arm64"),
        ({"place": "there"}, "ranks 0, 1 exchange most and are on different hosts"),
        (
            {"free": 2**30, "limit": "under memory.max = 2147 MB"},
            "2 rank(s) of one host exchange up to 1.0 GiB + 1.0 GiB = 2.0 GiB, and 1.0 GiB are free under "
            "memory.max = 2147 MB",
        ),
    ],
)
def test_what_stands_against_it_is_said(change: dict[str, object], words: str) -> None:
    found = objection([RANK, replace(RANK, **change)], [[0, 1]])  # type: ignore[arg-type]
    assert found is not None
    assert found.startswith(words)


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="memory is shared on Linux on x86-64"
)
def test_a_rank_without_memory_for_the_first_rows_tells_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sixfold.mesh.host.memory.free_bytes", lambda: (100, "under memory.max = 1 MB"))
    told: list[Facts] = []

    def texts(text: str) -> list[str]:
        told.append(Facts.read(text))
        return [text, json.dumps(asdict(RANK))]

    with pytest.raises(PlanError, match=r"rank 0: .* 100 B are free under memory.max = 1 MB"):
        Host.form(
            "host", 0, torch.device("cpu"), texts, needed=1, neighbours=[[0, 1]], timeout_s=1.0, place="here"
        )
    assert len(told) == 1


def test_what_is_exchanged_is_known_before() -> None:
    """Gradients, in both types where they are sent in another, and weights of which others read slices."""
    facts = [ParameterFacts("weight", (1024,), "fp32", trainable=True)]
    values = {"precision": {"compute": "bf16", "reduce": "bf16"}}

    def needed(zero: int) -> int:
        return exchange_memory(decide(load(values={**values, "layout": {"zero": zero}}).config, facts, 2))

    assert needed(0) == 1024 * (4 + 2)
    assert needed(2) == 1024 * (4 + 2) + 1024 * 2
    assert needed(3) == 1024 * (4 + 2) + 512 * 2


def group(folder: Path, limit_file: str, used_file: str, **values: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit_file).write_text(f"{values['limit']}\n")
    (folder / used_file).write_text(f"{values['used']}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{values.get('stat', 'inactive_file 0')}\n")
    return folder


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 4000 kB\nMemFree: 10 kB\nMemAvailable: 2000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/job/rank\n")
    return tmp_path / "proc"


def test_without_limits_what_the_machine_has_is_free(proc: Path, tmp_path: Path) -> None:
    assert free_bytes(proc, tmp_path / "none") == (2000 * 1024, "of the machine")


def test_without_groups_the_machine_counts_and_without_its_word_nothing_is_known(tmp_path: Path) -> None:
    """Groups are a matter of Linux, and `/proc` of few systems."""
    (tmp_path / "meminfo").write_text("MemTotal: 4000 kB\nMemAvailable: 2000 kB\n")
    assert free_bytes(tmp_path, tmp_path) == (2000 * 1024, "of the machine")
    assert free_bytes(tmp_path / "none", tmp_path) is None


def test_the_tightest_group_counts_and_pages_of_files_are_free(proc: Path, tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    names = ("memory.max", "memory.current")
    group(groups / "job/rank", *names, limit="max", used=900_000)
    group(groups / "job", *names, limit=1_000_000, used=900_000, stat="inactive_file 300000")
    assert free_bytes(proc, groups) == (400_000, f"under {groups}/job/memory.max = 1 MB")


def test_groups_of_the_first_version(proc: Path, tmp_path: Path) -> None:
    (proc / "self/cgroup").write_text("9:cpu:/x\n8:memory:/seen/by/the/host\n0::/\n")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    groups = tmp_path / "cgroup"
    group(groups / "memory", *names, limit=800_000, used=300_000, stat="total_inactive_file 100000")
    found = free_bytes(proc, groups)
    assert found is not None
    assert found[0] == 600_000  # a container sees its own group as the root
