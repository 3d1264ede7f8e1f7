"""Code of others: how it is named and found, and that each kind of it does what it is for."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sixfold.base import plugins
from sixfold.base.errors import EXIT_DONE, EXIT_USAGE, ConfigError
from sixfold.base.plugins import load_plugin
from sixfold.checkpoint import latest, open_checkpoint
from sixfold.config import load
from sixfold.launch import current_session
from sixfold.monitor.journal import read_records
from sixfold.monitor.sinks import BUILT_IN, Sinks
from sixfold.plan import decide_learning_rate
from sixfold.state import build_optimizer
from sixfold.train import loop
from sixfold.train.folder import held
from sixfold.train.job import Request
from tests.one import lab
from tests.one.terminal import Terminal

CODE = """
import torch
CALLS = []

def doubled(scores, targets):
    return 2 * torch.nn.functional.cross_entropy(scores, targets, reduction="sum")

def slow_sgd(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr / 10)

def square(part):
    return (1 - part) ** 2

def documents():
    for number in range(30):
        yield f"text number {number}\\n" * 9

def numbers():
    yield 1

class Habit:
    def __init__(self, run):
        CALLS.append("made")
    def after_update(self, run, record):
        CALLS.append(record.step)
    def at_end(self, run, finished):
        CALLS.append(finished)

class Fails:
    def __init__(self, run):
        pass
    def after_update(self, run, record):
        CALLS.append(sorted(path.name for path in (run.folder / "checkpoints").glob("*")))
    def at_end(self, run, finished):
        raise ValueError("in the end")

class Noting:
    def __init__(self, folder, settings):
        self.file = folder / "noted"
    def write(self, record):
        pass
    def close(self):
        self.file.write_text("closed")

class Broken:
    def __init__(self, folder, settings):
        self.written = 0
    def write(self, record):
        self.written += 1
        if self.written == 2:
            raise OSError("the network is gone")
    def close(self):
        raise AssertionError("a sink that failed is left alone")
