"""The learning rate as a pure function of the update's number.

Decided from `lr_schedule` and the number of steps; it does not know ranks, accumulation or time.
Read by the engine before each update.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from sixfold.base.errors import PlanError
from sixfold.base.plugins import load_plugin
from sixfold.config import Config

_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: 1.0 - t,
    "cosine": lambda t: 0.5 * (1.0 + math.cos(math.pi * t)),
}
"""From 1 at the start to 0 at the end."""


@dataclass(frozen=True)
class LearningRate:
    """A factor on the peak learning rate for each update.

    Args:
        shape: "constant", "linear", "cosine" or a plugin's name, after the warm-up.
        warmup_steps: updates of linear rise.
        final_ratio: factor at the last update, for linear and cosine.
        num_steps: updates in the run; None while it is not known.
    """

    shape: str = "constant"
    warmup_steps: int = 0
    final_ratio: float = 0.0
    num_steps: int | None = None

    @property
    def moves(self) -> bool:
        """Whether it ever differs from the peak; otherwise the user's own scheduler is left alone."""
        return self.shape != "constant" or self.warmup_steps > 0

    def ending_at(self, num_steps: int) -> LearningRate:
        """The same shape over `num_steps` updates."""
        return replace(self, num_steps=num_steps)

    def check_end(self) -> None:
        """Raise PlanError where the shape needs the number of steps and it is not known."""
        if self.shape != "constant" and self.num_steps is None:
            raise PlanError(
                f"lr_schedule.name = {self.shape!r} without a number of steps",
                rule=f"a {self.shape} schedule ends at the last update, so it must know which that is",
                fix="set train.steps, or lr_schedule.name = 'constant'",
            )

    def factor(self, step: int) -> float:
        """Factor for update number `step`, from 0.

        The warm-up rises as (step + 1) / warmup_steps. With t from 0 to 1 over the rest, linear is
        1 - (1 - final) t and cosine final + (1 - final) (1 + cos(pi t)) / 2; a plugin's f(t) stands in the
        place of (1 + cos(pi t)) / 2.

        Raises:
            PlanError: the shape needs the number of steps and it is not known.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        self.check_end()
        if self.shape == "constant":
            return 1.0
        assert self.num_steps is not None, "checked above"
        rest = max(1, self.num_steps - 1 - self.warmup_steps)
        t = min(1.0, (step - self.warmup_steps) / rest)
        falling = _SHAPES.get(self.shape) or load_plugin("schedule", self.shape)
        return self.final_ratio + (1.0 - self.final_ratio) * float(falling(t))


def decide_learning_rate(config: Config) -> LearningRate:
    """The schedule that the configuration asks for."""
    asked = config.lr_schedule
    return LearningRate(asked.name, asked.warmup_steps, asked.final_ratio, config.train.steps)
