"""The floor plan as a test: who may import whom, read from the sources without running them.

One place holds the levels of the rooms; every module of the package is parsed once. A new room needs a
row in LEVELS, and a rule broken is named by file and line.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
PACKAGE = SOURCE / "sixfold"

LEVELS = {
    "base": 0,
    "config": 1,
    "program": 2,
    "simulate": 3,
    "plan": 4,
    "launch": 5,
    "mesh": 5,
    "parallel": 6,
    "data": 6,
    "monitor": 6,
    "state": 7,
    "pipeline": 8,
    "checkpoint": 8,
    "engine": 9,
    "train": 10,
    "testing": 10,
    "compat": 11,
    "cli": 11,
}
"""The rooms of DESIGN section 6. `models` stands outside: it imports nothing of the package."""

OUTSIDE = "models"
TORCH_FROM = 5
MAX_LINES = 440
MAY_PRINT = ("cli", "monitor", "testing")
FACES = {"__init__", "__main__"}
"""The package's own front: it may reach every room, by name or on first use."""


@dataclass(frozen=True)
class Import:
    """One import as it is written.

    Args:
        target: dotted module; for `from a import b` it is `a.b` where that is a module, else `a`.
        names: what `from` takes out of it.
        line: where.
        kind: "module", "function" or "typing" (under `if TYPE_CHECKING`).
    """

    target: str
    names: tuple[str, ...]
    line: int
    kind: str


@dataclass(frozen=True)
class Module:
    """One parsed source file."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        """`sixfold.plan.units` -> `plan`; the package's own files -> their name."""
        parts = self.name.split(".")
        return parts[1] if len(parts) > 1 else "__init__"

    @property
    def where(self) -> str:
        return str(self.path.relative_to(SOURCE))

    def imports(self) -> Iterator[Import]:
        yield from _imports(self.tree, "module", self)


@cache
def modules() -> dict[str, Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(SOURCE).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        found[name] = Module(name, path, text, ast.parse(text, str(path)))
    return found


def _imports(node: ast.AST, kind: str, module: Module) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, (), child.lineno, kind)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                package = module.name.split(".")
                if module.path.name != "__init__.py":
                    package = package[:-1]
                base = ".".join([*package[: len(package) - child.level + 1], *filter(None, [base])])
            for alias in child.names:
                whole = f"{base}.{alias.name}"
                is_module = (SOURCE / Path(*whole.split("."))).with_suffix(".py").exists()
                is_module = is_module or (SOURCE / Path(*whole.split(".")) / "__init__.py").exists()
                yield Import(whole if is_module else base, (alias.name,), child.lineno, kind)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for branch, branch_kind in ((child.body, "typing"), (child.orelse, kind)):
                yield from _imports(ast.Module(branch, []), branch_kind, module)
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, "function" if is_function else kind, module)


def _own(target: str) -> bool:
    return target == "sixfold" or target.startswith("sixfold.")


def _room_of(target: str) -> str:
    parts = target.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def broken_levels(module: Module) -> Iterator[str]:
    """Imports that do not lead down; typing-only ones too, since they are knowledge all the same."""
    for each in module.imports():
        if not _own(each.target):
            continue
        room, target = module.room, _room_of(each.target)
        if room == target or room in FACES:
            continue
        if target == "__init__" and each.names == ("__version__",):
            continue
        if room == OUTSIDE:
            yield f"{module.where}:{each.line} models/ imports {each.target}"
        elif target == OUTSIDE:
            if LEVELS[room] < TORCH_FROM:
                yield f"{module.where}:{each.line} {room}/ is below torch and imports {each.target}"
        elif target not in LEVELS:
            yield f"{module.where}:{each.line} imports {each.target}, which is in no room"
        elif LEVELS[target] >= LEVELS[room]:
            yield (
                f"{module.where}:{each.line} {room}/ (level {LEVELS[room]}) imports {target}/ "
                f"(level {LEVELS[target]})"
            )


