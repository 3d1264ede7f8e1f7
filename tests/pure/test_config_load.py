"""Layers, displacement, origins, the listing of problems, decisions, and the way back from TOML."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sixfold.base.errors import ConfigError
from sixfold.config import Config, OptimizerConfig, Resolved, TrainConfig, describe, load
from sixfold.config.schema import LEAVES, SECTIONS, flat, nearest
from tests.pure.config_cases import dotted


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text)
    return file


def refusal(**arguments: object) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(**arguments)  # type: ignore[arg-type]
    return caught.value


# Layers


def test_nothing_given_is_the_defaults() -> None:
    resolved = load()
    assert resolved.config == Config()
    assert set(resolved.origins) == set(LEAVES)
    assert set(resolved.origins.values()) == {"default"}


def test_higher_layers_win_and_origins_tell(tmp_path: Path) -> None:
    recipe = write(tmp_path, "recipe.toml", "seed = 1\n[optimizer]\nlr = 0.1\neps = 1e-6\nclip_norm = 1\n")
    file = write(tmp_path, "my.yaml", "seed: 2\noptimizer:\n  lr: 2e-1\n  eps: 2e-6\n")
    values = {"seed": 3, "optimizer": {"lr": 0.3}}
    resolved = load(file, recipe=recipe, values=values, overrides=["seed=4"])
    optimizer = resolved.config.optimizer
    assert (resolved.config.seed, optimizer.lr, optimizer.eps, optimizer.clip_norm) == (4, 0.3, 2e-6, 1.0)
    origins = [resolved.origins[path] for path in ("seed", "optimizer.lr", "optimizer.eps")]
    assert origins == ["--set", "values", f"{file}:4"]
    assert resolved.origins["optimizer.clip_norm"] == "recipe"
    assert resolved.origins["optimizer.betas"] == "default"


@pytest.mark.parametrize(
    ("low", "high", "kept", "lost"),
    [
        ({"batch.global": 32}, "batch.tokens=512", "batch.tokens", "batch.global"),
        ({"batch.tokens": 512}, "batch.global=32", "batch.global", "batch.tokens"),
        ({"train.steps": 9}, "train.minutes=2", "train.minutes", "train.steps"),
        ({"train.minutes": 2}, "train.steps=9", "train.steps", "train.minutes"),
        ({"optimizer.betas": [0.8, 0.9]}, "optimizer.name=sgd", "optimizer.name", "optimizer.betas"),
        (
            {"lr_schedule.name": "cosine", "train.steps": 9, "lr_schedule.final_ratio": 0.1},
            "lr_schedule.name=constant",
            "lr_schedule.name",
            "lr_schedule.final_ratio",
        ),
    ],
)
def test_a_higher_layer_displaces_what_it_contradicts(
    low: dict[str, object], high: str, kept: str, lost: str
) -> None:
    resolved = load(values=low, overrides=[high])
    values = flat(resolved.config)
    assert resolved.origins[kept] == "--set"
    assert values[lost] == LEAVES[lost].default
    assert f"from values, displaced by {kept} (--set)" in resolved.origins[lost]


def test_an_applicable_setting_survives_another_optimizer() -> None:
    resolved = load(values={"optimizer.eps": 1e-6}, overrides=["optimizer.name=adagrad"])
    assert resolved.config.optimizer.eps == 1e-6
    assert resolved.origins["optimizer.eps"] == "values"


@pytest.mark.parametrize(
    ("first", "second"), [("batch.global=8", "batch.tokens=512"), ("train.steps=8", "train.minutes=1")]
)
def test_exclusive_options_in_one_layer_name_both_places(first: str, second: str) -> None:
    error = refusal(overrides=[first, second])
    assert first.split("=")[0] in error.given
    assert second.split("=")[0] in error.given
    assert error.given.count("--set") == 2


def test_null_unsets_a_lower_layer(tmp_path: Path) -> None:
    file = write(tmp_path, "my.json", json.dumps({"optimizer": {"clip_norm": None}}))
    resolved = load(file, recipe=write(tmp_path, "r.toml", "optimizer.clip_norm = 1.0\n"))
    assert resolved.config.optimizer.clip_norm is None
    assert resolved.origins["optimizer.clip_norm"] == f"{file}:1"
    assert load(values={"batch.global": 4, "batch.tokens": None}).config.batch.global_ == 4


def test_an_empty_section_is_legal(tmp_path: Path) -> None:
    assert load(write(tmp_path, "a.yaml", "optimizer:\n  # lr: 1\nseed: 3\n")).config.seed == 3
    assert load(write(tmp_path, "a.toml", "[optimizer]\n")).config == Config()
    assert load(write(tmp_path, "b.yaml", "")).config == Config()


def test_explicitly_set_fields_of_a_config_count() -> None:
    built = Config(optimizer=OptimizerConfig(lr=0.5), train=TrainConfig(steps=3))
    resolved = load(values=built)
    assert resolved.config == built
    set_here = {path for path, origin in resolved.origins.items() if origin == "values"}
    assert set_here == {"optimizer.lr", "train.steps"}
    inside = load(values={"optimizer": OptimizerConfig(lr=0.5)})
    assert inside.origins["optimizer.lr"] == "values"
    assert inside.origins["optimizer.eps"] == "default"


def test_values_may_be_nested_dotted_or_both() -> None:
    values = {"optimizer": {"lr": 0.5}, "optimizer.eps": 1e-3, "batch.global": 8}
    assert (
        load(values=values).config
        == load(values={"optimizer": {"lr": 0.5, "eps": 1e-3}, "batch": {"global": 8}}).config
    )
    assert (
        "optimizer.lr is set twice" in refusal(values={"optimizer": {"lr": 0.5}, "optimizer.lr": 0.5}).given
    )


def test_values_of_another_kind_are_refused() -> None:
    assert "of type int" in refusal(values=3).given


# Overrides


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimizer.lr=1e-2", 1e-2),
        ("optimizer.lr=1", 1.0),
        ("optimizer.name=sgd", "sgd"),
        ('optimizer.name="sgd"', "sgd"),
        ("optimizer.betas=[0.5, 0.6]", (0.5, 0.6)),
        ("data.include=['*.c', '*.h']", ("*.c", "*.h")),
        ("data.path=/some/where else", Path("/some/where else")),
        ("train.prompt=def f(x=1): ", "def f(x=1): "),
        ("model.tie_embeddings=false", False),
        ("seed = 12", 12),
    ],
)
def test_override_values(text: str, expected: object) -> None:
    value = flat(load(overrides=[text]).config)[text.partition("=")[0].strip()]
    assert value == expected
    assert type(value) is type(expected) or isinstance(value, Path)


def test_overrides_that_are_refused() -> None:
    assert "--set seed" in refusal(overrides=["seed"]).given
    assert "PATH=VALUE" in refusal(overrides=["=3"]).rule
    assert "set twice: 1 (--set) and 1 (--set)" in refusal(overrides=["seed=1", "seed=1"]).given
    assert 'optimizer.lr = "fast" (--set)' in refusal(overrides=["optimizer.lr=fast"]).given
    error = refusal(overrides=["data.path=2024"])
    assert error.fix == 'set data.path = "2024"'
    load(overrides=[error.fix.removeprefix("set ")])
    error = refusal(overrides=["seed=1\nlaunch.ranks=2"])
    assert "seed" in error.given


def test_a_section_as_an_inline_table() -> None:
    assert load(overrides=["optimizer={lr = 1, eps = 2}"]).config.optimizer == OptimizerConfig(
        lr=1.0, eps=2.0
    )


# Files


def test_missing_file_names_near_ones(tmp_path: Path) -> None:
    write(tmp_path, "train.toml", "")
    write(tmp_path, "unlike.yaml", "")
    error = refusal(file=tmp_path / "trian.toml")
    assert str(tmp_path / "trian.toml") in error.given
    assert error.fix == f"use {tmp_path / 'train.toml'}"
    assert str(tmp_path / "none" / "x.toml") in refusal(file=tmp_path / "none" / "x.toml").given


def test_a_missing_file_is_not_mended_by_the_settings_of_a_python_project(tmp_path: Path) -> None:
    write(tmp_path, "pyproject.toml", "")
    missing = tmp_path / "project.toml"
    assert refusal(file=missing).fix == f"make {missing}, or leave it out for the defaults"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert ".ini" in refusal(file=write(tmp_path, "a.ini", "seed = 1")).given
    (tmp_path / "folder.toml").mkdir()
    assert "folder.toml is a folder" in refusal(file=tmp_path / "folder.toml").given
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b'seed = 1\n[train]\nprompt = "\xe9"\n')
    assert f"{latin}:3: byte 0xe9" in refusal(file=latin).given


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.toml", "seed = 1\n[train\nsteps = 1\n", 2),
        ("b.toml", 'seed = 1\n[train]\nprompt = "a\nsteps = 1\n', 3),
        ("c.toml", "seed = 1\n\n[train]\nsteps = 1 2\n", 4),
        ("d.toml", "optimizer = {lr = 1}\n[optimizer]\neps = 1\n", 2),
        ("e.toml", "[data]\ninclude = [\n  'a',\n", 2),
        ("a.yaml", "seed: 1\ntrain:\n  steps: [1\n", 4),
        ("b.yaml", "- 1\n- 2\n", 1),
        ("c.yaml", "seed: 1\ntrain: !!python/object:os.system\n", 2),
        ("d.yaml", "seed: 1\n---\nseed: 2\n", 2),
        ("e.yaml", "seed: 1\ntrain:\n\tsteps: 1\n", 3),
        ("a.json", '{"seed": 1,\n "train": {"steps": 1,}\n}', 2),
        ("b.json", "[1]", 1),
        ("c.json", "", 1),
        ("d.json", '{"seed": ' + "[" * 100_000, 1),
    ],
)
def test_syntax_errors_have_lines(tmp_path: Path, name: str, text: str, line: int) -> None:
    file = write(tmp_path, name, text)
    assert refusal(file=file).given.startswith(f"{file}:{line}: ")


def test_a_broken_file_hides_no_fault_of_other_layers_and_makes_none(tmp_path: Path) -> None:
    file = write(tmp_path, "a.toml", "seed = \n")
    error = refusal(file=file, overrides=["sed=1", "lr_schedule.name=cosine"])
    assert "2 problems" in error.given
    assert "sed = 1" in error.given
    assert "train.steps" not in str(error)


def test_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_bytes(
        b"\xef\xbb\xbfseed = 1\r\n[data]\r\ninclude = [\r\n'a',\r\n]\r\n[train]\r\nsteps = 5\r\n"
    )
    resolved = load(file)
    assert (resolved.config.seed, resolved.config.data.include) == (1, ("a",))
    assert resolved.origins["train.steps"] == f"{file}:7"


def test_toml_in_every_spelling_has_its_lines(tmp_path: Path) -> None:
    text = """batch.global = 4
