"""The training run as ranks carry it out: however many they are, from the start or from a checkpoint.

What the command adds, the launcher and its messages, is tested in tests/fresh.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from sixfold.checkpoint import latest, open_checkpoint
from sixfold.config import load
from sixfold.data.corpus import prepare
from sixfold.launch import Session, current_session
from sixfold.monitor.journal import read_records
from sixfold.monitor.meters import StepRecord
from sixfold.testing import Pool
from sixfold.train import loop
from sixfold.train.callbacks import Evaluations
from sixfold.train.job import Request, resolve
from sixfold.train.loop import train
from sixfold.train.run import Run
from tests.one import lab

STEPS = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration on a tiny corpus that is prepared, as the launcher does it."""
    folder = tmp_path_factory.mktemp("train")
    lab.write_corpus(folder / "text")
    (folder / "cache").mkdir()
    file = lab.write_config(folder / "my.toml", lab.settings(folder, train__steps=STEPS))
    prepare(resolve(Request(config=file)).config.data)
    return file


class Stopping(Session):
    """Asks to stop during the third update."""

    reads = 0

    @property
    def stop_requested(self) -> bool:
        self.reads += 1
        return self.reads >= 3


def on_ranks(pool: Pool, ranks: int, request: Request, *, stops: bool = False) -> str:
    """Run it; what rank 0 printed. With `stops` the last rank, it alone, is asked to stop."""
    pool.run(one_rank, request, stops, ranks=ranks, timeout_s=60)
    return pool.printed[0]


def one_rank(request: Request, stops: bool) -> None:
    is_last = dist.get_rank() == dist.get_world_size() - 1
    with pytest.MonkeyPatch.context() as patch:
        # Who made the process group is no launcher, and says nowhere where the ranks have met.
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            patch.delenv(name)
        train(request, Stopping() if stops and is_last else current_session())


def records(run: Path) -> list[dict[str, Any]]:
    return [one for one in read_records(run / "metrics.jsonl") if "loss" in one]


def weights(run: Path) -> dict[str, Any]:
    """Parameters, optimizer state and counters of the newest checkpoint, for comparison."""
    folder = latest(run / "checkpoints")
    assert folder is not None
    tensors = {
        f"{file}:{name}": tensor.tolist()
        for file in ("model.safetensors", "optimizer.safetensors")
        for name, tensor in load_file(folder / file).items()
    }
    state = open_checkpoint(folder).state
    return {**tensors, "step": state["step"], "samples": state["samples"]}


def test_four_ranks_follow_two(config: Path, tmp_path: Path, rank_pool: Pool) -> None:
    """Six samples over four ranks: uneven shares, on however few cores there are."""
    on_ranks(rank_pool, 2, Request(config=config, into=tmp_path / "two"))
    out = on_ranks(rank_pool, 4, Request(config=config, into=tmp_path / "four"))
    assert "6 samples / 4 data ranks = 2 or 1 a rank" in out
    two, four = records(tmp_path / "two"), records(tmp_path / "four")
    assert [record["step"] for record in four] == list(range(1, STEPS + 1))
    for name in ("loss", "lr", "grad_norm"):
        assert [record[name] for record in four] == pytest.approx([record[name] for record in two], rel=1e-5)


def test_what_is_changed_at_a_resume_is_told_and_origins_stay(
    config: Path, tmp_path: Path, rank_pool: Pool
) -> None:
    """By fewer ranks, too."""
    run = tmp_path / "run"
    on_ranks(rank_pool, 2, Request(config=config, into=run))
    origins = config_origins(run)
    changes = (f"train.steps={STEPS + 1}", "batch.global=4", "seed=1")
    out = on_ranks(rank_pool, 1, Request(resume=run, overrides=changes))
    assert f"resumed     after update {STEPS} " in out
    assert "\nchanged since the save: seed 0 -> 1\n" in out
    assert "\nchanged since the save: batch.global 6 -> 4\n" in out
    changed = config_origins(run)
    assert {key for key in origins if changed[key] != origins[key]} == {"seed", "global", "steps"}
    assert changed["global"].strip() == "--set"
    assert [record["samples"] for record in records(run)][-2:] == [6 * STEPS, 6 * STEPS + 4]


