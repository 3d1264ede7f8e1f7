"""Every option changes something that can be seen, or is refused.

One row for each leaf of the configuration tree; `test_every_option_has_a_row` walks the tree, so that a
new option without a row fails. Most rows say: under this value that observable differs, and differs
not when nothing is changed. Runs are real, tiny and in this process.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed import HashStore

import sixfold
import sixfold.cli.train
from sixfold.base.errors import CheckpointError, ConfigError, DataError, ModelError, PlanError
from sixfold.checkpoint import Content, open_checkpoint
from sixfold.checkpoint.files import Files
from sixfold.config import LayoutConfig, Resolved, describe, load
from sixfold.config.schema import nested
from sixfold.data.corpus import prepare
from sixfold.engine import watch
from sixfold.engine.costs import cut_by_measure
from sixfold.launch import current_session
from sixfold.mesh import Host, Mesh, Streams
from sixfold.models.decoder import Decoder, DecoderConfig
from sixfold.monitor.journal import read_records
from sixfold.monitor.meters import Meter
from sixfold.parallel import ModelCut, decide_axes
from sixfold.pipeline import LossForm
from sixfold.plan import decide_batch, decide_geometry, decide_residency, programs_for
from sixfold.train import loop
from sixfold.train import run as runs
from sixfold.train.job import RECIPE, Request
from sixfold.train.samples import samples_of
from sixfold.train.subject import build_model
from tests.one import lab
from tests.ranks import plain, towers

VOCABULARY = 300


@dataclass
class Run:
    """What a finished run leaves."""

    folder: Path
    out: str

    @property
    def records(self) -> list[dict[str, Any]]:
        return [record for record in read_records(self.folder / "metrics.jsonl") if "loss" in record]

    def column(self, name: str) -> list[Any]:
        return [record[name] for record in self.records]

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())

    @property
    def config(self) -> str:
        return (self.folder / "config.toml").read_text()


@dataclass
class Lab:
    """Makes what a row looks at, from the tiny settings and the row's own."""

    folder: Path
    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch
    num_runs: int = field(default=0)

    def in_folder(self, folder: Path) -> Lab:
        """The same in another folder, with the same corpus."""
        folder.mkdir()
        for name in ("text", "cache"):
            (folder / name).symlink_to((self.folder / name).resolve())
        return replace(self, folder=folder, num_runs=0)

    def values(self, changes: dict[str, Any]) -> dict[str, Any]:
        values = {**lab.settings(self.folder), **changes}
        return {path: value for path, value in values.items() if value is not None}

    def resolved(self, changes: dict[str, Any]) -> Resolved:
        plain = {
            path: str(value) if isinstance(value, Path) else value
            for path, value in self.values(changes).items()
        }
        return load(values=nested(plain), recipe=RECIPE)

    def engine(self, changes: dict[str, Any]) -> sixfold.Engine:
        resolved = self.resolved(changes)
        module = build_model(resolved.config, VOCABULARY)
        engine = sixfold.initialize(module, config=resolved)
        engine.learning_rate = engine.learning_rate.ending_at(4)
        return engine

    def run(self, changes: dict[str, Any]) -> Run:
        self.num_runs += 1
        folder = self.folder / f"run-{self.num_runs}"
        file = lab.write_config(self.folder / f"{folder.name}.toml", self.values(changes))
        self.capsys.readouterr()
        loop.train(Request(config=file, into=folder), current_session())
        return Run(folder, self.capsys.readouterr().out)

    def launched(self, changes: dict[str, Any]) -> dict[str, Any]:
        """What the launcher of `sixfold train` asks for, without ranks being started."""
        asked: dict[str, Any] = {}

        def pretend(command: list[str], **options: Any) -> int:
            asked.update(options, command=command)
            return 0

        self.monkeypatch.setattr(sixfold.cli.train, "launch", pretend)
        self.monkeypatch.delenv("RANK", raising=False)
        file = lab.write_config(self.folder / "launch.toml", self.values(changes))
        assert sixfold.cli.train.run_train(Request(config=file), dry_run=False) == 0
        return asked


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    lab.write_corpus(folder / "text")
    (folder / "cache").mkdir()
    return folder


