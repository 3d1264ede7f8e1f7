"""Runs a user's own script or module as a rank: `python -m sixfold.launch.script script.py args...`.

The launcher starts it for `sixfold run`. To the script everything looks as under plain `python`
(`__main__`, `sys.argv`, `sys.path[0]`); around it stands a worker session, so that failures are told
and stop requests answered even if the script has never heard of them. It touches no tensor library.
"""

from __future__ import annotations

import io
import os
import runpy
import sys
import types
from collections.abc import Sequence

from sixfold.base.errors import EXIT_USAGE, ConfigError
from sixfold.launch.worker import worker_session


def main(arguments: Sequence[str]) -> int:
    """Run `script.py args...`, or `-m module args...`; returns the exit code of a script that ended well."""
    is_module = arguments[:1] == ["-m"]
    target = arguments[1:] if is_module else arguments
    if not target:
        sys.stderr.write("usage: python -m sixfold.launch.script [-m module | script.py] [args...]\n")
        return EXIT_USAGE
    with worker_session():
        sys.argv = list(target)
        if is_module:
            runpy.run_module(target[0], run_name="__main__", alter_sys=True)
        else:
            if not sys.flags.safe_path:
                sys.path[0] = os.path.dirname(os.path.realpath(target[0]))
            _run_file(target[0])
    return 0


def _run_file(path: str) -> None:
    """As `python path` does; runpy.run_path would show the script another `sys.argv[0]` or `__file__`."""
    if not os.path.isfile(path):
        raise ConfigError(
            f"no script at {path!r} (working directory {os.getcwd()})",
            rule="the script to run is an existing Python file",
            fix="give its path relative to the working directory, or use -m for a module",
        )
    module = types.ModuleType("__main__")
    module.__file__ = os.path.abspath(path)
    sys.modules["__main__"] = module  # for pickle, and for loader workers that are spawned
    with io.open_code(path) as source:
        code = compile(source.read(), module.__file__, "exec", dont_inherit=True)
    exec(code, module.__dict__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