def config_origins(run: Path) -> dict[str, str]:
    lines = (run / "config.toml").read_text().splitlines()
    return {line.split(" ")[0]: line.partition("#")[2] for line in lines if line and line[0] not in "[#"}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_complete_run_is_left_as_it_is(config: Path, tmp_path: Path, rank_pool: Pool, ranks: int) -> None:
    """Ranks of a foreign launcher find it out themselves."""
    run = tmp_path / "run"
    on_ranks(rank_pool, ranks, Request(config=config, into=run))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    out = on_ranks(rank_pool, ranks, Request(resume=run))
    assert out == f"already complete after update {STEPS}; nothing to do (raise train.steps to go on)\n"
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_stopped_run_goes_on_bit_for_bit(config: Path, tmp_path: Path, rank_pool: Pool) -> None:
    """With dropout and several micro-batches."""
    changes = ("lr_schedule.name=constant", "model.dropout=0.1", "batch.micro=1", "train.sample_tokens=0")
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    on_ranks(rank_pool, 2, Request(config=config, overrides=changes, into=straight))
    out = on_ranks(rank_pool, 2, Request(config=config, overrides=changes, into=stopped), stops=True)
    assert f"stopped and saved after update 3; go on with:\n  sixfold train --resume {stopped}\n" in out
    assert len(records(stopped)) == 3
    assert "resumed     after update 3 " in on_ranks(rank_pool, 2, Request(resume=stopped))
    assert weights(stopped) == weights(straight)
    for name in ("step", "loss", "lr", "grad_norm", "samples"):
        assert [one[name] for one in records(stopped)] == [one[name] for one in records(straight)], name


def test_a_length_that_updates_correct_is_one_on_all_ranks_and_stays_at_a_resume(
    config: Path, tmp_path: Path, rank_pool: Pool
) -> None:
    """The rehearsal promised six thousand updates; there is time for hardly any."""
    run, killed = tmp_path / "run", tmp_path / "killed"
    changes = ("train.minutes=1e-4", "lr_schedule.name=linear", "train.sample_tokens=0", "checkpoint.every=4")
    request = Request(config=config, overrides=changes, into=run)
    rank_pool.run(rehearsed_in, 1e-6, request, 4, killed, ranks=2)
    out = rank_pool.printed[0]
    assert "length      6000 updates in 0.0001 minutes at 0.000 s each, as rehearsed" in out
    assert "length      5 updates, not 6000, fill 0.0001 minutes: " in out
    assert [record["step"] for record in records(run)] == [1, 2, 3, 4, 5]
    assert [one["length"] for one in read_records(run / "metrics.jsonl") if "length" in one] == [5]
    assert records(run)[3]["lr"] > 10 * records(run)[4]["lr"], "the schedule ends with the run"
    # The fourth update was saved, and corrected the length: what a kill leaves there ends as the run did.
    assert load(killed / "config.toml").config.train.steps == 5
    on_ranks(rank_pool, 2, Request(resume=killed))
    assert weights(killed) == weights(run)


def rehearsed_in(pace_s: float, request: Request, step: int, killed: Path) -> None:
    """Train by a rehearsal of `pace_s`; a kill right behind the save at `step` leaves what is in `killed`."""

    def copy(self: Evaluations, run: Run, record: StepRecord) -> None:
        if record.step == step:
            run.engine.wait_for_save()
            if run.is_first:
                shutil.copytree(run.folder, killed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_seconds_per_update", lambda run: pace_s)
        patch.setattr(Evaluations, "after_update", copy)  # the callback behind the one that saves
        one_rank(request, stops=False)