"""


@pytest.fixture
def code(tmp_path: Path) -> str:
    file = tmp_path / f"mine_{tmp_path.name.replace('-', '_')}.py"
    file.write_text(CODE)
    return str(file)


def trained(folder: Path, **changes: object) -> list[dict[str, Any]]:
    lab.write_corpus(folder / "text")
    number = len(list(folder.glob("run-*")))
    config = lab.write_config(folder / "my.toml", lab.settings(folder, train__sample_tokens=0, **changes))
    loop.train(Request(config, into=folder / f"run-{number}"), current_session())
    return read_records(folder / f"run-{number}" / "metrics.jsonl")


def test_the_three_ways_to_name_one(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_plugin("loss", f"{code}:doubled") is load_plugin("loss", f"{code}:doubled")
    assert load_plugin("optimizer", "torch.optim:RAdam") is torch.optim.RAdam
    point = importlib.metadata.EntryPoint("radam", "torch.optim:RAdam", "sixfold.optimizer")
    monkeypatch.setattr(plugins, "entry_points", lambda kind: {"radam": point})
    assert load_plugin("optimizer", "radam") is torch.optim.RAdam
    assert load(values={"optimizer.name": "radam"}).config.optimizer.name == "radam"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere.py:x", "FileNotFoundError"),
        ("no_such_module:x", "ModuleNotFoundError"),
        ("json:dumps_", "json has no dumps_; it has"),
        ("nothing", "no installed package offers it"),
    ],
)
def test_what_cannot_be_loaded_is_said(name: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_plugin("loss", name)
    assert told in caught.value.given
    assert "sixfold.loss" in caught.value.rule


def test_a_word_that_is_nothing_gets_the_near_one() -> None:
    with pytest.raises(ConfigError) as caught:
        load(values={"optimizer.name": "adamv"})
    assert '"adamw" | "sgd" | "adagrad" | "muon" | the name of a plugin' in caught.value.rule
    assert 'set optimizer.name = "adamw"' in caught.value.fix


def test_optimizer_and_schedule(code: str) -> None:
    asked = load(
        values={
            "optimizer.name": f"{code}:slow_sgd",
            "optimizer.lr": 0.5,
            "lr_schedule.name": f"{code}:square",
            "lr_schedule.final_ratio": 0.1,
            "train.steps": 11,
        }
    ).config
    made = build_optimizer(asked.optimizer)([torch.zeros(2, requires_grad=True)])
    assert made.param_groups[0]["lr"] == pytest.approx(0.05)
    rate = decide_learning_rate(asked)
    assert [rate.factor(step) for step in (0, 5, 10)] == pytest.approx([1.0, 0.1 + 0.9 * 0.25, 0.1])
    refused = load(values={"optimizer.name": f"{code}:slow_sgd", "optimizer.momentum": 0.9}).config
    with pytest.raises(ConfigError, match="momentum"):
        build_optimizer(refused.optimizer)


def test_loss_and_callback(code: str, tmp_path: Path) -> None:
    plain = trained(tmp_path, train__steps=1)
    habits = load_plugin("callback", f"{code}:Habit").__init__.__globals__["CALLS"]
    mine = trained(
        tmp_path, train__steps=1, train__loss=f"{code}:doubled", train__callbacks=[f"{code}:Habit"]
    )
    losses = [next(one["loss"] for one in records if "loss" in one) for records in (plain, mine)]
    assert losses[1] == pytest.approx(2 * losses[0])
    assert habits == ["made", 1, True]


def test_source(code: str, sixfold: Terminal) -> None:
    source = f"{code}:documents"
    small = ("--set", "data.held_out_documents=3", "--set", "data.vocab_size=300")
    lab.write_corpus(sixfold.folder / "text")
    asked = (
        "data",
        "build",
        source,
        "text",
        "--into",
        "corpus",
        "--dry-run",
        "--set",
        'data.include=["*.txt"]',
    )
    assert sixfold(*asked) == EXIT_DONE
    assert [line.split("   ")[:2] for line in sixfold.out.splitlines()] == [
        ["text", "30 files"],
        [source, "a function, not run"],
    ]
    assert sixfold(*asked, "--json") == EXIT_DONE
    assert json.loads(sixfold.out)[1] == {"source": source, "files": None, "bytes": None}
    assert not (sixfold.folder / "corpus").exists()
    assert sixfold("data", "build", source, "--into", "corpus", *small) == EXIT_DONE
    assert "27 documents" in sixfold.out
    assert not list(sixfold.folder.glob("corpus.*"))
    assert sixfold("train", "--set", f"data.path={source}", "--dry-run") == EXIT_USAGE
    assert "sixfold data build" in sixfold.err
    assert sixfold("data", "build", f"{code}:numbers", "--into", "other", *small) == EXIT_USAGE
    assert "document 0 of the source" in sixfold.err


def test_sources_of_one_name(sixfold: Terminal) -> None:
    """Functions of two files, and a folder of the user's where their documents might be written down."""
    for word in ("here", "there"):
        text = f'def documents():\n    yield from (f"{word} {{n}} " * 9 for n in range(9))\n'
        (sixfold.folder / f"{word}.py").write_text(text)
    own = sixfold.folder / "corpus.spool" / "mine.txt"
    own.parent.mkdir()
    own.write_text("mine")
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = own.parent.with_name(f"corpus.spool-{ended.pid}-killed")
    left.mkdir()
    both = ("here.py:documents", "there.py:documents", "--into", "corpus")
    small = ("--set", "data.held_out_documents=3", "--set", "data.tokenizer=bytes")
    assert sixfold("data", "build", *both, *small, "--json") == EXIT_DONE
    parts = json.loads(sixfold.out)["parts"]
    assert [part["name"] for part in parts] == ["0/documents.jsonl", "1/documents.jsonl"]
    assert [part["num_train_documents"] for part in parts] == [6, 6]
    assert own.read_text() == "mine"
    assert not left.exists()