@pytest.fixture
def bench(
    shared_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Lab]:
    """A lab whose corpus is shared by all rows; compute threads are put back."""
    threads = torch.get_num_threads()
    yield Lab(shared_folder, capsys, monkeypatch).in_folder(tmp_path / "bench")
    torch.set_num_threads(threads)


# What is looked at. Each takes the lab and the changed settings, and returns something comparable.

Observable = Callable[[Lab, dict[str, Any]], Any]


def tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (6, 33), generator=torch.Generator().manual_seed(1))


def shapes(bench: Lab, changes: dict[str, Any]) -> Any:
    return {name: tuple(p.shape) for name, p in bench.engine(changes).module.named_parameters()}


def first_loss(bench: Lab, changes: dict[str, Any]) -> Any:
    return bench.engine(changes).train_step({"tokens": tokens()})


def learned(bench: Lab, changes: dict[str, Any]) -> Any:
    """All parameters after three updates, exactly."""
    engine = bench.engine(changes)
    for _ in range(3):
        engine.train_step({"tokens": tokens()})
    return [tensor.double().flatten().tolist() for tensor in engine.full_state_dict().values()]


def shown_types(bench: Lab, changes: dict[str, Any]) -> Any:
    engine = bench.engine(changes)
    engine.save(bench.folder / "shown")
    saved = open_checkpoint(bench.folder / "shown")
    written = saved.load_model(
        {name: (tuple(t.shape), t.dtype) for name, t in engine.full_state_dict().items()}
    )
    return [str(tensor.dtype) for tensor in dict(written).values()]


def num_forwards(bench: Lab, changes: dict[str, Any]) -> Any:
    engine = bench.engine(changes)
    calls: list[int] = []
    handle = engine.module.register_forward_hook(lambda *_: calls.append(1))
    engine.train_step({"tokens": tokens()})
    handle.remove()
    return len(calls)


def corpus(bench: Lab, changes: dict[str, Any]) -> Any:
    found = prepare(bench.resolved(changes).config.data)
    part = found.record.parts[0]
    return found.vocab_size, part.held_out_names, part.num_train_bytes, str(found.folder.resolve())


@functools.cache
def column(name: str) -> Observable:
    return lambda bench, changes: bench.run(changes).column(name)


def launcher(name: str) -> Observable:
    return lambda bench, changes: bench.launched(changes)[name]


def averaged(bench: Lab, changes: dict[str, Any]) -> Any:
    engine = bench.engine(changes)
    engine.train_step({"tokens": tokens()})
    return [tensor.flatten().tolist() for tensor in engine.ema_state_dict().values()]


FP16 = {"precision.compute": "fp16"}


def loss_scales(bench: Lab, changes: dict[str, Any]) -> Any:
    engine, scales = bench.engine(changes), []
    for _ in range(2):
        engine.train_step({"tokens": tokens()})
        assert engine.last is not None
        scales.append(engine.last.loss_scale)
    return scales


EXPERTS = {"model.num_experts": 4}

# Rows of the first kind: (other settings of the row, the option's value, what differs).