"seed" = 0x10
optimizer = { lr = 1, eps = 2 }
[ train ] # hi
'prompt' = '''
a = 1
[data]
'''
"steps" = 3
"""
    file = write(tmp_path, "a.toml", text)
    resolved = load(file)
    assert resolved.config.train.prompt == "a = 1\n[data]\n"
    lines = {
        path: int(origin.rpartition(":")[2]) for path, origin in resolved.origins.items() if ":" in origin
    }
    assert lines == {
        "batch.global": 1, "seed": 2, "optimizer.lr": 3, "optimizer.eps": 3, "train.prompt": 5,
        "train.steps": 9,
    }  # fmt: skip


def test_json_strings_that_look_like_keys(tmp_path: Path) -> None:
    text = (
        '{\n"train": {"prompt":\n"\\"a\\": {",\n "steps"\n: 3},\n"data": {"include": ["x", ":"]},\n"seed": 1}'
    )
    file = write(tmp_path, "a.json", text)
    resolved = load(file)
    assert resolved.config.train.prompt == '"a": {'
    lines = {
        path: int(origin.rpartition(":")[2]) for path, origin in resolved.origins.items() if ":" in origin
    }
    assert lines == {"train.prompt": 2, "train.steps": 4, "data.include": 6, "seed": 7}


def test_yaml_numbers(tmp_path: Path) -> None:
    text = "optimizer: {lr: 1e-3, eps: 1.5E-8, clip_norm: .5}\nseed: 12\ntrain: {minutes: 3.}\n"
    config = load(write(tmp_path, "a.yaml", text)).config
    assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.clip_norm) == (1e-3, 1.5e-8, 0.5)
    assert (config.seed, config.train.minutes) == (12, 3.0)
    for surprise in ("seed: 010", "train: {minutes: 1:30}", "seed: 0b11", "optimizer: {lr: 1_0.0}"):
        refusal(file=write(tmp_path, "b.yaml", surprise))


def test_a_yaml_file_that_expands_without_end_is_only_refused(tmp_path: Path) -> None:
    levels = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))]
    error = refusal(file=write(tmp_path, "a.yaml", "\n".join(levels)))
    assert "30 problems" in error.given
    assert len(str(error)) < 20_000


# The listing


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    text = "lr = 2\n[optimizer]\nlr = '1e-3'\nname = 'adam'\n[btach]\nmicro = 3\n"
    text += "[data]\ninclude = '*.py'\n[model]\nwidth = 250\n"
    file = write(tmp_path, "my.toml", text)
    error = refusal(file=file, overrides=["batch.mikro=3"], values={"launch": {"ranks": 0}})
    message = str(error)
    assert error.given.startswith("8 problems in the configuration\n")
    for place, fault, fix in [
        (f"{file}:1", "lr = 2", "write optimizer.lr"),
        (f"{file}:3", 'optimizer.lr = "1e-3"', "set optimizer.lr = 0.001"),
        (f"{file}:4", 'optimizer.name = "adam"', 'set optimizer.name = "adamw"'),
        (f"{file}:5", "[btach]", "write batch"),
        (f"{file}:8", 'data.include = "*.py"', 'set data.include = ["*.py"]'),
        ("values", "launch.ranks = 0", "set launch.ranks = 1"),
        ("--set", "batch.mikro = 3", "write batch.micro"),
        (f"{file}:10", "model.width = 250", "set model.width = 248"),
    ]:
        assert f"{fault} ({place})" in message
        assert fix in message
    assert error.exit_code == 2


def test_a_single_problem_is_the_error_itself() -> None:
    error = refusal(values={"optimizer.lr": -1})
    assert error.given == "optimizer.lr = -1 (values)"
    assert error.rule == "optimizer.lr takes: number > 0.0"
    assert error.fix == "set optimizer.lr = 0.001"


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("lr", "optimizer.lr"),
        ("model.lr", "optimizer.lr"),
        ("optimizer.LR", "optimizer.lr"),
        ("optimizer.clip-norm", "optimizer.clip_norm"),
        ("optimizer.learning_rate", "optimizer.lr"),
        ("optimiser.lr", "optimizer.lr"),
        ("batch.global_", "batch.global"),
        ("optim", "optimizer"),
        ("train.warmup_step", "lr_schedule.warmup_steps"),
        ("every", "checkpoint.every"),
        ("every", "monitor.every"),
    ],
)
def test_nearest_spelling(wrong: str, right: str) -> None:
    assert right in nearest(wrong)
    assert right in refusal(values={wrong: 1}).fix


def test_a_key_like_no_other_lists_what_there_is() -> None:
    assert nearest("batch.xyzzy") == []
    assert refusal(values={"batch.xyzzy": 1}).fix == "remove it; batch has global, tokens, micro"
    assert "the sections are model, data" in refusal(values={"xyzzy.plugh": 1}).fix


def test_an_override_does_not_hide_a_fault_below(tmp_path: Path) -> None:
    file = write(tmp_path, "a.toml", "optimizer.lr = 'fast'\n")
    assert f"{file}:1" in refusal(file=file, overrides=["optimizer.lr=1e-3"]).given


# Rules between options


@pytest.mark.parametrize(
    ("values", "paths"),
    [
        ({"model.width": 12, "model.num_heads": 4}, ("model.width", "model.num_heads")),
        ({"batch.tokens": 1000}, ("batch.tokens", "data.sequence_length")),
        ({"batch.tokens": 512, "batch.micro": 3}, ("batch.micro", "batch.tokens")),
        ({"lr_schedule.name": "linear"}, ("lr_schedule.name", "train.steps", "train.minutes")),
        (
            {"precision.compute": "fp64", "precision.reduce": "fp32"},
            ("precision.reduce", "precision.compute"),
        ),
        (
            {"precision.compute": "fp64", "precision.master": "fp32"},
            ("precision.master", "precision.compute"),
        ),
        ({"precision.compute": "bf16", "precision.loss_scale": 2.0}, ("precision.loss_scale",)),
        (
            {"precision.compute": "fp16", "precision.loss_scale": 2.0, "precision.growth_steps": 9},
            ("precision.growth_steps", "precision.loss_scale"),
        ),
        ({"layout.shard": 2}, ("layout.shard", "layout.zero")),
        (
            {"layout.shard": 2, "layout.zero": 1, "layout.optimizer": "whole"},
            ("layout.shard", "layout.zero", "layout.optimizer"),
        ),
        ({"layout.prefetch_mb": 1.0, "layout.zero": 2}, ("layout.prefetch_mb", "layout.zero")),
        ({"optimizer.momentum": 0.5}, ("optimizer.momentum", "optimizer.name")),
    ],
)
def test_illegal_combinations(values: dict[str, object], paths: tuple[str, ...]) -> None:
    error = refusal(values=values)
    assert "problems" not in error.given
    for path in paths:
        assert f"{path} = " in error.given


@pytest.mark.parametrize(
    "values",
    [
        {"train.steps": 10, "checkpoint.every": 100},
        {"lr_schedule.name": "cosine", "train.minutes": 1},
        {"precision.compute": "fp64", "precision.master": "fp64"},
        {"precision.compute": "bf16", "precision.master": "bf16", "precision.grad": "bf16"},
        {"precision.compute": "fp16", "precision.growth_steps": 100, "precision.initial_scale": 8.0},
        {"precision.grad": "fp16", "precision.loss_scale": 8.0},
        {"optimizer.name": "sgd", "optimizer.momentum": 0.9, "optimizer.weight_decay": 0.1},
        {"optimizer.name": "adagrad", "optimizer.eps": 1e-9},
        {"batch.tokens": 512, "batch.micro": 2},
        {"layout.shard": 2, "layout.zero": 3},
        {"layout.shard": 2, "layout.optimizer": "all"},
        {"layout.prefetch_mb": 0.0, "layout.parameters": "group", "layout.optimizer": "group"},
        {"lr_schedule.warmup_steps": 10_000},
        {"optimizer.clip_norm": 1},
    ],
)
def test_legal_combinations(values: dict[str, object]) -> None:
    config = flat(load(values=values).config)
    assert {path: config[path] for path in values} == values


# Decisions


def test_decide_fills_what_is_unset() -> None:
    before = load(values={"seed": 3})
    after = before.decide({"launch.ranks": 2, "layout.zero": 0}, "one per core")
    assert (after.config.launch.ranks, after.config.layout.zero, after.config.seed) == (2, 0, 3)
    assert after.origins["launch.ranks"] == "decided: one per core"
    assert after.origins["seed"] == "values"
    assert after.origins["model.width"] == "default"
    assert before.config.launch.ranks is None
    reasons = before.decide({"launch.ranks": 2, "layout.zero": 0}, {"launch.ranks": "a", "layout.zero": "b"})
    assert (reasons.origins["launch.ranks"], reasons.origins["layout.zero"]) == ("decided: a", "decided: b")


def test_deciding_what_is_set_or_unknown_is_an_internal_fault() -> None:
    resolved = load(values={"launch.ranks": 3})
    with pytest.raises(AssertionError, match=r"launch\.ranks, which is 3 \(values\)"):
        resolved.decide({"launch.ranks": 2}, "why")
    with pytest.raises(AssertionError, match=r"launch\.rank, which is not"):
        resolved.decide({"launch.rank": 2}, "why")
    with pytest.raises(AssertionError, match="seed"):
        resolved.decide({"seed": 2}, "it has a default, so it is never open")


def test_decisions_are_checked_again() -> None:
    resolved = load(values={"layout.shard": 2, "layout.zero": 3})
    with pytest.raises(ConfigError, match=r"layout\.data = 3 \(decided: cores\)"):
        resolved.decide({"layout.data": 3}, "cores")
    with pytest.raises(ConfigError, match=r"launch\.ranks = 0 \(decided: none\)"):
        resolved.decide({"launch.ranks": 0}, "none")


def test_deciding_one_of_a_pair_displaces_the_other() -> None:
    asked = load(values={"train.minutes": 3, "lr_schedule.name": "cosine"})
    decided = asked.decide({"train.steps": 40}, "4.5 s an update")
    assert (decided.config.train.steps, decided.config.train.minutes) == (40, None)
    note = "3.0 from values, displaced by train.steps (decided: 4.5 s an update)"
    assert decided.origins["train.minutes"] == note
    again = decided.decide({"launch.ranks": 2}, "cores")
    assert again.origins["train.minutes"] == note


def test_a_layer_may_come_to_lie_below_all_others() -> None:
    asked = load(values={"train.minutes": 3, "data.include": ["*.c"]})
    settled = asked.above({"train.steps": 40, "data.include": ["*.py"], "seed": 7}, "as it was built")
    assert (settled.config.seed, settled.config.data.include) == (7, ("*.c",))
    assert settled.config.train.steps is None, "the minutes of a higher layer"
    assert settled.origins["seed"] == "as it was built"
    assert settled.origins["data.include"] == "values"


# TOML and back


def reread(resolved: Resolved, folder: Path) -> Resolved:
    return load(write(folder, "again.toml", resolved.to_toml()))


def test_every_line_tells_its_origin(tmp_path: Path) -> None:
    file = write(tmp_path, "my.toml", "[batch]\nglobal = 8\n[data]\ninclude = ['*.c', '# no comment']\n")
    resolved = load(file, overrides=["seed=5"]).decide({"launch.ranks": 2}, "one per\ncore")
    text = resolved.to_toml()
    assert str(resolved) == text
    lines = [line for line in text.splitlines() if line and not line.startswith("[")]
    assert len(lines) == len(LEAVES)
    for (path, origin), line in zip(resolved.origins.items(), lines, strict=True):
        key = path.rpartition(".")[2]
        ending = origin.replace("\n", "?")
        if line.startswith("#"):
            assert line == f"# {key} is unset ({ending})"
        else:
            assert line.startswith(f"{key} = ")
            assert line.endswith(f"  # {ending}")
    assert set(tomllib.loads(text)) == {"seed", *SECTIONS}
    assert f"global = 8  # {file}:2" in text
    assert "ranks = 2                # decided: one per?core" in text
    assert reread(resolved, tmp_path).config == resolved.config


def test_the_full_configuration_comes_back(tmp_path: Path) -> None:
    resolved = load(values=dotted())
    again = reread(resolved, tmp_path)
    assert again.config == resolved.config
    assert reread(again, tmp_path).config == resolved.config


WHOLE = st.integers(1, 2**40)
SMALL = st.integers(1, 6)
ABOVE_ZERO = st.floats(min_value=1e-300, max_value=1e300)
BELOW_ONE = st.floats(0, 1, exclude_max=True)
TEXT = st.text(max_size=12)
PATHS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8).map(
    lambda text: Path(text)
)
TYPES = st.sampled_from(["fp64", "fp32", "bf16", "fp16"])
WIDTHS = st.tuples(SMALL, SMALL, SMALL).map(
    lambda t: {
        "model.num_kv_heads": t[0],
        "model.num_heads": t[0] * t[1],
        "model.width": t[0] * t[1] * t[2] * 2,
    }
)
BATCHES = st.tuples(SMALL, SMALL, st.integers(2, 999)).flatmap(
    lambda t: st.sampled_from(
        [
            {"batch.global": t[0] * t[1], "batch.micro": t[0], "data.sequence_length": t[2]},
            {"batch.tokens": t[0] * t[1] * t[2], "batch.micro": t[0], "data.sequence_length": t[2]},
        ]
    )
)
OPTIMIZERS = st.one_of(
    st.fixed_dictionaries(
        {"optimizer.name": st.just("adamw")},
        optional={"optimizer.betas": st.tuples(BELOW_ONE, BELOW_ONE), "optimizer.eps": ABOVE_ZERO},
    ),
    st.fixed_dictionaries({"optimizer.name": st.just("sgd")}, optional={"optimizer.momentum": BELOW_ONE}),
    st.fixed_dictionaries({"optimizer.name": st.just("adagrad")}, optional={"optimizer.eps": ABOVE_ZERO}),
)
RUNS = st.one_of(
    st.fixed_dictionaries({}, optional={"train.steps": WHOLE, "train.minutes": st.none()}),
    st.fixed_dictionaries(
        {
            "lr_schedule.name": st.sampled_from(["linear", "cosine"]),
            "lr_schedule.final_ratio": st.floats(0, 1),
            "lr_schedule.warmup_steps": st.integers(0, 9),
            "train.steps": st.integers(10, 2**40),
        }
    ),
    st.fixed_dictionaries({"lr_schedule.name": st.just("cosine"), "train.minutes": ABOVE_ZERO}),
)
LAYOUTS = st.tuples(SMALL, SMALL, SMALL).flatmap(
    lambda t: st.sampled_from(
        [
            {"layout.data": t[0] * t[1], "layout.shard": t[0], "layout.zero": 3, "layout.expert": t[1]},
            {"layout.zero": 0, "layout.tensor": t[0], "layout.pipe": t[1], "layout.context": t[2]},
        ]
    )
)
PRECISIONS = st.one_of(
    st.fixed_dictionaries({}, optional={f"precision.{key}": TYPES for key in ("storage", "grad", "reduce")}),
    st.fixed_dictionaries(
        {"precision.compute": st.just("fp64")}, optional={"precision.master": st.just("fp64")}
    ),
)
REST = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "model.num_layers": WHOLE,
        "model.ffn_width": WHOLE,
        "model.rope_base": st.floats(1, 1e9, exclude_min=True),
        "model.tie_embeddings": st.booleans(),
        "model.dropout": BELOW_ONE,
        "model.num_experts": st.integers(2, 9),
        "model.batch_stats": st.sampled_from(["micro", None]),
        "data.path": PATHS,
        "data.include": st.lists(TEXT, max_size=3),
        "data.max_mb": ABOVE_ZERO,
        "data.vocab_size": st.integers(257, 65_536),
        "data.text_field": TEXT,
        "data.documents": st.sampled_from(["joined", "separate"]),
        "data.held_out_documents": WHOLE,
        "data.cache": PATHS,
        "layout.loss_chunk": st.integers(0, 99),
        "optimizer.lr": ABOVE_ZERO,
        "optimizer.weight_decay": st.floats(0, 10),
        "optimizer.clip_norm": ABOVE_ZERO,
        "train.eval_every": WHOLE,
        "train.prompt": TEXT,
        "train.sample_tokens": st.integers(0, 99),
        "train.folder": PATHS,
        "checkpoint.every": WHOLE,
        "checkpoint.keep_last": WHOLE,
        "checkpoint.keep_every": WHOLE,
        "checkpoint.asynchronous": st.booleans(),
        "monitor.every": WHOLE,
        "monitor.peak_tflops": ABOVE_ZERO,
        "launch.ranks": WHOLE,
        "launch.threads": WHOLE,
        "launch.timeout_s": ABOVE_ZERO,
        "launch.start_timeout_s": ABOVE_ZERO,
        "launch.save_timeout_s": ABOVE_ZERO,
    },
)


@settings(max_examples=60, deadline=None, database=None)
@given(parts=st.tuples(WIDTHS, BATCHES, OPTIMIZERS, RUNS, LAYOUTS, PRECISIONS, REST))
def test_toml_round_trip(
    tmp_path_factory: pytest.TempPathFactory, parts: tuple[dict[str, object], ...]
) -> None:
    values = {path: value for part in parts for path, value in part.items()}
    resolved = load(values=values)
    file = tmp_path_factory.getbasetemp() / "round_trip.toml"
    file.write_text(resolved.to_toml(), encoding="utf-8", newline="")
    assert load(file).config == resolved.config
    for path, value in values.items():
        wanted = tuple(value) if isinstance(value, list) else value
        assert flat(resolved.config)[path] == wanted


# The table of options


def test_describe_has_every_leaf_with_help() -> None:
    table = describe()
    assert [row[0] for row in table] == list(load().origins)
    assert ("optimizer.lr", "number > 0.0", 1e-3, "Peak learning rate.") in table
    for path, takes, _, text in table:
        assert takes, path
        assert text, path
    assert "global" in dict.fromkeys(path.rpartition(".")[2] for path, *_ in table)


def test_the_example_of_every_leaf_is_legal() -> None:
    for path, leaf in LEAVES.items():
        Config.model_validate({path: leaf.example} if "." not in path else _single(path, leaf.example))


def _single(path: str, value: object) -> dict[str, dict[str, object]]:
    section, _, key = path.rpartition(".")
    return {section: {key: value}}


def test_the_room_loads_no_tensor_library() -> None:
    code = "import sys, sixfold.config as c; c.load(); print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_origins_survive_being_written_and_read_again(tmp_path: Path) -> None:
    mine = write(tmp_path, "my # own.toml", '[train]\nprompt = "a # b"\nsteps = 9\n')
    first = load(mine, values={"data.include": ["#.py", "b.py"]}, overrides=["seed=3"])
    first = first.decide({"batch.global": 8}, "because # of this")
    file = write(tmp_path, "config.toml", first.to_toml())
    again = load(file)
    assert again.origins["seed"] == f"{file}:1"
    recalled = again.recall(file.read_text(), file)
    assert recalled.config == first.config
    assert recalled.origins == first.origins
    assert recalled.origins["train.prompt"] == f"{mine}:2"
    assert recalled.config.data.model_fields_set == {"include"}


def test_only_what_comes_from_the_written_file_is_recalled(tmp_path: Path) -> None:
    first = load(values={"train.minutes": 3.0, "seed": 3}).decide({"train.steps": 7}, "rehearsed")
    text = first.to_toml() + "# written by hand\n"
    text = re.sub(r"^width = \d+", "width = 96", text, flags=re.MULTILINE)
    file = write(tmp_path, "config.toml", text.replace("[optimizer]", "[optimizer]\neps = 0.5"))
    changed = load(file, overrides=["seed=4", "batch.global=6"])
    origins = changed.recall(file.read_text(), file).origins
    assert (origins["seed"], origins["batch.global"]) == ("--set", "--set")
    assert origins["train.steps"] == "decided: rehearsed"
    assert origins["train.minutes"] == first.origins["train.minutes"]
    assert origins["model.num_layers"] == "default"
    assert origins["model.width"].startswith(f"{file}:")  # a line that is not as its note says
    assert origins["optimizer.eps"].startswith(f"{file}:")  # a line that was added without a note


@pytest.mark.parametrize("name", [".", ""])
def test_a_folder_is_no_configuration(tmp_path: Path, name: str) -> None:
    write(tmp_path, "sixfold.toml", "")
    error = refusal(file=tmp_path / name)
    assert "is a folder" in error.given


@pytest.mark.parametrize(
    ("given", "needed"),
    [({"balance": "loss"}, "num_experts"), ({"num_experts": 4, "balance_rate": 0.1}, "balance")],
)
def test_what_is_said_of_experts_needs_experts(given: dict[str, object], needed: str) -> None:
    with pytest.raises(ConfigError, match=rf"set model\.{needed} = "):
        load(values={"model": given})
