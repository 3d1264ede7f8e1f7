"""The loss scale under way: grows while gradients are finite, backs off when they overflow.

Owned by the player, which multiplies each loss with it and takes it off the gradients; saved by the
engine. What it does at all is the plan's `LossScaling`. It looks at no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping

from sixfold.plan import LossScaling


class LossScaler:
    """A factor on losses, the same on every rank because it follows from the global norm alone.

    Attributes:
        scale: the factor of the update under way.
    """

    def __init__(self, plan: LossScaling) -> None:
        self._plan = plan
        self.scale = plan.initial
        self._num_finite = 0

    def passed(self) -> None:
        """An update was finite."""
        if self._plan.growth_steps is None:
            return
        self._num_finite += 1
        if self._num_finite == self._plan.growth_steps:
            self.scale *= self._plan.growth
            self._num_finite = 0

    def back_off(self) -> bool:
        """An update overflowed; False where a smaller scale would not help: it is fixed, or 1 already."""
        smaller = self.scale * self._plan.backoff
        if self._plan.growth_steps is None or smaller < 1.0:
            return False
        self.scale, self._num_finite = smaller, 0
        return True

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"scale": self.scale, "num_finite": self._num_finite}

    def load(self, saved: Mapping[str, float] | None) -> None:
        """Inverse of `state`; a fixed scale stays what is configured, and so does one never saved."""
        if saved is not None and self._plan.growth_steps is not None and saved["scale"] >= 1.0:
            self.scale, self._num_finite = float(saved["scale"]), int(saved["num_finite"])
