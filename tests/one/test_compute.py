"""Which type a job computes in: as asked, else as measured once before ranks start."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sixfold.base.errors import EXIT_DONE, EXIT_USAGE
from sixfold.config import load
from sixfold.train import compute
from sixfold.train.compute import measured_compute, unmeasured_compute
from sixfold.train.job import Request, resolve
from tests.one import lab
from tests.one.terminal import Terminal

MODEL = nn.Sequential(nn.Embedding(300, 8), nn.Linear(8, 64), nn.Linear(64, 8), nn.Linear(8, 8))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What was measured; bf16 is 1.9 times as fast."""
    calls: list[tuple[object, ...]] = []

    def measure(*shape: int, threads: int | None) -> float:
        calls.append((*shape, threads))
        return 1.9

    monkeypatch.setattr(compute, "bf16_speedup", measure)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return calls


def test_a_type_that_was_asked_for_is_kept_and_nothing_measured(measured: list[object]) -> None:
    asked = load(values={"precision.compute": "fp32"})
    assert measured_compute(asked, MODEL) is asked
    assert unmeasured_compute(asked) is asked
    assert not measured


@pytest.mark.parametrize(
    ("speedup", "type_", "origin"),
    [
        (1.93, "bf16", "decided: measured: bf16 1.9 x fp32"),
        (1.05, "fp32", "decided: measured: bf16 1.1 x fp32"),
        (0.53, "fp32", "decided: measured: bf16 0.53 x fp32"),
    ],
)
def test_the_faster_type_is_chosen_whatever_the_instructions(
    measured: list[object], monkeypatch: pytest.MonkeyPatch, speedup: float, type_: str, origin: str
) -> None:
    monkeypatch.setattr(compute, "bf16_speedup", lambda *_, threads: speedup)
    monkeypatch.setattr(compute, "fast_bf16", lambda: speedup < 1)
    decided = measured_compute(load(), MODEL)
    assert decided.config.precision.compute == type_
    assert decided.origins["precision.compute"] == origin


def test_products_have_the_shape_in_which_most_weights_are(measured: list[tuple[object, ...]]) -> None:
    values = {"data.sequence_length": 16, "batch.global": 8, "batch.micro": 4, "launch.threads": 3}
    measured_compute(load(values=values), MODEL)
    assert measured == [(64, 8, 300, 3)]
    measured_compute(load(values=values), MODEL[1:])
    assert measured[1] == (64, 8, 64, 3)


def test_on_a_gpu_nothing_is_measured(measured: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert measured_compute(load(), MODEL).config.precision.compute == "bf16"
    assert not measured


@pytest.mark.parametrize("has", [True, False])
def test_ranks_of_other_launchers_measure_nothing(
    measured: list[object], monkeypatch: pytest.MonkeyPatch, has: bool
) -> None:
    monkeypatch.setattr(compute, "fast_bf16", lambda: has)
    decided = unmeasured_compute(load())
    assert decided.config.precision.compute == ("bf16" if has else "fp32")
    assert "not measured" in decided.origins["precision.compute"]
    assert not measured


def test_a_launcher_measures_once_and_hands_ranks_all_that_was_settled(
    sixfold: Terminal, measured: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.write_corpus(sixfold.folder / "text", num_files=8)
    config = sixfold.config(precision__compute=None)
    ranks: dict[str, Any] = {}

    def start(command: list[str], **options: Any) -> int:
        assert command[:4] == [sys.executable, "-m", "sixfold", "train"]
        given = dict(zip(command[4::2], command[5::2], strict=True))
        ranks.update(given, resolved=resolve(Request(handed=Path(given["--handed"]))))
        return EXIT_DONE

    monkeypatch.setattr("sixfold.cli.train.launch", start)
    assert sixfold("train", "--config", config, "--into", "run", "--set", "seed=5") == EXIT_DONE
    assert len(measured) == 1
    assert ranks["--into"] == "run"
    assert not Path(ranks["--handed"]).exists()
    origins = ranks["resolved"].origins
    assert origins["precision.compute"] == "decided: measured: bf16 1.9 x fp32"
    assert origins["seed"] == "--set"
    assert "my.toml:" in origins["model.width"]
    assert origins["launch.ranks"] == "decided: one per core"
    assert unmeasured_compute(ranks["resolved"]) is ranks["resolved"]


def test_launchers_of_several_nodes_measure_nothing(
    sixfold: Terminal, measured: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.write_corpus(sixfold.folder / "text", num_files=8)
    pod = {
        "PET_NNODES": "2",
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "localhost",
        "PET_MASTER_PORT": "29500",
    }
    for name, value in pod.items():
        monkeypatch.setenv(name, value)
    config = sixfold.config(precision__compute=None, launch__ranks=1)
    assert sixfold("train", "--config", config, "--dry-run") == EXIT_DONE
    assert "not measured" in sixfold.out
    assert not measured


def test_a_dry_run_and_a_plan_say_what_was_measured(sixfold: Terminal, measured: list[object]) -> None:
    lab.write_corpus(sixfold.folder / "text", num_files=8)
    config = sixfold.config(precision__compute=None)
    assert sixfold("train", "--config", config, "--dry-run") == EXIT_DONE
    assert 'compute = "bf16"' in sixfold.out
    assert "measured: bf16 1.9 x fp32" in sixfold.out
    assert sixfold("plan", "--config", config, "--ranks", "1") == EXIT_DONE
    assert "precision   compute bf16" in sixfold.out


def test_a_wrong_target_of_adapters_is_refused_before_ranks_and_the_corpus(
    sixfold: Terminal, measured: list[object]
) -> None:
    lab.write_corpus(sixfold.folder / "text", num_files=8)
    config = sixfold.config(model__lora_rank=2, model__lora_targets=["query"])
    assert sixfold("train", "--config", config, "--into", "run") == EXIT_USAGE
    assert "no projection of Decoder is named query" in sixfold.err
    assert "fix:" in sixfold.err
    assert not (sixfold.folder / "run").exists()
    assert not (sixfold.folder / "cache").exists()