DIFFERS: dict[str, tuple[dict[str, Any], Any, Observable]] = {
    "seed": ({}, 1, learned),
    "model.width": ({}, 64, shapes),
    "model.num_layers": ({}, 3, shapes),
    "model.num_heads": ({}, 4, first_loss),
    "model.num_kv_heads": ({}, 2, shapes),
    "model.ffn_width": ({}, 48, shapes),
    "model.rope_base": ({}, 100.0, first_loss),
    "model.tie_embeddings": ({}, False, shapes),
    "model.dropout": ({}, 0.5, first_loss),
    "model.num_experts": ({}, 4, shapes),
    "model.expert_choices": (EXPERTS, 1, first_loss),
    "model.shared_experts": (EXPERTS, 1, shapes),
    "model.expert_capacity": (EXPERTS, 0.5, first_loss),
    "model.balance": (EXPERTS, "bias", learned),
    "model.balance_rate": ({**EXPERTS, "model.balance": "loss"}, 3.0, learned),
    "model.router_z": (EXPERTS, 0.5, learned),
    "data.include": ({}, ["*.py"], corpus),
    "data.max_mb": ({}, 0.01, corpus),
    "data.vocab_size": ({}, 280, corpus),
    "data.held_out_documents": ({}, 9, corpus),
    "model.hf": ({"model.hf": "one"}, "other", lambda bench, changes: hf_shapes(bench, changes)),
    "model.lora_rank": ({}, 3, shapes),
    "model.lora_alpha": ({"model.lora_rank": 2}, 9.0, learned),
    "model.lora_targets": ({"model.lora_rank": 2}, ["o_proj"], shapes),
    "data.tokenizer": ({"data.vocab_size": None}, "bytes", corpus),
    "data.weights": (
        {"data.path": None, "data.sources": ["text", "rows.jsonl"]},
        [1.0, 50.0],
        lambda b, c: drawn(b, c),
    ),
    "data.documents": ({"train.steps": 1}, "separate", column("loss")),
    "data.sequence_length": ({}, 16, column("tokens")),
    "batch.global": ({}, 3, column("samples")),
    "batch.tokens": ({"batch.global": None}, 32, lambda bench, changes: batch_text(bench, changes)),
    "batch.micro": ({}, 2, num_forwards),
    "precision.compute": ({}, "bf16", first_loss),
    "precision.storage": ({}, "bf16", shown_types),
    "precision.grad": ({}, "bf16", learned),
    "precision.reduce": ({}, "bf16", learned),
    "precision.master": ({"precision.compute": "bf16"}, "bf16", learned),
    "precision.loss_scale": (FP16, 0.125, loss_scales),
    "precision.initial_scale": (FP16, 2.0**6, loss_scales),
    "precision.growth_steps": ({**FP16, "precision.initial_scale": 8.0}, 1, loss_scales),
    "optimizer.name": ({}, "adagrad", learned),
    "optimizer.lr": ({}, 1e-4, learned),
    "optimizer.betas": ({}, [0.5, 0.9], learned),
    "optimizer.eps": ({}, 1e-2, learned),
    "optimizer.momentum": ({"optimizer.name": "sgd"}, 0.9, learned),
    "optimizer.weight_decay": ({}, 0.9, learned),
    "optimizer.ema_decay": ({"optimizer.ema_decay": 0.9}, 0.5, averaged),
    "optimizer.clip_norm": ({"optimizer.name": "sgd"}, 1e-3, learned),
    "lr_schedule.name": ({"train.steps": 6}, "cosine", column("lr")),
    "lr_schedule.warmup_steps": ({}, 3, column("lr")),
    "lr_schedule.final_ratio": ({}, 0.5, column("lr")),
    "train.steps": ({}, 2, column("step")),
    "train.folder": ({}, "elsewhere", lambda bench, changes: folder_of_launch(bench, changes)),
    "checkpoint.every": ({}, 3, lambda bench, changes: bench.run(changes).checkpoints),
    "checkpoint.keep_last": ({"checkpoint.every": 1}, 3, lambda b, changes: b.run(changes).checkpoints),
    "checkpoint.keep_every": (
        {"checkpoint.every": 1, "checkpoint.keep_last": 1},
        2,
        lambda b, changes: b.run(changes).checkpoints,
    ),
    "layout.zero": ({}, 2, lambda bench, changes: residency_text(bench, changes)),
    "layout.parameters": ({"layout.zero": 3}, "whole", lambda bench, changes: residency_text(bench, changes)),
    "layout.reduce": ({}, "each", lambda bench, changes: residency_text(bench, changes)),
    "layout.gradients": ({"layout.zero": 2}, "whole", lambda bench, changes: residency_text(bench, changes)),
    "layout.optimizer": ({"layout.zero": 1}, "all", lambda bench, changes: residency_text(bench, changes)),
    "layout.blocks": (
        {"layout.zero": 3},
        ["*.mlp"],
        lambda bench, changes: [unit.blocks for unit in bench.engine(changes).plan.units],
    ),
    "layout.prefetch_mb": ({"layout.zero": 3}, 0.0, lambda bench, changes: gathered(bench, changes)),
    "layout.shard": ({"layout.zero": 2}, 1, lambda bench, changes: group_size(bench, changes)),
    "layout.pipe": ({}, 3, lambda bench, changes: stages_text(bench, changes)),
    "layout.schedule": ({"layout.pipe": 2}, "gpipe", lambda bench, changes: programs(bench, changes)),
    "layout.virtual_stages": (
        {"layout.pipe": 2, "layout.schedule": "breadth-first"},
        2,
        lambda bench, changes: stages_text(bench, changes),
    ),
    "layout.cost": ({"layout.pipe": 2}, "measured", lambda bench, changes: stage_costs(bench, changes)),
    "layout.balance": ({"layout.pipe": 2}, [1, 5], lambda bench, changes: stages_text(bench, changes)),
    "layout.tensor": ({}, 2, lambda bench, changes: pieces(bench, changes)),
    "layout.tensor_rules": (
        {"layout.tensor": 2},
        ["model.layers.*.mlp.up_proj = colwise", "model.layers.*.mlp.gate_proj = colwise"],
        lambda bench, changes: pieces(bench, changes),
    ),
    "layout.context": ({}, 2, lambda bench, changes: ranks_along(bench, changes)),
    "layout.sequence_parallel": ({"layout.tensor": 2}, True, lambda bench, changes: pieces(bench, changes)),
    "layout.recompute": ({}, "full", lambda bench, changes: num_runs(bench, changes)),
    "layout.expert": (
        EXPERTS,
        2,
        lambda bench, changes: str(decide_geometry(bench.resolved(changes).config.layout, 2)),
    ),
    "layout.loss_chunk": ({}, 7, lambda bench, changes: rows_of_scores(bench, changes)),
    "layout.compile": ({}, "eager", lambda bench, changes: own_code_runs(bench, changes)),
    "monitor.every": ({}, 2, column("step")),
    "monitor.sinks": ({}, ["prometheus"], lambda bench, changes: files_left(bench, changes)),
    "train.loss": ({}, "tests.one.test_option_effects:own_loss", column("loss")),
    "train.callbacks": (
        {},
        ["tests.one.test_option_effects:Habit"],
        lambda b, changes: files_left(b, changes),
    ),
    "launch.ranks": ({}, 3, launcher("ranks")),
    "launch.threads": ({}, 7, launcher("threads")),
}


