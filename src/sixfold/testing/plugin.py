"""pytest plugin: `@pytest.mark.ranks(2)` runs a test's body on every rank of a pool.

    # conftest.py
    pytest_plugins = ["sixfold.testing.plugin"]

    @pytest.mark.ranks(1, 2, 4, timeout_s=60)   # the body runs once per size, on all its ranks
    def test_sum(tmp_path, num_ranks): ...

    @pytest.mark.ranks   # on sizes that go with other parameters
    @pytest.mark.parametrize(("zero", "num_ranks"), [(0, 1), (0, 2), (3, 2)])
    def test_step(zero): ...

Fixtures are made in pytest's process and their values travel to the ranks as pickles (tmp_path,
parametrised values); monkeypatch is made anew on each rank and undone there.
`fresh=True` gives a world that the test may destroy. Around every test, also those without ranks,
the plugin checks that pytest's own process is left as it was found. Under pytest-xdist each worker starts
a pool of its own, with its first test that has ranks. It never runs a test body in pytest.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from sixfold.base.units import bytes_text, duration_text
from sixfold.testing import hygiene
from sixfold.testing.pool import DEFAULT_TIMEOUT_S, PRELOAD, Pool
from sixfold.testing.report import RankFailure

_MAX_RANKS = 8
_POOL = pytest.StashKey[Pool]()


@dataclass(frozen=True)
class _Wish:
    """What one `ranks` mark asks for; without sizes the test is parametrised by `num_ranks` itself."""

    sizes: tuple[int, ...]
    timeout_s: float = DEFAULT_TIMEOUT_S
    fresh: bool = False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("ranks_preload", "modules the rank pool imports before it forks ranks", "args", default=[])


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "ranks(n, ..., timeout_s=60, fresh=False): run on every rank of n gloo ranks, once per n, or per "
        "num_ranks that the test is parametrised by",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    mark = metafunc.definition.get_closest_marker("ranks")
    if mark is None:
        return
    sizes = _wish(mark).sizes
    names = [
        each.args[0] if each.args else each.kwargs["argnames"]
        for each in metafunc.definition.iter_markers("parametrize")
    ]
    if bool(sizes) == any("num_ranks" in each for each in names):
        raise _refusal(mark)
    if sizes:
        metafunc.parametrize("num_ranks", sizes, indirect=True, ids=[f"ranks={size}" for size in sizes])


@pytest.fixture(autouse=True)
def num_ranks(request: pytest.FixtureRequest) -> int:
    """The world size this test runs on; 1 for a test without the `ranks` mark."""
    return int(getattr(request, "param", 1))


@pytest.fixture
def rank_pool(request: pytest.FixtureRequest) -> Pool:
    """The session's pool, for tests that run functions on it themselves and compare what ranks return."""
    return _pool(request.config)


@pytest.fixture(autouse=True)
def _left_as_found(request: pytest.FixtureRequest) -> Iterator[None]:
    # Set up before and torn down after all other fixtures of the test, so what those undo is undone here.
    before = hygiene.take(files=False)
    yield
    leaks = hygiene.leaks_since(before)
    if leaks:
        hygiene.restore(before)
        pytest.fail(f"{request.node.name} left something behind: {', '.join(leaks)}", pytrace=False)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    mark = pyfuncitem.get_closest_marker("ranks")
    if mark is None:
        return None
    wish = _wish(mark)
    pool = _pool(pyfuncitem.config)
    values: dict[str, Any] = pyfuncitem.funcargs
    ranks = values["num_ranks"]
    arguments = {name: values[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    failed = ""
    try:
        pool.run_task(pyfuncitem.obj, arguments, ranks=ranks, timeout_s=wish.timeout_s, fresh=wish.fresh)
    except RankFailure as failure:
        failed = str(failure)
    if failed:  # outside of the except clause: pytest would print both errors
        pytest.fail(failed, pytrace=False)
    for rank, text in enumerate(pool.printed):
        if text:
            print(f"--- printed by rank {rank}\n{text}", end="")
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    stats = config.stash[_POOL].stats if _POOL in config.stash else None
    if stats is None or not stats.runs:
        return
    name, growth = max(stats.growths.items(), key=lambda item: item[1])
    terminalreporter.write_line(
        f"rank pool: {stats.runs} runs, server started in {duration_text(stats.start_s)}, "
        f"{stats.crews} crews, {stats.discarded} discarded; largest growth {bytes_text(growth)} in {name}"
    )


def _pool(config: pytest.Config) -> Pool:
    if _POOL not in config.stash:
        pool = Pool(_MAX_RANKS, preload=(*PRELOAD, *config.getini("ranks_preload")), rewrite=True)
        config.stash[_POOL] = pool
        config.add_cleanup(pool.close)
    return config.stash[_POOL]


def _wish(mark: pytest.Mark) -> _Wish:
    unknown = sorted(mark.kwargs.keys() - {"timeout_s", "fresh"})
    legal = all(type(size) is int and 1 <= size <= _MAX_RANKS for size in mark.args)
    if unknown or not legal:
        raise _refusal(mark)
    return _Wish(tuple(mark.args), **mark.kwargs)


def _refusal(mark: pytest.Mark) -> pytest.UsageError:
    given = ", ".join([*map(repr, mark.args), *(f"{name}={value!r}" for name, value in mark.kwargs.items())])
    return pytest.UsageError(
        f"mark ranks({given})\n"
        f"  rule: ranks(n, ..., timeout_s=seconds, fresh=bool) with n from 1 to {_MAX_RANKS}, and without n "
        "where the test is parametrised by num_ranks itself\n"
        "  fix:  for instance @pytest.mark.ranks(1, 2, timeout_s=60)"
    )
