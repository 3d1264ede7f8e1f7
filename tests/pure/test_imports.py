"""What is loaded when: importing the package, asking for help and planning cost no tensor library.

Each case runs in an interpreter of its own, which reports what it has loaded in the end.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from sixfold.base.errors import EXIT_USAGE

HEAVY = ("torch", "numpy", "transformers", "tokenizers", "safetensors", "matplotlib")
"""What must not be there. pydantic and rich are small and are what configuration and help are made of."""

MOST_MODULES = 450
"""That help and configurations may load: 412 when this was set, 0.17 s of CPU time on a quiet machine, where
0.3 s are allowed. Modules are counted, since seconds depend on who else computes."""

LOW_ROOMS = (
    "sixfold.base.errors",
    "sixfold.base.units",
    "sixfold.base.axes",
    "sixfold.config",
    "sixfold.program",
    "sixfold.plan",
    "sixfold.launch",
    "sixfold.train.folder",
)


def modules_of(code: str) -> set[str]:
    """Modules that are loaded after `code`, which may exit."""
    report = (
        "import atexit, json, sys\natexit.register(lambda: print('\\n' + json.dumps(sorted(sys.modules))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", report + code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode in (0, EXIT_USAGE), done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def loaded_by(code: str) -> set[str]:
    """The same by their first names."""
    return {name.partition(".")[0] for name in modules_of(code)}


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        ("train", "--help"),
        ("run", "--help"),
        ("train", "-h"),
        ("ckpt", "ls", "-h"),
        ("data", "build", "-h"),
        ("generate", "-h"),
        ("report", "-h"),
        ("doctor", "-h"),
        ("config", "show"),
        ("config", "schema"),
        ("train", "--set", "optimizer.lrr=1"),
        ("train", "--resume", "nowhere"),
        ("plan", "--set", "optimizer.lrr=1"),
        ("plan", "--timeline", "update.pdf"),
        ("generate", "nowhere", "-p", "x"),
        ("ckpt", "ls", "nowhere"),
        ("ckpt", "verify", "nowhere"),
        ("ckpt", "diff", "nowhere", "."),
        ("ckpt", "gc", "nowhere", "--keep-last", "1"),
        ("export", "nowhere", "model"),
    ],
)
def test_help_configurations_and_mistakes_load_little_and_nothing_heavy(arguments: tuple[str, ...]) -> None:
    code = f"import sys; sys.argv = {['sixfold', *arguments]!r}; from sixfold.cli.app import main; main()"
    found = modules_of(code)
    assert found.isdisjoint(HEAVY)
    assert len(found) <= MOST_MODULES


@pytest.mark.parametrize("module", ["sixfold", *LOW_ROOMS])
def test_low_rooms_load_nothing_heavy(module: str) -> None:
    found = loaded_by(f"import {module}")
    assert "sixfold" in found
    assert found.isdisjoint(HEAVY)


def test_checking_a_config_loads_nothing_heavy() -> None:
    code = "from sixfold.config import load; print(load(values={'train': {'steps': 3}}).to_toml())"
    assert loaded_by(code).isdisjoint(HEAVY)


def test_the_face_loads_the_engine_when_it_is_touched() -> None:
    """The counterpart, so that the tests above cannot pass by looking in the wrong place."""
    assert "torch" in loaded_by("import sixfold; sixfold.initialize")


def test_the_face_names_what_it_offers() -> None:
    code = (
        "import sixfold\n"
        "assert dir(sixfold) == sorted(sixfold.__all__)\n"
        "try: sixfold.initialise\n"
        "except AttributeError as error: assert 'initialize' in str(error)\n"
        "else: raise SystemExit('no error')"
    )
    assert loaded_by(code).isdisjoint(HEAVY)
