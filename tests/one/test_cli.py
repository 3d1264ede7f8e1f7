"""The commands as far as they go without starting ranks: what they refuse, with which code, and dry runs.

`main` runs in this process, as the entry point calls it. Real launches are in tests/fresh.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sixfold.base.errors import EXIT_DONE, EXIT_INFEASIBLE, EXIT_USAGE
from sixfold.config import load
from tests.one import lab
from tests.one.terminal import Terminal


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_all_problems_of_a_config_are_told_at_once(sixfold: Terminal) -> None:
    (sixfold.folder / "my.toml").write_text(
        "[optimizer]\nlerning_rate = 1e-3\n[model]\nwidth = 'big'\n[train]\nsteps = 0\n"
    )
    assert sixfold("train", "--config", "my.toml") == EXIT_USAGE
    assert sixfold.out == ""
    assert "3 problems in the configuration" in sixfold.err
    for told in ("my.toml:2", "my.toml:4", "my.toml:6", "lerning_rate", "model.width", "train.steps"):
        assert told in sixfold.err
    assert "Traceback" not in sixfold.err
    assert files_in(sixfold.folder) == {"my.toml"}


def test_a_wrong_override(sixfold: Terminal) -> None:
    assert sixfold("train", "--set", "optimizer.lr=fast") == EXIT_USAGE
    assert "--set" in sixfold.err
    assert "optimizer.lr" in sixfold.err


def test_a_missing_config(sixfold: Terminal) -> None:
    assert sixfold("train", "--config", "nowhere.toml") == EXIT_USAGE
    assert "nowhere.toml" in sixfold.err


def test_an_unknown_option_of_the_command(sixfold: Terminal) -> None:
    assert sixfold("train", "--steps", "3") == EXIT_USAGE
    assert "--steps" in sixfold.err


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_missing_data_folder(sixfold: Terminal, more: tuple[str, ...]) -> None:
    (sixfold.folder / "texts").mkdir()
    assert (
        sixfold("train", "--config", sixfold.config(data__path=sixfold.folder / "text"), *more) == EXIT_USAGE
    )
    assert f"{sixfold.folder / 'text'}' does not exist" in sixfold.err
    assert f"set data.path = {str(sixfold.folder / 'texts')!r}" in sixfold.err
    assert files_in(sixfold.folder) == {"my.toml", "texts"}


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
@pytest.mark.parametrize("axis", ["tensor", "context"])
def test_an_axis_of_more_ranks_than_there_are(sixfold: Terminal, axis: str, more: tuple[str, ...]) -> None:
    lab.write_corpus(sixfold.folder / "text", num_files=8)
    config = sixfold.config(**{f"layout__{axis}": 3})
    before = files_in(sixfold.folder)
    assert sixfold("train", "--config", config, "--set", "launch.ranks=2", *more) == EXIT_INFEASIBLE
    assert f"{axis} 3" in sixfold.err
    assert "start 3 ranks (launch.ranks, or as the launcher has it), or make" in sixfold.err
    assert files_in(sixfold.folder) == before


def test_a_run_folder_that_cannot_be_made(sixfold: Terminal) -> None:
    lab.write_corpus(sixfold.folder / "text", num_files=8)
    (sixfold.folder / "file").write_text("in the way")
    config = sixfold.config(train__folder=sixfold.folder / "file" / "runs")
    for arguments in ((), ("--into", sixfold.folder / "file" / "run")):
        assert sixfold("train", "--config", config, *arguments) == EXIT_USAGE
        assert "cannot make the run folder" in sixfold.err
        assert "Not a directory" in sixfold.err
        assert "train.folder" in sixfold.err


def test_a_second_run_into_one_folder(sixfold: Terminal) -> None:
    lab.write_corpus(sixfold.folder / "text", num_files=8)
    taken = sixfold.folder / "taken"
    taken.mkdir()
    (taken / "config.toml").write_text("seed = 1\n")
    assert sixfold("train", "--config", sixfold.config(), "--into", taken) == EXIT_USAGE
    assert f"--resume {taken}" in sixfold.err
    assert (taken / "config.toml").read_text() == "seed = 1\n"


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_place_that_cannot_be_a_run_folder_is_noticed_before_the_corpus(
    sixfold: Terminal, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.write_corpus(sixfold.folder / "text", num_files=8)
    (sixfold.folder / "file").write_text("in the way")
    config = sixfold.config()
    before = files_in(sixfold.folder)
    assert sixfold("train", "--config", config, "--into", "file", *more) == EXIT_USAGE
    assert "cannot make the run folder file: Not a directory" in sixfold.err
    monkeypatch.setattr("sixfold.train.folder.os.access", lambda *_: False)
    assert sixfold("train", "--config", config, "--into", "new/run", *more) == EXIT_USAGE
    assert "cannot make the run folder new/run: Permission denied" in sixfold.err
    assert files_in(sixfold.folder) == before


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_data_folder_without_a_match(sixfold: Terminal, more: tuple[str, ...]) -> None:
    (sixfold.folder / "text").mkdir()
    (sixfold.folder / "text" / "a.md").write_text("text")
    assert sixfold("train", "--config", sixfold.config(), *more) == EXIT_USAGE
    assert "matches data.include" in sixfold.err
    assert "set data.include = ['*.md']" in sixfold.err
    assert files_in(sixfold.folder) == {"my.toml", "text", "text/a.md"}


def test_paths_that_are_no_files(sixfold: Terminal) -> None:
    assert sixfold("train", "--config", ".") == EXIT_USAGE
    assert ". is a folder" in sixfold.err
    for option in ("--config", "--resume", "--into"):
        assert sixfold("train", option, "") == EXIT_USAGE
        assert option in sixfold.err
        assert "path is empty" in sixfold.err
    assert files_in(sixfold.folder) == set()


def test_resume_of_what_is_no_run(sixfold: Terminal) -> None:
    (sixfold.folder / "runs" / "good").mkdir(parents=True)
    (sixfold.folder / "runs" / "good" / "config.toml").write_text("")
    assert sixfold("train", "--resume", "runs/god") == EXIT_USAGE
    assert "runs/good" in sixfold.err
    assert sixfold("train", "--resume", "runs/good", "--config", sixfold.config()) == EXIT_USAGE
    assert "drop --config" in sixfold.err
    assert sixfold("train", "--resume", "runs/good", "--into", "other") == EXIT_USAGE
    assert "drop --into" in sixfold.err


def test_a_dry_run_shows_a_loadable_config_and_writes_nothing(sixfold: Terminal) -> None:
    lab.write_corpus(sixfold.folder / "text", num_files=8)
    config = sixfold.config(launch__ranks=4, batch__global=10)
    before = files_in(sixfold.folder)
    assert sixfold("train", "--config", config, "--set", "seed=5", "--dry-run") == EXIT_DONE
    assert files_in(sixfold.folder) == before
    assert "# ranks      4: data 4" in sixfold.out
    assert "# batch      10 samples / 4 data ranks = 3 or 2 a rank" in sixfold.out
    (sixfold.folder / "shown.toml").write_text(sixfold.out)
    shown = load(sixfold.folder / "shown.toml").config
    assert (shown.seed, shown.launch.ranks, shown.model.width) == (5, 4, 32)
    assert "seed = 5" in sixfold.out
    assert "# --set" in sixfold.out


def test_a_dry_run_of_a_script(sixfold: Terminal) -> None:
    (sixfold.folder / "mine.py").write_text("raise SystemExit('it was started')")
    assert sixfold("run", "--ranks", "3", "--dry-run", "mine.py", "--epochs", "2") == EXIT_DONE
    assert sixfold.out.startswith("3 x ")
    assert sixfold.out.endswith("mine.py --epochs 2\n")
    assert files_in(sixfold.folder) == {"mine.py"}


def test_a_missing_script(sixfold: Terminal) -> None:
    assert sixfold("run", "nowhere.py") == EXIT_USAGE
    assert "nowhere.py is not a file" in sixfold.err
    assert files_in(sixfold.folder) == set()


@pytest.mark.parametrize(
    "module", ["nonexistent", "json.nonexistent", "nonexistent.json", "package", "mine.inner", "a..b", ""]
)
def test_a_missing_module(sixfold: Terminal, module: str) -> None:
    (sixfold.folder / "package").mkdir()
    (sixfold.folder / "package" / "__init__.py").write_text("raise SystemExit('it was imported')")
    (sixfold.folder / "mine.py").write_text("raise SystemExit('it was imported')")
    before = files_in(sixfold.folder)
    assert sixfold("run", "-m", module) == EXIT_USAGE
    assert "no module" in sixfold.err or "without a module" in sixfold.err
    assert sixfold("run", "-m") == EXIT_USAGE
    assert "-m without a module" in sixfold.err
    assert files_in(sixfold.folder) == before


@pytest.mark.parametrize("module", ["mine", "package", "package.inner", "json.tool"])
def test_modules_that_can_be_run(sixfold: Terminal, module: str) -> None:
    (sixfold.folder / "package").mkdir()
    for name in ("package/__init__.py", "package/__main__.py", "package/inner.py", "mine.py"):
        (sixfold.folder / name).write_text("raise SystemExit('it was imported')")
    assert sixfold("run", "--dry-run", "-n", "1", "-m", module, "--epochs", "2") == EXIT_DONE
    assert sixfold.out.endswith(f"-m {module} --epochs 2\n")


def be_rank(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two that torchrun has started."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**place, "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)


def test_a_dry_run_inside_ranks_is_shown_by_the_first(
    sixfold: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.write_corpus(sixfold.folder / "text", num_files=8)
    config = sixfold.config()
    before = files_in(sixfold.folder)
    be_rank("1", monkeypatch)
    assert sixfold("train", "--config", config, "--dry-run") == EXIT_DONE
    assert sixfold.out == ""
    be_rank("0", monkeypatch)
    assert sixfold("train", "--config", config, "--dry-run") == EXIT_DONE
    assert "# ranks      2: data 2" in sixfold.out
    assert "as started" in sixfold.out
    assert sixfold("train", "--config", config, "--dry-run", "--set", "layout.tensor=3") == EXIT_INFEASIBLE
    assert files_in(sixfold.folder) == before


def test_run_inside_a_rank_is_refused(sixfold: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    (sixfold.folder / "mine.py").write_text("")
    be_rank("1", monkeypatch)
    assert sixfold("run", "mine.py") == EXIT_USAGE
    assert "inside a rank (rank 1 of 2" in sixfold.err


def test_version_and_help(sixfold: Terminal) -> None:
    assert sixfold("--version") == EXIT_DONE
    assert sixfold.out.startswith("sixfold 0.")
    for arguments in (("--help",), ("train", "-h"), ("run", "--help"), ("ckpt", "-h"), ("export", "-h")):
        assert sixfold(*arguments) == EXIT_DONE
        assert "Usage" in sixfold.out


def test_a_plan_counts_the_entries_of_a_corpus_that_is_there(sixfold: Terminal) -> None:
    lab.write_corpus(sixfold.folder / "text")
    config = sixfold.config(monitor__peak_tflops=0.1)
    assert sixfold("plan", "--config", config, "--ranks", "1", "--json") == EXIT_DONE
    asked = json.loads(sixfold.out)["memory_bytes"]
    corpus = sixfold.folder / "corpus"
    assert sixfold("data", "build", "--config", config, "--into", corpus) == EXIT_DONE
    config = sixfold.config(monitor__peak_tflops=0.1, data__path=corpus, data__vocab_size=None)
    assert sixfold("plan", "--config", config, "--ranks", "1", "--json") == EXIT_DONE
    assert json.loads(sixfold.out)["memory_bytes"] == asked


def test_a_plan_shows_what_each_rank_would_hold_and_draws_an_update(sixfold: Terminal) -> None:
    page = sixfold.folder / "update.html"
    layout = {"layout__pipe": 2, "layout__zero": 2, "model__num_layers": 3, "monitor__peak_tflops": 0.1}
    config = sixfold.config(**layout, batch__micro=1)
    assert sixfold("plan", "--config", config, "--ranks", "4", "--timeline", page) == 0
    assert "ranks       4: pipe 2 x data 2" in sixfold.out
    assert "stages      rank 0: stage 0 with 2 block(s)" in sixfold.out
    for kind in ("memory", "traffic"):
        shown = [f"{kind:<12}pipe rank {rank}:" in sixfold.out for rank in range(3)]
        assert shown == [True, True, False]
    assert "(beside what crosses along pipe in every micro-batch)" in sixfold.out
    assert "bubble" in sixfold.out
    assert "predicted compute" in page.read_text()
    trace = page.with_suffix(".json")
    assert sixfold("plan", "--config", config, "--ranks", "4", "--timeline", trace) == EXIT_DONE
    assert "rank 1 predicted" in trace.read_text()
    assert sixfold("plan", "--config", config, "--ranks", "4", "--json") == 0
    told = json.loads(sixfold.out)
    assert told["makespan_s"] > told["ideal_s"] > 0
    assert len(told["memory_bytes"]) == 2
    whole_share = sixfold.config(**layout, batch__micro=3)
    assert sixfold("plan", "--config", whole_share, "--ranks", "4", "--json") == 0
    for thrice, once in zip(told["traffic_bytes"], json.loads(sixfold.out)["traffic_bytes"], strict=True):
        assert thrice["reduce"] == 3 * once["reduce"] > 0, "gradients that are cut are reduced each time"
        assert thrice["publish"] == once["publish"] > 0
    config = sixfold.config(**layout, batch__micro=1)
    assert sixfold("plan", "--config", config, "--ranks", "1") == EXIT_INFEASIBLE
    assert "start 2 ranks" in sixfold.err
    assert sixfold("plan", "--config", config, "--ranks", "4", "--timeline", "none/such.html") == EXIT_USAGE
    assert "cannot be written" in sixfold.err
    assert sixfold("plan", "--config", config, "--ranks", "4", "--timeline", "update.pdf") == EXIT_USAGE
    assert "name it update.html" in sixfold.err


def test_a_plan_asks_the_optimizer_what_it_keeps(sixfold: Terminal) -> None:
    config = sixfold.config(monitor__peak_tflops=0.1)

    def held(name: str, *settings: str) -> int:
        options = [word for each in (f"optimizer.name={name}", *settings) for word in ("--set", each)]
        assert sixfold("plan", "--config", config, "--ranks", "1", "--json", *options) == EXIT_DONE
        (found,) = json.loads(sixfold.out)["memory_bytes"]
        return int(found)

    nothing = held("sgd")
    moment = held("sgd", "optimizer.momentum=0.9") - nothing
    assert moment > 0
    assert held("adagrad") - nothing == moment
    assert held("torch.optim:RAdam") - nothing == held("adamw") - nothing == 2 * moment
    assert moment < held("muon") - nothing < 2 * moment
    assert held("muon", "optimizer.momentum=0.9") == held("muon")


def test_a_plan_says_whose_state_it_does_not_know(sixfold: Terminal) -> None:
    (sixfold.folder / "mine.py").write_text(
        "import torch\nclass Odd(torch.optim.SGD):\n    def step(self, closure=None):\n        1 / 0\n"
    )
    config = sixfold.config(monitor__peak_tflops=0.1, optimizer__name="mine.py:Odd")
    assert sixfold("plan", "--config", config, "--ranks", "1") == EXIT_DONE
    assert "(Odd could not be tried on a few zeros: its state is not counted)" in sixfold.out
