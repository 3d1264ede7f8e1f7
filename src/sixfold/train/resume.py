"""Where a run to be resumed stands, and what was changed since its newest checkpoint.

The launcher asks, so that what cannot go on is refused before ranks start; every rank asks again, since
other launchers start ranks directly. It reads the run folder, and writes and trains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sixfold.base.errors import CheckpointError, ConfigError
from sixfold.checkpoint import latest, open_checkpoint
from sixfold.checkpoint.finding import CHECKPOINTS
from sixfold.config import Resolved, load
from sixfold.config.problems import show
from sixfold.config.resolved import CONFIG
from sixfold.config.schema import flat
from sixfold.data.corpus import Corpus
from sixfold.data.record import TOKENIZER
from sixfold.monitor.journal import FILE_NAME, read_records
from sixfold.train.vocabulary import is_kept

_SHAPES = (
    "model.width",
    "model.num_layers",
    "model.num_heads",
    "model.num_kv_heads",
    "model.ffn_width",
    "model.tie_embeddings",
    "model.num_experts",
    "model.shared_experts",
    "model.hf",
    "model.lora_rank",
    "model.lora_targets",
    "model.lora_alpha",
    "model.lora_from",
    "data.vocab_size",
    "data.tokenizer",
)
"""What the saved tensors were built from: another value is another model."""


@dataclass(frozen=True)
class Standing:
    """A run to be resumed.

    Args:
        folder: of the run.
        newest: its newest complete checkpoint.
        step: updates made there.
        changes: a line for every value that differs from the run's own configuration, and for its text.
        is_complete: whether every update is made and the held-out part is measured.
    """

    folder: Path
    newest: Path
    step: int
    changes: tuple[str, ...]
    is_complete: bool

    def __str__(self) -> str:
        if self.is_complete:
            return f"already complete after update {self.step}; nothing to do (raise train.steps to go on)"
        return "\n".join([f"resumed     after update {self.step} from {self.newest}", *self.changes])

    def reading(self, corpus: Corpus) -> Standing:
        """The same where it goes on with `corpus`; told if that is not what was trained on before.

        Raises:
            ConfigError: its vocabulary is another.
        """
        if not is_kept(self.folder, corpus):
            file = self.folder / TOKENIZER
            raise ConfigError(
                f"the vocabulary of the corpus {corpus.folder} is not {file}: data.path has other text",
                rule="a resumed run goes on with the vocabulary that its weights were trained with",
                fix="put the text back as it was, or start a new run from these weights with --config "
                f"{self.folder / CONFIG} --set model.weights={self.newest} --set data.tokenizer={file}",
            )
        told: list[dict[str, Any]] = [one["facts"] for one in _records(self.folder) if "facts" in one]
        facts = told[-1] if told else {}
        if facts.get("corpus", corpus.fingerprint) == corpus.fingerprint:
            return self
        change = (
            "changed since the save: the text of data.path, "
            f"{facts['num_train_tokens']} -> {corpus.num_train_tokens} training tokens of the same vocabulary"
        )
        return replace(self, changes=(*self.changes, change))


def stand(folder: Path, resolved: Resolved) -> Standing:
    """Compare the run in `folder` with what is asked of it now.

    Raises:
        CheckpointError: it has no complete checkpoint.
        ConfigError: another model is asked for, or fewer updates than are made.
    """
    newest = latest(folder / CHECKPOINTS)
    if newest is None:
        raise CheckpointError(
            f"{folder / CHECKPOINTS} holds no complete checkpoint",
            rule="a run is resumed from its newest complete checkpoint",
            fix=f"start it anew in another folder, or remove {folder}: it was stopped before its first save",
        )
    changes = _changes(folder, resolved)
    _refuse_another_model(folder, changes)
    step, asked = open_checkpoint(newest).step, resolved.config.train.steps
    if asked is not None and asked < step:
        raise ConfigError(
            f"train.steps = {asked} ({resolved.origins['train.steps']}), but {newest} is after update {step}",
            rule="train.steps counts all updates of a run, those before the save included",
            fix=f"set train.steps to more than {step}, for example --set train.steps={step + asked}",
        )
    return Standing(
        folder=folder,
        newest=newest,
        step=step,
        changes=tuple(f"changed since the save: {path} {change}" for path, change in changes.items()),
        is_complete=asked == step and _is_measured(folder, step),
    )


def _changes(folder: Path, resolved: Resolved) -> dict[str, str]:
    """`{"batch.global": "8 -> 6"}` for every value that is not the one the run was saved under."""
    before, now = flat(load(folder / CONFIG).config), flat(resolved.config)
    return {
        path: f"{_text(before[path])} -> {_text(value)}"
        for path, value in now.items()
        if value != before[path]
    }


def _text(value: object) -> str:
    return "unset" if value is None else show(value)


def _refuse_another_model(folder: Path, changes: dict[str, str]) -> None:
    reshaped = [path for path in _SHAPES if path in changes]
    if reshaped:
        raise ConfigError(
            ", ".join(f"{path} {changes[path]}" for path in reshaped) + f" since {folder} was saved",
            rule="a resumed run goes on with the model that its checkpoints hold",
            fix=f"leave {' and '.join(reshaped)} as it is in {folder / CONFIG}, or start a new run",
        )


def _is_measured(folder: Path, step: int) -> bool:
    """Whether the held-out part was measured after this update; a run may have ended just before."""
    return any(one.get("step") == step and "held_out_bits_per_byte" in one for one in _records(folder))


def _records(folder: Path) -> list[dict[str, Any]]:
    return read_records(folder / FILE_NAME)
