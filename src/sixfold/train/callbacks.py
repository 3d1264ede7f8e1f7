"""What happens around updates: metrics, evaluation, saving. One small class each.

The loop calls them in order on every rank after each update, and at the end, when the last save comes first.
They never change an update; a new habit of the loop is a new class here.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Protocol

from torch import nn

from sixfold.checkpoint import Keep, step_folder
from sixfold.checkpoint.finding import CHECKPOINTS
from sixfold.engine.persistence import ADAPTERS
from sixfold.launch import current_session
from sixfold.models.lora import Adapted, adapters_of
from sixfold.monitor.meters import StepRecord
from sixfold.train import adapters
from sixfold.train.evaluate import bits_per_byte
from sixfold.train.folder import ADAPTER_FOLDER
from sixfold.train.run import Run


class Callback(Protocol):
    """What the loop calls on every rank."""

    def after_update(self, run: Run, record: StepRecord) -> None:
        """One update has been made."""

    def at_end(self, run: Run, finished: bool) -> None:
        """The last update has been made, or, not `finished`, the run was asked to stop."""


class Metrics:
    """The live line, and `metrics.jsonl` with one record an update."""

    def __init__(self, run: Run) -> None:
        self._every = run.resolved.config.monitor.every

    def after_update(self, run: Run, record: StepRecord) -> None:
        is_due = record.step % self._every == 0 or record.step == run.total_steps
        if is_due and run.is_first:
            run.record(record.as_dict() | _routing(run))
            run.console.update(record)
        if run.is_first and _is_milestone(record.step, run.total_steps):
            loads = {name: _rounded(layer.load) for name, layer in run.engine.routing().items()}
            if loads:
                run.record({"step": record.step, "expert_loads": loads})

    def at_end(self, run: Run, finished: bool) -> None:
        run.console.close()


def _routing(run: Run) -> dict[str, float]:
    """How tokens were shared out over experts, if there are any: the worst layer, means over layers, and the
    sum of their penalties."""
    layers = run.engine.routing().values()
    if not layers:
        return {}
    return {
        "expert_imbalance": max(layer.imbalance for layer in layers),
        "expert_dropped": mean(layer.dropped for layer in layers),
        "expert_entropy": mean(layer.entropy for layer in layers),
        "expert_penalty": sum(layer.penalty for layer in layers),
    }


def _is_milestone(step: int, total_steps: int) -> bool:
    """Updates 1, 2, 4, 8 and so on, and the last: few enough to write down a number for every expert."""
    return step == total_steps or step & (step - 1) == 0


def _rounded(load: Sequence[float]) -> list[float]:
    return [round(part, 5) for part in load]


class Evaluations:
    """Bits per byte on the held-out part, beside those of general compressors on the same bytes."""

    def __init__(self, run: Run) -> None:
        self._every = run.resolved.config.train.eval_every

    def after_update(self, run: Run, record: StepRecord) -> None:
        due = self._every is not None and record.step % self._every == 0
        if due and record.step != run.total_steps:
            run.say(f"update {record.step}: held-out bits per byte {self._measure(run)['']:.4f}")

    def at_end(self, run: Run, finished: bool) -> None:
        if not finished:
            return
        measured = self._measure(run)
        others = [f"{name} {bits:.3f}" for name, bits in run.corpus.compressors.items()]
        beside = f"   (on the same bytes: {', '.join(others)})" if others else ""
        run.say(f"\nheld-out bits per byte: {measured['']:.4f}{beside}")
        if len(measured) > 2:
            parts = ", ".join(f"{name} {bits:.4f}" for name, bits in measured.items() if name)
            run.say(f"of each source: {parts}")

    def _measure(self, run: Run) -> dict[str, float]:
        measured = bits_per_byte(run.engine, run.corpus, run.resolved.config)
        parts = {name: bits for name, bits in measured.items() if name and len(measured) > 2}
        record = {"step": run.engine.num_steps, "held_out_bits_per_byte": measured[""]}
        run.record(record | ({"held_out_parts": parts} if parts else {}))
        return measured


class Checkpoints:
    """Saves every so many updates and at the end; keeps the newest ones.

    Of a frozen model with adapters the adapters alone: the rest is what the run started from.
    """

    def __init__(self, run: Run) -> None:
        self._only = ADAPTERS if adapters.is_asked(run.resolved.config.model) else None
        self._every = run.resolved.config.checkpoint.every
        asked = run.resolved.config.checkpoint
        self._keep = Keep(asked.keep_last, asked.keep_every)
        self._saved_step = run.engine.num_steps if run.engine.num_steps else -1
        # An impossible save is to fail now, not after hours.
        run.engine.rehearse_save(run.folder / CHECKPOINTS)

    def after_update(self, run: Run, record: StepRecord) -> None:
        if self._every is not None and record.step % self._every == 0:
            self._save(run)

    def at_end(self, run: Run, finished: bool) -> None:
        if self._saved_step != run.engine.num_steps:
            self._save(run)
        with current_session().saving():
            run.engine.wait_for_save()

    def _save(self, run: Run) -> None:
        folder = run.folder / CHECKPOINTS
        if run.is_first:
            run.keep_config()  # who resumes goes on with the length of the save
        with current_session().saving():
            run.engine.save(step_folder(folder, run.engine.num_steps), only=self._only, keep=self._keep)
        self._saved_step = run.engine.num_steps


class Adapters:
    """Leaves the adapters of a run in its folder, as `peft` reads them."""

    def after_update(self, run: Run, record: StepRecord) -> None:
        """They are in every checkpoint."""

    def at_end(self, run: Run, finished: bool) -> None:
        factors = [parameter for _, part in adapters_of(run.engine.module) for parameter in _factors_of(part)]
        with run.engine.gathered(factors) as module:
            if run.is_first:
                folder = run.folder / ADAPTER_FOLDER
                adapters.write_adapter(folder, module, run.resolved.config.model.hf)
                run.say(f"adapter     {folder}")


def _factors_of(part: Adapted) -> list[nn.Parameter]:
    return [part.lora_A.weight, part.lora_B.weight]