def rows_of_scores(bench: Lab, changes: dict[str, Any]) -> Any:
    """Of how many tokens scores are computed together."""
    engine, rows = bench.engine(changes), []
    head = engine.module.head
    engine.module.head = lambda hidden: rows.append(len(hidden)) or head(hidden)
    engine.train_step({"tokens": tokens()})
    return sorted(set(rows))


def hf_shapes(bench: Lab, changes: dict[str, Any]) -> Any:
    """Of a model described by a file, of which there are two."""
    for name, width in (("one", 32), ("other", 64)):
        (bench.folder / name).mkdir(exist_ok=True)
        sizes = {
            "hidden_size": width,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "vocab_size": VOCABULARY,
        }
        described = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 2, **sizes}
        (bench.folder / name / "config.json").write_text(json.dumps(described))
    sizes = dict.fromkeys(f"model.{key}" for key in ("width", "num_layers", "num_heads", "num_kv_heads"))
    values = bench.values({**sizes, **changes, "model.hf": str(bench.folder / changes["model.hf"])})
    plain = {path: str(value) if isinstance(value, Path) else value for path, value in values.items()}
    module = build_model(load(values=nested(plain)).config, VOCABULARY)
    return [tuple(parameter.shape) for parameter in module.parameters()]


def own_loss(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(scores, targets, label_smoothing=0.5, reduction="sum")


class Habit:
    """A callback that leaves a file."""

    def __init__(self, run: Any) -> None:
        self.file = run.folder / "habit"

    def after_update(self, run: Any, record: Any) -> None:
        self.file.write_text(str(record.step))

    def at_end(self, run: Any, finished: bool) -> None:
        pass


def files_left(bench: Lab, changes: dict[str, Any]) -> list[str]:
    return sorted(path.name for path in bench.run(changes).folder.iterdir())


def rows_file(bench: Lab, field: str = "text") -> Path:
    rows = [{field: f"value {number} in range {number}\n" * 9} for number in range(40)]
    file = bench.folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def drawn(bench: Lab, changes: dict[str, Any]) -> Any:
    """From which source the first samples come."""
    rows_file(bench)
    changes = {**changes, "data.sources": [str(bench.folder / name) for name in changes["data.sources"]]}
    config = bench.resolved(changes).config
    return samples_of(config, prepare(config.data)).origins(np.arange(60))[0].tolist()


def batch_text(bench: Lab, changes: dict[str, Any]) -> str:
    config = bench.resolved({"batch.tokens": 96, **changes}).config
    return str(decide_batch(config.batch, data_ranks=2, sequence_length=config.data.sequence_length))


def residency_text(bench: Lab, changes: dict[str, Any]) -> str:
    return str(decide_residency(bench.resolved(changes).config.layout))


def stages_text(bench: Lab, changes: dict[str, Any]) -> str:
    """Where a model of six layers is cut."""
    config = DecoderConfig.derive(vocab_size=8, context_length=4, width=8, num_layers=6, num_heads=1)
    with torch.device("meta"):
        model = Decoder(config)
    return str(ModelCut.decide(model, bench.resolved(changes).config.layout).plan)


def ranks_along(bench: Lab, changes: dict[str, Any]) -> str:
    """How two ranks stand along the axes."""
    return str(decide_geometry(bench.resolved(changes).config.layout, 2))


def pieces(bench: Lab, changes: dict[str, Any]) -> str:
    """What the first rank has of a model."""
    config = DecoderConfig.derive(vocab_size=8, context_length=4, width=8, num_layers=2, num_heads=2)
    with torch.device("meta"):
        model = Decoder(config)
    layout = bench.resolved(changes).config.layout
    geometry = decide_geometry(layout, layout.tensor)
    return str(decide_axes(model, layout, geometry, 0, owns_loss=True).places)


def stage_costs(bench: Lab, changes: dict[str, Any]) -> tuple[float, ...]:
    """Of each stage of the lab's model, as rank 0 of a pipeline comes to them."""
    asked = bench.resolved(changes).config
    model = build_model(asked, VOCABULARY, device="cpu")
    mesh = Mesh(decide_geometry(LayoutConfig(), 1), 0, torch.device("cpu"))
    example = {"tokens": torch.zeros(2, 9, dtype=torch.int64)}
    streams, form = Streams(0, mesh.device), LossForm(model, None)
    cut = ModelCut.decide(model, asked.layout)
    cut = cut_by_measure(cut, model, asked, mesh, streams, form, example)
    assert cut.plan is not None
    return cut.plan.costs


def programs(bench: Lab, changes: dict[str, Any]) -> str:
    """What the first rank plays."""
    return str(programs_for(bench.resolved(changes).config.layout, "training", 4)[0])


def gathered(bench: Lab, changes: dict[str, Any]) -> list[tuple[str, str]]:
    """When units are gathered, used and dropped; the second update knows what comes next."""
    with plain.small_units():
        engine = bench.engine(changes)
    with towers.watched(engine) as seen:
        for _ in range(2):
            engine.train_step({"tokens": tokens()})
    return seen.events


def group_size(bench: Lab, changes: dict[str, Any]) -> int:
    return decide_geometry(bench.resolved(changes).config.layout, 2).shard


def num_runs(bench: Lab, changes: dict[str, Any]) -> int:
    """How often a part of the first block runs in one update."""
    engine = bench.engine(changes)
    calls: list[int] = []
    block: Any = engine.module.get_submodule("model.layers.0.mlp")
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    engine.train_step({"tokens": tokens()})
    return len(calls)


def own_code_runs(bench: Lab, changes: dict[str, Any]) -> bool:
    """Whether the lines of a block run as they are written, and not as a compiled graph."""
    engine = bench.engine(changes)
    seen: list[bool] = []
    part: Any = engine.module.get_submodule("model.layers.0.mlp")
    own = part.forward
    part.forward = lambda x: seen.append(torch.compiler.is_compiling()) or own(x)
    engine.train_step({"tokens": tokens()})
    return not any(seen)


def folder_of_launch(bench: Lab, changes: dict[str, Any]) -> str:
    changes = {path: bench.folder / value for path, value in changes.items()}
    return bench.launched(changes)["run_folder"].parent.name


_UNCHANGED: dict[tuple[Observable, str], Any] = {}


def unchanged(bench: Lab, around: dict[str, Any], observable: Observable) -> Any:
    """What all rows see that look so: twice the same, in two folders."""
    key = observable, repr(around)
    if key not in _UNCHANGED:
        folders = (bench.folder / name for name in ("first", "again"))
        first, again = (observable(bench.in_folder(folder), around) for folder in folders)
        assert first == again, "seen without any change: this row proves nothing"
        _UNCHANGED[key] = first
    return _UNCHANGED[key]


@pytest.mark.parametrize("path", DIFFERS)
def test_differs(path: str, bench: Lab) -> None:
    around, value, observable = DIFFERS[path]
    assert observable(bench, {**around, path: value}) != unchanged(bench, around, observable)


# Rows of the second kind: this version cannot do it and says so before anything starts.

REFUSED: dict[str, tuple[int, dict[str, Any]]] = {
    "layout.data": (2, {"layout.data": 3}),
}


@pytest.mark.parametrize("path", REFUSED)
def test_refused(path: str, bench: Lab) -> None:
    ranks, changes = REFUSED[path]

    def decided(changes: dict[str, Any]) -> None:
        layout = bench.resolved(changes).config.layout
        decide_residency(layout)
        decide_geometry(layout, ranks)

    decided({})
    with pytest.raises((ConfigError, PlanError), match=path):
        decided(changes)


# Rows of the third kind, which need words of their own.


def prompt(bench: Lab) -> None:
    assert "\nsample\nclass value" in bench.run({"train.prompt": "class value"}).out


def sample_tokens(bench: Lab) -> None:
    assert "\nsample\n" in bench.run({}).out
    assert "\nsample\n" not in bench.run({"train.sample_tokens": 0}).out


def eval_every(bench: Lab) -> None:
    assert bench.run({}).out.count("held-out bits per byte") == 1
    often = bench.run({"train.eval_every": 1})
    assert [f"update {step}: held-out bits per byte" in often.out for step in range(1, 5)] == [1, 1, 1, 0]


def minutes(bench: Lab) -> None:
    """The time becomes a number of updates, which is written down with its reason."""
    bench.monkeypatch.setattr(loop, "_seconds_per_update", lambda run: 60.0)
    bench.monkeypatch.setattr(loop, "Meter", functools.partial(Meter, clock=count(step=60.0).__next__))
    written: list[Path] = []
    plain = runs.write_config
    bench.monkeypatch.setattr(
        runs, "write_config", lambda folder, now: (written.append(folder), plain(folder, now))
    )
    counted = bench.run({"train.steps": None, "train.minutes": 3})
    assert counted.column("step") == [1, 2, 3]
    assert len(written) == 1, "a length that holds is not written again"
    assert "decided: 3 minutes at 60.000 s an update, as rehearsed" in counted.config
    assert "displaced by train.steps" in counted.config
    bench.monkeypatch.setattr(loop, "Meter", Meter)
    bench.monkeypatch.setattr(loop, "_seconds_per_update", lambda run: 1e-6)
    measured = bench.run({"train.steps": None, "train.minutes": 1e-4})
    assert measured.column("step") == [1, 2, 3, 4, 5]
    assert "decided: 0.0001 minutes at " in measured.config
    assert "an update, as measured by update 4" in measured.config


def path(bench: Lab) -> None:
    other = lab.write_corpus(bench.folder / "other", num_files=20)
    assert corpus(bench, {"data.path": other}) != corpus(bench, {})


def sources(bench: Lab) -> None:
    several = {"data.path": None, "data.sources": [str(bench.folder / "text"), str(rows_file(bench))]}
    found = prepare(bench.resolved(several).config.data)
    assert [part.record.name for part in found.parts] == ["text", "rows.jsonl"]


def weights(bench: Lab) -> None:
    """A run starts where another one ended."""
    first = bench.run({"optimizer.lr": 1e-2})
    newest = str(first.folder / "checkpoints" / first.checkpoints[-1])
    small = {
        "optimizer.lr": 1e-9,
        "train.steps": 1,
        "lr_schedule.warmup_steps": 0,
        "lr_schedule.name": "constant",
    }
    assert (
        bench.run({**small, "model.weights": newest}).column("loss")[0]
        < bench.run(small).column("loss")[0] - 0.1
    )


def lora_from(bench: Lab) -> None:
    first = bench.run({"model.lora_rank": 2, "optimizer.lr": 1e-2})
    module = build_model(
        bench.resolved({"model.lora_from": str(first.folder / "adapter")}).config, VOCABULARY
    )
    factors = [p for name, p in module.named_parameters() if "lora_B" in name]
    assert len(factors) == 4
    assert all(bool(factor.any()) for factor in factors), "fresh ones are zero"


def text_field(bench: Lab) -> None:
    config = bench.resolved({"data.path": rows_file(bench, "content"), "data.text_field": "content"}).config
    assert prepare(config.data).record.parts[0].num_train_documents == 36
    with pytest.raises(DataError, match="no text under 'text'"):
        prepare(bench.resolved({"data.path": bench.folder / "rows.jsonl"}).config.data)


def cache(bench: Lab) -> None:
    elsewhere = bench.folder / "another cache"
    assert Path(corpus(bench, {"data.cache": elsewhere})[-1]).is_relative_to(elsewhere.resolve())


def batch_stats(bench: Lab) -> None:
    def engine(**model: str) -> sixfold.Engine:
        module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        return sixfold.initialize(module, config={"batch": {"micro": 2}, "model": model})

    with pytest.raises(ModelError, match="batch statistics"):
        engine()
    assert engine(batch_stats="micro").data_ranks == 1


def asynchronous(bench: Lab) -> None:
    """The state is copied where training goes on meanwhile, and only there."""
    copied: list[int] = []
    plain = Content.snapshot

    def snapshot(content: Content) -> Content:
        copied.append(int(content.state["step"]))  # type: ignore[call-overload]
        return plain(content)

    bench.monkeypatch.setattr(Content, "snapshot", snapshot)
    saves = {"checkpoint.every": 2, "checkpoint.keep_last": 9}
    found = bench.run(saves).checkpoints
    assert not copied
    assert bench.run({**saves, "checkpoint.asynchronous": True}).checkpoints == found
    assert len(copied) == len(found) > 1


def when_busy(bench: Lab) -> None:
    gate = threading.Event()
    plain = Files.make_folder

    def make_folder(files: Files, folder: Path) -> None:
        assert gate.wait(10)
        plain(files, folder)

    bench.monkeypatch.setattr(Files, "make_folder", make_folder)
    engine = sixfold.initialize(nn.Linear(2, 2), config={"checkpoint": {"when_busy": "refuse"}})
    engine.save(bench.folder / "one", wait=False)
    with pytest.raises(CheckpointError, match=r"checkpoint\.when_busy"):
        engine.save(bench.folder / "two", wait=False)
    gate.set()
    engine.close()
    assert (bench.folder / "one").exists()
    patient = sixfold.initialize(nn.Linear(2, 2), config={})
    patient.save(bench.folder / "three", wait=False)
    patient.save(bench.folder / "four", wait=False)
    assert (bench.folder / "three").exists()
    patient.close()


def peak_tflops(bench: Lab) -> None:
    """mfu x peak = operations a second, which `tokens_per_s` knows too."""
    ratios = []
    for peak in (1.0, 10.0):
        records = bench.run({"monitor.peak_tflops": peak}).records
        ratios.append(records[-1]["mfu"] / records[-1]["tokens_per_s"])
    assert ratios[0] == pytest.approx(10 * ratios[1], rel=1e-6)
    assert bench.run({"monitor.peak_tflops": None}).records[-1]["mfu"] > 0


def _patience(bench: Lab, options: dict[str, object]) -> dict[str, float]:
    """Seconds that ranks wait for each other: by phase, until all have met, and in the backend."""
    told: dict[str, Any] = {}

    def watcher(*_: object, **asked: Any) -> SimpleNamespace:
        told.update(asked["timeouts"])
        return SimpleNamespace(close=lambda *_: None)

    def meet(*_: object, timeout: timedelta) -> Iterator[tuple[HashStore]]:
        told["meet"] = timeout.total_seconds()
        yield (HashStore(),)

    def form(**asked: Any) -> None:
        told["backend"] = asked["timeout"].total_seconds()

    bench.monkeypatch.setattr("sixfold.engine.watch.Watcher", watcher)
    bench.monkeypatch.setattr("sixfold.engine.watch._store", lambda address: HashStore())
    bench.monkeypatch.setattr("sixfold.mesh.backend.rendezvous", meet)
    bench.monkeypatch.setattr("torch.distributed.init_process_group", form)
    asked = bench.resolved(options).config
    mesh = watch.meet(decide_geometry(asked.layout, 2), torch.device("cpu"), 0, "localhost:1", asked.launch)
    watch.watch(mesh, "localhost:1", asked.launch)()
    return told


def timeout_s(bench: Lab) -> None:
    told = _patience(bench, {"launch.timeout_s": 12.5})
    assert told == {**_patience(bench, {}), "step": 12.5}
    assert _patience(bench, {"launch.timeout_s": 5000.0})["backend"] > 5000


def start_timeout_s(bench: Lab) -> None:
    told = _patience(bench, {"launch.start_timeout_s": 34.5})
    assert told == {**_patience(bench, {}), "start": 34.5, "meet": 34.5}


def save_timeout_s(bench: Lab) -> None:
    told = _patience(bench, {"launch.save_timeout_s": 56.5})
    before = _patience(bench, {})
    assert told == {**before, "save": 56.5, "load": 56.5, "backend": told["backend"]}
    assert max(told.values()) == told["backend"] < before["backend"]


def transport(bench: Lab) -> None:
    """Two ranks of one host, both told by this process: shared, not shared, or refused where they cannot."""

    def form(asked: str | None, device: str = "cpu") -> Host | None:
        config = bench.resolved({"layout.transport": asked}).config
        options: dict[str, Any] = {"needed": 0, "neighbours": [[0, 1]], "timeout_s": 1.0}
        place = torch.device(device)
        return Host.form(config.layout.transport, 0, place, lambda text: [text, text], **options)

    assert form(None) is not None
    assert form("host") is not None
    assert form("network") is None
    assert form(None, "meta") is None
    with pytest.raises(PlanError, match=r'layout\.transport = "host": rank 0 computes on meta'):
        form("host", "meta")


SPECIAL: dict[str, Callable[[Lab], None]] = {
    "model.batch_stats": batch_stats,
    "data.path": path,
    "model.weights": weights,
    "model.lora_from": lora_from,
    "data.cache": cache,
    "data.sources": sources,
    "data.text_field": text_field,
    "train.minutes": minutes,
    "train.eval_every": eval_every,
    "train.prompt": prompt,
    "train.sample_tokens": sample_tokens,
    "checkpoint.asynchronous": asynchronous,
    "checkpoint.when_busy": when_busy,
    "monitor.peak_tflops": peak_tflops,
    "launch.timeout_s": timeout_s,
    "launch.start_timeout_s": start_timeout_s,
    "launch.save_timeout_s": save_timeout_s,
    "layout.transport": transport,
}


@pytest.mark.parametrize("path", SPECIAL)
def test_special(path: str, bench: Lab) -> None:
    SPECIAL[path](bench)


def test_every_option_has_a_row() -> None:
    rows = [*DIFFERS, *REFUSED, *SPECIAL]
    assert sorted(rows) == sorted(path for path, *_ in describe())


def test_a_run_says_what_compiling_brought(bench: Lab) -> None:
    out = bench.run({"layout.compile": "eager", "train.steps": 1}).out
    assert re.search(r"compile     blocks by eager: \d+\.\d+ s an update, \d+\.\d+ s as written", out)
    assert "compile     " not in bench.run({"train.steps": 1}).out


def test_threads_of_a_rank_are_those_asked_for(bench: Lab) -> None:
    run = bench.run({"launch.threads": 3})
    assert torch.get_num_threads() == 3
    assert "threads = 3" in run.config


def test_a_run_says_which_updates_it_skipped(bench: Lab) -> None:
    run = bench.run({**FP16, "precision.initial_scale": 2.0**40})
    assert run.column("skipped") == [True] * 4
    assert run.column("loss_scale") == [2.0**power for power in (40, 39, 38, 37)]
    assert "skipped at scale" in run.out
    assert bench.run({}).column("loss_scale") == [None] * 4
