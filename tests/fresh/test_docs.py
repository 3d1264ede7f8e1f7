"""Every block of code in README, CONTRIBUTING and docs/ works, and every file they name exists.

`python` blocks of one page are executed in order in one namespace, `toml` blocks must load as a
configuration, and each line of a `bash` block is carried out as `check_command` says: training for real,
with the settings of SHORT added. `text` is for reading. Any other language is a failure, not a skip.
The two install commands are carried out by .ci/run.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sixfold.config import load
from tests.one import lab
from tests.readme import README, commands

pytestmark = pytest.mark.fresh

ROOT = README.parent
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHORT = {
    "launch.ranks": 1,
    "launch.threads": 1,
    "train.steps": 3,
    "train.sample_tokens": 4,
    "data.max_mb": 0.5,
    "data.held_out_documents": 2,
    "data.vocab_size": 300,
    "data.sequence_length": 128,
    "model.width": 32,
    "model.num_layers": 2,
    "precision.compute": "fp32",
    "monitor.peak_tflops": 1.0,
}
HUNG_S = 600.0
"""After this long a command hangs, however slow and busy the machine."""
BUILT = ("data.max_mb", "data.held_out_documents", "data.vocab_size")
"""Of these, what was settled when a corpus was built."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the page where the text begins."""

    page: Path
    language: str
    text: str
    line: int

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        fence = re.match(r"\s*```(.*)", lines[number])
        number += 1
        if fence is None:
            continue
        start = number
        while lines[number].strip() != "```":  # an open fence ends in an IndexError: a fault of the page
            number += 1
        yield Block(page, fence[1].strip(), "\n".join(lines[start:number]) + "\n", start + 1)
        number += 1


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if any(b.page == page and b.language == language for b in BLOCKS)]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_no_block_is_of_an_unknown_kind() -> None:
    known = {"text", "python", "toml", "bash", "console"}
    assert [f"{block}: {block.language!r}" for block in BLOCKS if block.language not in known] == []
    assert {README, ROOT / "docs" / "nouns.md"} <= set(pages_with("python"))


@pytest.mark.parametrize("page", pages_with("python"), ids=name)
def test_python(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCKS:
        if block.page == page and block.language == "python":
            tree = ast.increment_lineno(ast.parse(block.text), block.line - 1)
            exec(compile(tree, str(page), "exec"), namespace)  # a traceback names the page's own line


def test_toml(tmp_path: Path) -> None:
    for number, block in enumerate(block for block in BLOCKS if block.language == "toml"):
        file = tmp_path / f"{number}-{block.page.stem}-{block.line}.toml"
        file.write_text(block.text)
        load(file)


class Props:
    """A folder with what the pages' commands speak of: my.toml, texts, a script, runs to go on with."""

    def __init__(self, folder: Path, python: str) -> None:
        self.folder = folder
        self.python = python
        lab.write_corpus(folder / "home" / "texts", num_files=20)
        lab.write_config(folder / "my.toml", {"seed": 1, "data.path": folder / "home" / "texts"})
        script = next(b for b in BLOCKS if b.page == README and b.language == "python")
        (folder / "my_script.py").write_text(script.text)
        plugins = next(b for b in BLOCKS if b.page.name == "plugins.md" and b.language == "python")
        (folder / "my_plugins.py").write_text(plugins.text)

    def run(self, *arguments: str) -> None:
        environment = {**os.environ, "HOME": str(self.folder / "home")}
        done = subprocess.run(
            [self.python, "-m", "sixfold", *arguments],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=HUNG_S,
        )
        assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout}{done.stderr}"

    def check_command(self, line: str) -> None:
        """Carry out one command of a page, shortened; what cannot be is at least found to exist."""
        for command in line.split("&&"):
            words = shlex.split(command.replace("~", str(self.folder / "home")))
            match words:
                case ["pip", "install", "-c", constraints, "-e", target]:
                    assert (ROOT / constraints).is_file()
                    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
                    assert target in (".", *(f".[{extra}]" for extra in project["optional-dependencies"]))
                case ["sixfold", "train", *arguments]:
                    self._train(arguments)
                case ["sixfold", "data" | "config" | "report" | "generate" | "doctor" as command, *arguments]:
                    self.run(command, *arguments)
                case ["sixfold", "run", *arguments]:
                    self.run("run", "--ranks", "2", *arguments)
                case ["python", "-m", module, *_]:
                    assert importlib.util.find_spec(module) is not None, module
                case _:
                    raise AssertionError(f"no way to check {command!r}; add one")

    def _train(self, arguments: list[str]) -> None:
        settings: dict[str, object] = dict(SHORT)
        if any(each.startswith("data.path=corpus") for each in arguments):  # a corpus that is built already
            settings = {path: value for path, value in SHORT.items() if path not in BUILT}
        if "--resume" in arguments:
            settings = {"train.steps": 5}
            resumed = self.folder / arguments[arguments.index("--resume") + 1]
            if not resumed.exists():  # the page shows a folder of its own; any finished run will do
                if not list(self.folder.glob("runs/*")):
                    self._train([])
                shutil.copytree(next(self.folder.glob("runs/*")), resumed)
        shortened = [part for path, value in settings.items() for part in ("--set", f"{path}={value}")]
        self.run("train", *shortened, *arguments)


@pytest.mark.parametrize("page", [*pages_with("bash"), *pages_with("console")], ids=name)
def test_commands(page: Path, tmp_path: Path, warm_python: str) -> None:
    props = Props(tmp_path, warm_python)
    for block in BLOCKS:
        if block.page != page or block.language not in ("bash", "console"):
            continue
        lines = block.text.replace("\\\n", " ").splitlines()
        if block.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        for line in filter(None, (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines)):
            props.check_command(line)


def test_the_two_commands_install_and_run() -> None:
    first, second = commands()
    assert first.endswith("&& sixfold train")
    assert second.endswith("&& python -m tests")
    assert '"$command"' in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/.-])(?:src|docs|tests|benchmarks)/[\w./-]*[\w/]", text))
    linked = {link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link}
    missing = [path for path in named if not (ROOT / path).exists()]
    missing += [link for link in linked if not (page.parent / link).exists()]
    assert not missing