def broken_torch_rule(module: Module) -> Iterator[str]:
    """Torch below level 5 or in the package's face, and anything of torch that begins with `_`."""
    below = module.room in FACES or LEVELS.get(module.room, TORCH_FROM) < TORCH_FROM
    for each in module.imports():
        is_torch = each.target.split(".")[0] == "torch"
        if is_torch and below:
            yield f"{module.where}:{each.line} imports {each.target} below level {TORCH_FROM}"
        parts = [*each.target.split("."), *each.names]
        if is_torch and any(part.startswith("_") and not part.startswith("__") for part in parts):
            yield f"{module.where}:{each.line} imports the private {'.'.join(parts)}"
    torch_names = {"torch", "nn", "dist", "F"}
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
            continue
        root: ast.expr = node.value
        while isinstance(root, ast.Attribute):
            root = root.value
        if isinstance(root, ast.Name) and root.id in torch_names:
            yield f"{module.where}:{node.lineno} uses the private {ast.unparse(node)}"


def broken_opening(module: Module) -> Iterator[str]:
    """Every module says what it is, who calls it and what it never does."""
    docstring = ast.get_docstring(module.tree) or ""
    long_enough = len(docstring.splitlines()) >= 3 or len(docstring) >= 120
    if not long_enough:
        yield f"{module.where}: opens with {len(docstring)} characters; what is it, who calls it?"


def broken_length(module: Module) -> Iterator[str]:
    lines = module.text.count("\n")
    if lines > MAX_LINES:
        yield f"{module.where}: {lines} lines, at most {MAX_LINES}"


def broken_print_rule(module: Module) -> Iterator[str]:
    if module.room in MAY_PRINT:
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{module.where}:{node.lineno} prints"


def broken_import_place(module: Module) -> Iterator[str]:
    """An import inside a function hides a need; outside cli/ a comment above says why it is there."""
    if module.room == "cli":
        return
    lines = module.text.splitlines()
    for each in module.imports():
        first = each.line
        while first > 1 and lines[first - 2].strip().startswith(("import ", "from ")):
            first -= 1
        said = lines[first - 2].strip().startswith("#") or "  # " in lines[each.line - 1]
        if each.kind == "function" and not said:
            yield f"{module.where}:{each.line} imports {each.target} in a function and says no reason"


EXCHANGES = re.compile(
    r"(all_|reduce|broadcast|scatter|gather|send|recv|isend|irecv|barrier|monitored_barrier|batch_isend)"
)
POOL = "sixfold.testing.worker"
"""The pool's ranks meet between two tests, outside of any mesh."""


def exchanges(module: Module) -> Iterator[tuple[str, int]]:
    """Name and line of each function of torch.distributed that exchanges something between ranks, called or
    handed on to be called."""
    for node in ast.walk(module.tree):
        is_named = isinstance(node, ast.Attribute) and EXCHANGES.match(node.attr)
        if is_named and ast.unparse(node.value) in ("dist", "torch.distributed"):
            yield node.attr, node.lineno


def broken_door(module: Module) -> Iterator[str]:
    """Ranks exchange data through the mesh alone, whose dispatcher records it."""
    if module.room == "mesh" or module.name == POOL:
        return
    for name, line in exchanges(module):
        yield f"{module.where}:{line} has dist.{name}; use the mesh"
    for each in module.imports():
        if each.target == "torch.distributed" and any(EXCHANGES.match(name) for name in each.names):
            yield f"{module.where}:{each.line} imports {', '.join(each.names)} of torch.distributed"


RULES = (
    broken_door,
    broken_levels,
    broken_torch_rule,
    broken_opening,
    broken_length,
    broken_print_rule,
    broken_import_place,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__.removeprefix("broken_"))
def test_every_module_keeps(rule) -> None:
    broken = list(dict.fromkeys(line for module in modules().values() for line in rule(module)))
    assert not broken, "\n" + "\n".join(broken)


def test_every_folder_is_a_room() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= LEVELS.keys() | {OUTSIDE}