def test_a_callback_that_fails_in_the_end_costs_no_update_and_sinks_are_closed(
    code: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="in the end"):
        trained(
            tmp_path,
            train__callbacks=[f"{code}:Fails"],
            monitor__sinks=[f"{code}:Noting"],
            checkpoint__every=2,
        )
    newest = latest(tmp_path / "run-0" / "checkpoints")
    assert newest is not None
    assert open_checkpoint(newest).step == 4
    seen = load_plugin("callback", f"{code}:Fails").__init__.__globals__["CALLS"]
    assert seen[1] == [], "it comes before the save of the second update"
    assert len(seen[2]) == 1
    assert (tmp_path / "run-0" / "noted").read_text() == "closed"


def test_a_rank_holds_its_run_until_it_ends(code: str, tmp_path: Path) -> None:
    trained(tmp_path)
    run = tmp_path / "run-0"
    again = Request(resume=run, overrides=("train.steps=5",))
    with held(run), pytest.raises(ConfigError, match="is in use"):
        loop.train(again, current_session())
    loop.train(again, current_session())
    assert sum("loss" in one for one in read_records(run / "metrics.jsonl")) == 5


def test_a_sink_that_fails_stops_nothing(
    code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = trained(tmp_path, monitor__sinks=[f"{code}:Broken", "nowhere.py:Sink"])
    assert sum("loss" in one for one in records) == 4
    out = capsys.readouterr().out
    assert out.count("Broken is left out: OSError: the network is gone; training goes on") == 1
    assert out.count("nowhere.py:Sink is left out") == 1


RECORDS: list[dict[str, Any]] = [
    {"facts": {"plan": "x"}},
    {"step": 1, "loss": 2.5, "skipped": False, "grad_norm": None},
    {"step": 2, "loss": float("nan"), "tokens_per_s": 100.0},
]


@pytest.mark.parametrize("name", ["tensorboard", "prometheus"])
def test_sinks_that_come_along(name: str, tmp_path: Path) -> None:
    warnings: list[str] = []
    sinks = Sinks([name], tmp_path, {"optimizer.lr": 1e-3}, warnings.append)
    for record in RECORDS:
        sinks.write(record)
    sinks.close()
    assert warnings == []
    if name == "prometheus":
        text = (tmp_path / "metrics.prom").read_text()
        assert f'sixfold_loss{{run="{tmp_path.name}"}} 2.5' in text
        assert f'sixfold_tokens_per_s{{run="{tmp_path.name}"}} 100.0' in text
    else:
        assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_a_sink_whose_package_is_missing_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    warnings: list[str] = []
    Sinks(["wandb"], tmp_path, {}, warnings.append).write(RECORDS[1])
    assert len(warnings) == 1
    assert "pip install 'sixfold[wandb]'" in warnings[0]
    assert set(BUILT_IN) == {"tensorboard", "wandb", "prometheus"}


def test_wandb_gets_numbers_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package itself wants an account or a folder of its own; what it is called with is seen here."""
    calls: list[Any] = []

    class Fake:
        def init(self, **options: Any) -> Fake:
            calls.append(options["config"])
            return self

        def log(self, numbers: dict[str, float], step: int | None) -> None:
            calls.append((numbers, step))

        def finish(self) -> None:
            calls.append("finish")

    monkeypatch.setitem(sys.modules, "wandb", Fake())
    sinks = Sinks(["wandb"], tmp_path, {"optimizer.lr": 1e-3, "seed": None}, pytest.fail)
    sinks.write(RECORDS[1])
    sinks.close()
    assert calls == [{"optimizer.lr": "0.001"}, ({"loss": 2.5, "skipped": 0.0}, 1), "finish"]
    assert json.dumps(calls[0])
