"""Assembles the rooms from a plan; owns no algorithm.

`initialize` is the front door for a user's own script; `train` walks through it too.
"""

from sixfold.engine.engine import Engine
from sixfold.engine.initialize import initialize

__all__ = ["Engine", "initialize"]