def test_no_circles() -> None:
    """Among imports that happen at load time; every module is a node of its own."""
    known = modules()
    edges = {
        name: {
            each.target
            for each in module.imports()
            if each.kind == "module" and each.target in known and each.target != name
        }
        for name, module in known.items()
    }
    assert sum(map(len, edges.values())) > 50, "the imports were not found"
    assert _circle(edges) == []


def _circle(edges: dict[str, set[str]]) -> list[str]:
    done: set[str] = set()

    def follow(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(edges[name]):
            found = follow(target, [*path, name])
            if found:
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := follow(name, []))), [])


# The rules themselves are tested on sources that break them, so that none passes by being blind.


def made(room: str, text: str) -> Module:
    path = PACKAGE / room / "made_up.py"
    return Module(f"sixfold.{room}.made_up", path, text, ast.parse(text))


BROKEN = {
    "up": (broken_levels, "plan", "from sixfold.engine import Engine"),
    "up, relative": (broken_levels, "plan", "from ..engine import engine"),
    "same level": (broken_levels, "mesh", "from sixfold.launch import discover"),
    "for typing only": (
        broken_levels,
        "base",
        "if TYPE_CHECKING:\n    from sixfold.config import Config",
    ),
    "in a function": (broken_levels, "base", "def f():\n    import sixfold.config.tree"),
    "the package itself": (broken_levels, "plan", "import sixfold"),
    "models": (broken_levels, "models", "from sixfold.base.units import bytes_text"),
    "below torch": (broken_levels, "plan", "from sixfold.models.decoder import Decoder"),
    "torch low": (broken_torch_rule, "plan", "import torch"),
    "torch low, later": (broken_torch_rule, "program", "def f():\n    from torch import nn"),
    "private module": (broken_torch_rule, "mesh", "from torch._utils import x"),
    "private name": (broken_torch_rule, "mesh", "from torch.distributed import _functional_collectives"),
    "private attribute": (broken_torch_rule, "mesh", "import torch\ntorch._C._get_tracing_state()"),
    "private in dist": (broken_torch_rule, "mesh", "import torch.distributed as dist\ndist._coalescing()"),
    "no words": (broken_opening, "plan", '"""Things."""'),
    "too long": (broken_length, "plan", "x = 1\n" * (MAX_LINES + 1)),
    "print": (broken_print_rule, "plan", "print(1)"),
    "another door": (broken_door, "state", "dist.all_reduce(x)"),
    "another door, handed on": (broken_door, "state", "partial(dist.all_reduce, x)"),
    "another door, by name": (broken_door, "train", "from torch.distributed import broadcast"),
    "hidden import": (broken_import_place, "plan", "def f():\n    x = 1\n    import json"),
}


@pytest.mark.parametrize(("rule", "room", "text"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_rule_is_seen(rule, room: str, text: str) -> None:
    assert list(rule(made(room, text)))


def test_what_is_allowed_passes() -> None:
    text = (
        '"""What this is, in a few words.\n\nCalled by nobody; it never does anything at all.\n"""\n'
        "import torch\nfrom torch import nn\nfrom sixfold.plan import Plan\nfrom sixfold.mesh import Mesh\n"
        "from sixfold import __version__\ntorch.__version__\n"
        "def f():\n    # Slow to load.\n    import json\n"
    )
    assert [line for rule in RULES for line in rule(made("state", text))] == []


def test_circles_are_found() -> None:
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert _circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_each_kind_of_exchange_has_one_place() -> None:
    found = [name for module in modules().values() if module.name != POOL for name, _ in exchanges(module)]
    assert len(found) >= 7
    collectives = [name for name in found if name not in ("isend", "irecv")]
    assert len(collectives) >= 6
    assert sorted(set(collectives)) == sorted(collectives)


def test_no_comment_marks_work_left_undone() -> None:
    marks = re.compile(r"#.*\b(TODO|FIXME|XXX|HACK)\b")
    found = [
        f"{module.where}:{number}"
        for module in modules().values()
        for number, line in enumerate(module.text.splitlines(), 1)
        if marks.search(line)
    ]
    assert not found
