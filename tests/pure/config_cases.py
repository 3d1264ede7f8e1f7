"""A full legal configuration and ways to spoil it, for the test of mutated configurations.

`mutants` draws spoilt configurations from a seed, each with what its error must name. It writes the
three formats by itself, so that the line of every key is known without the code under test.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

FULL: dict[str, dict[str, object]] = {
    "": {"seed": 7},
    "model": {
        "width": 96,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_width": 128,
        "rope_base": 500.0,
        "tie_embeddings": False,
        "dropout": 0.1,
        "weights": "start",
        "lora_rank": 4,
        "lora_alpha": 8.0,
        "lora_targets": ["o_proj"],
        "num_experts": 4,
        "expert_choices": 2,
        "shared_experts": 1,
        "expert_capacity": 1.5,
        "balance": "loss",
        "balance_rate": 0.1,
        "router_z": 0.001,
        "batch_stats": "micro",
    },
    "data": {
        "path": "texts",
        "weights": [3.0, 1.0],
        "include": ["*.py", "*.md"],
        "text_field": "content",
        "tokenizer": "bpe",
        "documents": "separate",
        "max_mb": 3.5,
        "vocab_size": 512,
        "sequence_length": 64,
        "held_out_documents": 5,
        "cache": "cached",
    },
    "batch": {"global": 32, "micro": 4},
    "layout": {
        "data": 4,
        "zero": 3,
        "shard": 2,
        "parameters": "group",
        "gradients": "all",
        "optimizer": "all",
        "blocks": ["layers.*"],
        "prefetch_mb": 16.0,
        "tensor": 2,
        "tensor_rules": ["fc1 = colwise"],
        "sequence_parallel": False,
        "pipe": 3,
        "schedule": "interleaved",
        "virtual_stages": 2,
        "balance": [1, 2, 3, 3, 2, 1],
        "context": 1,
        "expert": 2,
        "loss_chunk": 512,
        "recompute": "selective",
        "compile": "inductor",
        "transport": "host",
    },
    "precision": {
        "compute": "bf16",
        "storage": "bf16",
        "grad": "fp32",
        "reduce": "fp32",
        "master": "fp64",
    },
    "optimizer": {
        "name": "adamw",
        "lr": 0.0003,
        "betas": [0.9, 0.95],
        "eps": 1e-7,
        "weight_decay": 0.1,
        "clip_norm": 1,
        "ema_decay": 0.99,
    },
    "lr_schedule": {"name": "cosine", "warmup_steps": 10, "final_ratio": 0.1},
    "train": {
        "steps": 300,
        "eval_every": 50,
        "prompt": "class ",
        "sample_tokens": 16,
        "folder": "out",
        "loss": "mine:loss",
        "callbacks": ["mine:Habit"],
    },
    "checkpoint": {
        "every": 100,
        "keep_last": 3,
        "keep_every": 1000,
        "asynchronous": True,
        "when_busy": "refuse",
    },
    "monitor": {"every": 2, "sinks": ["tensorboard"], "peak_tflops": 0.5},
    "launch": {
        "ranks": 2,
        "threads": 1,
        "timeout_s": 60.0,
        "start_timeout_s": 90.5,
        "save_timeout_s": 120.0,
    },
}

OPTIONAL = {
    "model.num_experts", "model.expert_choices", "model.shared_experts", "model.expert_capacity",
    "model.balance", "model.balance_rate", "model.router_z", "layout.loss_chunk",
    "data.tokenizer", "model.weights", "model.lora_rank", "model.lora_alpha", "model.lora_targets",
    "train.loss",
    "data.weights", "data.vocab_size",
    "model.num_kv_heads", "model.ffn_width", "model.batch_stats", "data.path", "data.max_mb", "data.cache",
    "batch.global", "batch.micro", "layout.data", "layout.zero", "layout.shard", "layout.recompute",
    "layout.parameters", "layout.gradients", "layout.optimizer", "layout.blocks", "layout.prefetch_mb",
    "layout.compile", "layout.transport", "layout.schedule", "layout.virtual_stages", "layout.balance",
    "layout.tensor_rules",
    "precision.compute", "precision.storage", "precision.grad", "precision.reduce", "precision.master",
    "optimizer.betas", "optimizer.eps", "optimizer.weight_decay", "optimizer.clip_norm",
    "optimizer.ema_decay", "train.steps", "train.eval_every", "checkpoint.every", "checkpoint.keep_every",
    "monitor.peak_tflops", "launch.ranks", "launch.threads",
}  # fmt: skip

WORDS = {
    "model.balance",
    "data.documents",
    "model.batch_stats", "layout.recompute", "layout.transport", "layout.schedule", "optimizer.name",
    "lr_schedule.name", "checkpoint.when_busy",
    *(f"layout.{kind}" for kind in ("parameters", "gradients", "optimizer")),
    *(f"precision.{kind}" for kind in ("compute", "storage", "grad", "reduce", "master")),
}  # fmt: skip

_COUNTS = (
    "model.num_experts", "model.expert_choices", "model.shared_experts",
    "model.width", "model.num_layers", "model.num_heads", "model.num_kv_heads", "model.ffn_width",
    "data.held_out_documents", "batch.global", "batch.micro", "layout.data", "layout.shard", "layout.tensor",
    "layout.pipe", "layout.virtual_stages", "layout.context", "layout.expert", "train.steps",
    "train.eval_every", "checkpoint.every", "checkpoint.keep_last", "checkpoint.keep_every", "monitor.every",
    "launch.ranks", "launch.threads",
)  # fmt: skip

OUT_OF_RANGE: dict[str, tuple[object, ...]] = {
    "seed": (-1, 2**63),
    "model.rope_base": (1.0, 0, -10.5),
    "model.dropout": (1.0, -0.1, 2),
    "data.max_mb": (0, -1.5),
    "model.lora_rank": (0, -1),
    "model.expert_capacity": (0.0, -1.0),
    "model.balance_rate": (0, -0.1),
    "model.router_z": (0, -0.5),
    "layout.loss_chunk": (-1,),
    "model.lora_alpha": (0, -2.0),
    "data.vocab_size": (256, 65_537, 0),
    "data.weights": ([0.0, 1.0], [-1.0], [2.0, -0.5]),
    "data.sequence_length": (1, 0, -64),
    "layout.zero": (4, -1),
    "layout.prefetch_mb": (-1.0,),
    "layout.balance": ([1, 2, 3, 3, 2, 0], [-1, 2, 3, 3, 2, 1]),
    "optimizer.lr": (0, 0.0, -1e-3),
    "optimizer.betas": ([0.9, 1.0], [-0.1, 0.9], [0.9], [0.9, 0.95, 0.99]),
    "optimizer.eps": (0.0, -1e-8),
    "optimizer.weight_decay": (-0.01,),
    "optimizer.clip_norm": (0, -1.0),
    "optimizer.ema_decay": (0.0, 1.0, -0.5),
    "lr_schedule.warmup_steps": (-1,),
    "lr_schedule.final_ratio": (1.5, -0.1),
    "train.sample_tokens": (-1,),
    "monitor.peak_tflops": (0, -2.0),
    "launch.timeout_s": (0, -1.0),
    "launch.start_timeout_s": (0.0, -30),
    "launch.save_timeout_s": (0, -0.5),
    **dict.fromkeys(_COUNTS, (0, -3)),
}

CONFLICTS: tuple[tuple[str, object, str], ...] = (
    ("data.tokenizer", "bytes", "data.vocab_size"),
    ("model.width", 100, "model.num_heads"),
    ("model.width", 4, "model.num_heads"),
    ("model.num_heads", 5, "model.width"),
    ("model.num_heads", 3, "model.num_kv_heads"),
    ("model.num_kv_heads", 3, "model.num_heads"),
    ("model.num_kv_heads", 8, "model.num_heads"),
    ("batch.micro", 33, "batch.global"),
    ("batch.global", 3, "batch.micro"),
    ("optimizer.name", "adagrad", "optimizer.betas"),
    ("optimizer.name", "sgd", "optimizer.eps"),
    ("lr_schedule.name", "constant", "lr_schedule.final_ratio"),
    ("precision.compute", "fp64", "precision.storage"),
    ("precision.master", "bf16", "precision.compute"),
    ("layout.parameters", "whole", "layout.prefetch_mb"),
    ("layout.shard", 3, "layout.data"),
    ("layout.pipe", 1, "layout.schedule"),
    ("layout.tensor", 1, "layout.tensor_rules"),
    ("layout.pipe", 2, "layout.balance"),
    ("layout.virtual_stages", 3, "layout.balance"),
    ("layout.schedule", "zero-bubble-v", "layout.compile"),
    ("layout.balance", [2, 2], "layout.pipe"),
    ("layout.expert", 3, "layout.data"),
    ("model.expert_choices", 5, "model.num_experts"),
    ("layout.data", 5, "layout.shard"),
)
"""(path, value, the other path the error must name). precision.master is tried under compute = "fp32"."""

ADDED: tuple[tuple[str, object, str], ...] = (
    ("batch.tokens", 2048, "batch.global"),
    ("train.minutes", 3, "train.steps"),
    ("data.sources", ["texts", "more.jsonl"], "data.path"),
    ("model.hf", "folder", "model.width"),
    ("layout.cost", "measured", "layout.balance"),
    ("model.lora_from", "adapter", "model.lora_rank"),
    ("optimizer.momentum", 0.9, "optimizer.name"),
    ("layout.reduce", "last", "layout.gradients"),
    ("precision.loss_scale", 1024.0, "precision.compute"),
    ("precision.initial_scale", 1024.0, "precision.compute"),
    ("precision.growth_steps", 100, "precision.compute"),
)
"""The same, for keys that FULL does not hold."""


@dataclass
class Row:
    """One `key = value` of a file being spoilt; `raw` stands for the value where it is no value."""

    section: str
    key: str
    value: object
    raw: str | None = None

    @property
    def path(self) -> str:
        return f"{self.section}.{self.key}".lstrip(".")


@dataclass(frozen=True)
class Mutant:
    """A spoilt file, with all that its error must say and where."""

    kind: str
    suffix: str
    text: str
    names: tuple[str, ...]
    line: int | None
    single: bool

    def __str__(self) -> str:
        return f"{self.kind}{self.suffix}"


def rows() -> list[Row]:
    return [Row(section, key, value) for section, keys in FULL.items() for key, value in keys.items()]


def dotted() -> dict[str, object]:
    return {row.path: row.value for row in rows()}


def render(rows: list[Row], suffix: str, noise: random.Random | None = None) -> tuple[str, dict[int, int]]:
    """The text of a file, and the line of each row by its place in `rows`.

    Rows of one section that are not neighbours open the section again. `noise` adds comments, blank
    lines and values over several lines, where the format has them.
    """
    writer = _Writer(suffix, noise)
    for number, row in enumerate(rows):
        writer.row(number, row, follows=number + 1 < len(rows) and rows[number + 1].section == row.section)
    return writer.finish(), writer.line_of


class _Writer:
    def __init__(self, suffix: str, noise: random.Random | None) -> None:
        self.suffix, self.noise = suffix, noise
        self.lines: list[str] = ["{"] if suffix == ".json" else []
        self.line_of: dict[int, int] = {}
        self.section = ""

    def row(self, number: int, row: Row, follows: bool) -> None:
        self._open(row.section)
        if self.noise and self.suffix != ".json" and self.noise.random() < 0.2:
            self.lines += ["", "# optimizer.lr = \"a comment with [brackets] and 'quotes'\""]
        value = row.raw if row.raw is not None else self._value(row.value)
        indent = "  " if row.section else ""
        self.line_of[number] = len(self.lines) + 1
        if self.suffix == ".toml":
            text = f"{row.key} = {value}"
        elif self.suffix == ".yaml":
            text = f"{indent}{row.key}: {value}"
        else:
            text = f'  {indent}"{row.key}": {value}' + ("," if follows or not row.section else "")
        self.lines += text.split("\n")

    def _value(self, value: object) -> str:
        text = json.dumps(value)
        if self.noise and isinstance(value, list) and self.noise.random() < 0.5:
            return text.replace("[", "[\n    ").replace(", ", ",\n    ").replace("]", "\n    ]")
        return text

    def _open(self, section: str) -> None:
        if section == self.section:
            return
        if self.suffix == ".json":
            self.lines += ["  },"] if self.section else []
            self.lines.append(f'  "{section}": {{')
        else:
            self.lines.append(f"[{section}]" if self.suffix == ".toml" else f"{section}:")
        self.section = section

    def finish(self) -> str:
        if self.suffix == ".json":
            self.lines += ["  }", "}"] if self.section else ["}"]
        return "\n".join(self.lines) + "\n"


def wrong_types(value: object) -> tuple[object, ...]:
    """Values of another type than the one a legal value has; nothing is converted but int to float."""
    if isinstance(value, bool):
        return (1, 0, "yes", "false", [True])
    if isinstance(value, int):
        return (str(value), True, value + 0.5, float(value), [value], {"a": 1})
    if isinstance(value, float):
        return (str(value), False, [value], {"a": 1})
    if isinstance(value, list):
        return (value[0], [value], [None], [True, False], 3)
    return (3, 1.5, True, [value], {"a": 1})


def misspell(word: str, draw: random.Random) -> str:
    """One letter dropped, doubled, replaced or swapped with the next."""
    at = draw.randrange(len(word))
    swapped = word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :]
    return draw.choice(
        [word[:at] + word[at + 1 :], word[: at + 1] + word[at:], word[:at] + "q" + word[at + 1 :], swapped]
    )


def mutants(count: int, seed: int) -> Iterator[Mutant]:
    """`count` spoilt files, every kind in turn in every format."""
    draw = random.Random(seed)
    kinds = [kind for kind in _KINDS for _ in range(_WEIGHTS.get(kind.__name__, 1))]
    made = 0
    while made < count:
        kind, suffix = kinds[made % len(kinds)], draw.choice([".toml", ".yaml", ".json"])
        mutant = kind(draw, suffix)
        if mutant is not None:
            made += 1
            yield mutant


def _made(
    kind: str, suffix: str, spoilt: list[Row], at: int | None, names: tuple[str, ...], draw: random.Random,
    single: bool = True,
) -> Mutant:  # fmt: skip
    text, lines = render(spoilt, suffix, draw)
    return Mutant(kind, suffix, text, names, None if at is None else lines[at], single)


def _misspelt_key(draw: random.Random, suffix: str) -> Mutant | None:
    spoilt = rows()
    at = draw.randrange(len(spoilt))
    row = spoilt[at]
    wrong = misspell(row.key, draw)
    known = {known for known in (*FULL[row.section], *FULL) if known}
    if wrong in known or not wrong:
        return None
    right, row.key = row.path, wrong
    # A key of three letters or less may be too far from everything: then the section's keys are listed.
    return _made("misspelt key", suffix, spoilt, at, (row.path, right.rpartition(".")[2]), draw)


def _misspelt_section(draw: random.Random, suffix: str) -> Mutant | None:
    spoilt = rows()
    section = draw.choice([name for name in FULL if name])
    wrong = misspell(section, draw)
    if wrong == section:
        return None
    first = next(number for number, row in enumerate(spoilt) if row.section == section)
    for row in spoilt:
        row.section = wrong if row.section == section else row.section
    text, lines = render(spoilt, suffix)
    return Mutant("misspelt section", suffix, text, (wrong, section), lines[first] - 1, True)


def _wrong_type(draw: random.Random, suffix: str) -> Mutant | None:
    spoilt = rows()
    at = draw.randrange(len(spoilt))
    row = spoilt[at]
    row.value = draw.choice(wrong_types(float(1) if row.path == "optimizer.clip_norm" else row.value))
    if suffix == ".toml" and isinstance(row.value, list) and None in row.value:
        return None
    if isinstance(row.value, dict):
        row.raw = {".toml": "{ a = 1 }", ".yaml": "{a: 1}", ".json": '{"a": 1}'}[suffix]
    return _made("wrong type", suffix, spoilt, at, (row.path,), draw)


def _null(draw: random.Random, suffix: str) -> Mutant | None:
    spoilt = rows()
    at = draw.randrange(len(spoilt))
    if suffix == ".toml" or spoilt[at].path in OPTIONAL:
        return None
    spoilt[at].value = None
    return _made("null", suffix, spoilt, at, (spoilt[at].path,), draw)


def _unknown_word(draw: random.Random, suffix: str) -> Mutant | None:
    spoilt = rows()
    at = draw.choice([number for number, row in enumerate(spoilt) if row.path in WORDS])
    right = str(spoilt[at].value)
    spoilt[at].value = draw.choice([misspell(right, draw), right.upper(), "auto", ""])
    if spoilt[at].value == right:
        return None
    return _made("unknown word", suffix, spoilt, at, (spoilt[at].path,), draw)


def _out_of_range(draw: random.Random, suffix: str) -> Mutant | None:
    spoilt = rows()
    at = draw.choice([number for number, row in enumerate(spoilt) if row.path in OUT_OF_RANGE])
    spoilt[at].value = draw.choice(OUT_OF_RANGE[spoilt[at].path])
    return _made("out of range", suffix, spoilt, at, (spoilt[at].path,), draw)


def _not_finite(draw: random.Random, suffix: str) -> Mutant | None:
    spoilt = rows()
    at = draw.choice([number for number, row in enumerate(spoilt) if isinstance(row.value, float)])
    spoilt[at].raw = {
        ".toml": draw.choice(["nan", "inf", "1e999"]),
        ".yaml": draw.choice([".nan", ".inf", "1e999"]),
        ".json": draw.choice(["NaN", "Infinity", "1e999"]),
    }[suffix]
    return _made("not finite", suffix, spoilt, at, (spoilt[at].path,), draw)


def _duplicate_key(draw: random.Random, suffix: str) -> Mutant | None:
    spoilt = rows()
    first = draw.randrange(len(spoilt))
    row = spoilt[first]
    last = max(number for number, each in enumerate(spoilt) if each.section == row.section)
    at = draw.randint(first + 1, last + 1)
    spoilt.insert(at, Row(row.section, row.key, row.value))
    text, lines = render(spoilt, suffix, draw)
    return Mutant("duplicate key", suffix, text, (row.path, f"{suffix}:{lines[first]}"), lines[at], True)


def _duplicate_section(draw: random.Random, suffix: str) -> Mutant | None:
    spoilt = rows()
    at = draw.choice([number for number, row in enumerate(spoilt) if row.section])
    section, moved = spoilt[at].section, spoilt.pop(at)
    if sum(row.section == section for row in spoilt) == 0 or spoilt[-1].section == section:
        return None
    spoilt.append(moved)
    text, lines = render(spoilt, suffix)
    return Mutant("duplicate section", suffix, text, (section,), lines[len(spoilt) - 1] - 1, True)


def _conflict(draw: random.Random, suffix: str) -> Mutant | None:
    spoilt = rows()
    path, value, other = draw.choice(CONFLICTS)
    by_path = {row.path: row for row in spoilt}
    by_path[path].value = value
    if path == "precision.master":
        by_path["precision.compute"].value = "fp32"
    at = spoilt.index(by_path[path])
    return _made("conflict", suffix, spoilt, at, (path, other), draw, single=False)


def _added(draw: random.Random, suffix: str) -> Mutant | None:
    spoilt = rows()
    path, value, other = draw.choice(ADDED)
    section, _, key = path.rpartition(".")
    at = draw.choice([number for number, row in enumerate(spoilt) if row.section == section])
    spoilt.insert(at, Row(section, key, value))
    return _made("excluded key", suffix, spoilt, at, (path, other), draw)


def _wrong_section(draw: random.Random, suffix: str) -> Mutant | None:
    spoilt = rows()
    at = draw.randrange(len(spoilt))
    row = spoilt[at]
    there = draw.choice([section for section in FULL if row.key not in FULL[section]])
    if row.path in ("lr_schedule.warmup_steps",) and there == "train":
        return None  # so near to train.steps that the suggestion is that one
    if not there and row.key in FULL:
        return None  # at the top it is the name of a section
    if row.path == "train.steps" and there == "optimizer":
        return None  # so near to optimizer.eps that nothing stands for the missing end of the schedule
    right, row.section = row.path, there
    spoilt.sort(key=lambda each: list(FULL).index(each.section))
    return _made("wrong section", suffix, spoilt, spoilt.index(row), (row.path, right), draw)


def _section_as_value(draw: random.Random, suffix: str) -> Mutant | None:
    section = draw.choice([name for name in FULL if name])
    spoilt = [row for row in rows() if row.section != section]
    spoilt.insert(0, Row("", section, draw.choice([3, "on", True, [1]])))
    return _made("section as value", suffix, spoilt, 0, (section,), draw)


def _syntax(draw: random.Random, suffix: str) -> Mutant | None:
    spoilt = rows()
    at = draw.choice([number for number, row in enumerate(spoilt) if row.section])
    spoilt[at].raw = {".toml": "= 3", ".yaml": "]", ".json": "3 3"}[suffix]
    text, lines = render(spoilt, suffix)
    return Mutant("syntax", suffix, text, (), lines[at], True)


_KINDS = (
    _misspelt_key, _misspelt_section, _wrong_type, _null, _unknown_word, _out_of_range, _not_finite,
    _duplicate_key, _duplicate_section, _conflict, _added, _wrong_section, _section_as_value, _syntax,
)  # fmt: skip
_WEIGHTS = {"_misspelt_key": 3, "_wrong_type": 4, "_out_of_range": 3, "_conflict": 2, "_wrong_section": 2}
