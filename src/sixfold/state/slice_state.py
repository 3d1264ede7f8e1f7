"""State of an optimizer that updates slices of flat buffers: it has none of parameters, and says so.

Put in the place of torch's own by `BoundOptimizer`. Torch's answers for any tensor, with an empty dictionary
that nothing reads: an edit by parameter would be lost without a word. What belongs to slices goes on as in
torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Self

from sixfold.base.errors import StateError


class SliceState(defaultdict[Any, Any]):
    """State by slice.

    Attributes:
        names: of the model's parameters, by id.
    """

    names: Mapping[int, str] = {}

    @classmethod
    def guarding(cls, state: Mapping[Any, Any], names: Mapping[int, str]) -> Self:
        """The same state, with the same default for what has none.

        Raises:
            StateError: there is some of a parameter.
        """
        made = cls(getattr(state, "default_factory", None))
        made.names = names
        for key, value in state.items():
            made[key] = value
        return made

    def __missing__(self, key: object) -> Any:
        return super().__missing__(self._own(key))

    def __setitem__(self, key: object, value: Any) -> None:
        super().__setitem__(self._own(key), value)

    def __delitem__(self, key: object) -> None:
        super().__delitem__(self._own(key))

    def __contains__(self, key: object) -> bool:
        return super().__contains__(self._own(key))

    def get(self, key: object, *default: Any) -> Any:
        """As of any dictionary."""
        return super().get(self._own(key), *default)

    def pop(self, key: object, *default: Any) -> Any:
        """As of any dictionary."""
        return super().pop(self._own(key), *default)

    def setdefault(self, key: object, default: Any = None) -> Any:
        """As of any dictionary."""
        return super().setdefault(self._own(key), default)

    def _own(self, key: object) -> object:
        """`key`, which is no parameter of the model."""
        if id(key) in self.names:
            raise StateError(
                f"the optimizer's state of {self.names[id(key)]}, asked for by parameter",
                rule="the optimizer of an engine updates slices of flat buffers, and keeps state of these",
                fix='edit the state of everything in group["params"] alike, for each group in '
                "engine.optimizer.param_groups, or clear it with engine.optimizer.state.clear()",
            )
        return key
