"""Errors: the three sentences, and a reading of the source that every raise has all of them."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import pytest

import sixfold
from sixfold.base import errors

SOURCE = Path(sixfold.__file__).parent
KINDS = {
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.SixfoldError)
}


def _has_value(node: ast.AST) -> bool:
    """Whether a text is computed at least in part: an f-string with a placeholder, or no literal at all."""
    if isinstance(node, ast.JoinedStr):
        return any(isinstance(part, ast.FormattedValue) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _has_value(node.left) or _has_value(node.right)
    return isinstance(node, (ast.Name, ast.Attribute, ast.Call, ast.Subscript, ast.IfExp))


def _faults(tree: ast.AST, known: set[str]) -> list[str]:
    """What is missing where an error of the tree is made, as `line: what`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, (ast.Name, ast.Attribute)):
            if _name(node.exc) in known:
                found.append(f"{node.lineno}: raised without a text")
        elif isinstance(node, ast.Call) and _name(node.func) in known:
            found += [f"{node.lineno}: {what}" for what in _missing(node)]
    return found


def _missing(call: ast.Call) -> list[str]:
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    given = call.args[0] if call.args else keywords.get("given")
    missing = [f"no {name}=" for name in ("rule", "fix") if name not in keywords]
    missing += [
        f"{name} is empty"
        for name, text in keywords.items()
        if isinstance(text, ast.Constant) and not text.value
    ]
    return missing if given is not None and _has_value(given) else [*missing, "no value in the text"]


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "base" / "errors.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_error_has_a_value_a_rule_and_a_fix(path: Path) -> None:
    assert _faults(ast.parse(path.read_text(encoding="utf-8")), KINDS) == []


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise ConfigError(f'{a}', rule='r', fix='f')", []),
        ("raise errors.ConfigError(text, rule='r', fix='f')", []),
        ("raise ConfigError('a' + f'{b}', rule='r', fix='f')", []),
        ("raise ValueError('nothing')", []),
        ("raise ConfigError('a', rule='r', fix='f')", ["1: no value in the text"]),
        ("raise ConfigError(f'a', rule='r', fix='f')", ["1: no value in the text"]),
        ("raise ConfigError(f'{a}', rule='r')", ["1: no fix="]),
        ("error = ConfigError(f'{a}', fix='f')", ["1: no rule="]),
        ("raise ConfigError(f'{a}', rule='', fix='f')", ["1: rule is empty"]),
        ("raise base.StateError", ["1: raised without a text"]),
    ],
)
def test_the_reading_itself(code: str, expected: list[str]) -> None:
    assert _faults(ast.parse(code), KINDS) == expected


def test_the_tree_was_found() -> None:
    assert {"SixfoldError", "ConfigError", "PlanError", "WorkerError"} <= KINDS
    assert any(path.name == "problems.py" for path in FILES)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_errors_print_three_sentences_and_travel_between_processes(kind: str) -> None:
    error = getattr(errors, kind)("width = 3", rule="width is even", fix="set width = 4")
    assert str(error) == "width = 3\n  rule: width is even\n  fix:  set width = 4"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), again.exit_code) == (str(error), error.exit_code)
