"""Which samples an update of a run will see, or saw, found without training anything.

Called by `sixfold data inspect`. It reads a run's settings and metrics, and the corpus; what it says is
computed by the same functions that feed the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sixfold.base.errors import DataError
from sixfold.config import Config
from sixfold.data.corpus import Corpus
from sixfold.monitor.journal import FILE_NAME, read_records
from sixfold.plan import decide_batch
from sixfold.train.samples import samples_of


@dataclass(frozen=True)
class Preview:
    """The global batch of one update.

    Args:
        step: the update, counted from 1.
        is_past: whether the run has made it.
        first: global number of its first sample.
        sources: name of the source of each sample.
        samples: token ids, [samples, sequence_length + 1].
    """

    step: int
    is_past: bool
    first: int
    sources: tuple[str, ...]
    samples: npt.NDArray[np.int64]


def preview(config: Config, corpus: Corpus, step: int, run_folder: Path | None = None) -> Preview:
    """The global batch of update `step`.

    Args:
        run_folder: of the run that is asked about; its metrics tell what was consumed, whatever its batch
            was before it was last resumed.

    Raises:
        DataError: updates count from 1.
    """
    if step < 1:
        raise DataError(
            f"step {step}", rule="updates are counted from 1, as in metrics.jsonl", fix="give --step 1"
        )
    size = decide_batch(config.batch, data_ranks=1, sequence_length=config.data.sequence_length).size
    consumed = _consumed(run_folder)
    known = max((each for each in consumed if each < step), default=0)
    first = consumed.get(known, 0) + (step - 1 - known) * size
    if step in consumed:
        size = consumed[step] - first
    blend = samples_of(config, corpus)
    sources, _ = blend.origins(np.arange(first, first + size, dtype=np.int64))
    return Preview(
        step=step,
        is_past=any(each >= step for each in consumed),
        first=first,
        sources=tuple(corpus.record.parts[index].name for index in sources),
        samples=blend.batch(first, range(size)),
    )


def _consumed(run_folder: Path | None) -> dict[int, int]:
    """Samples consumed after each update that the run has recorded."""
    if run_folder is None:
        return {}
    records = read_records(run_folder / FILE_NAME)
    return {one["step"]: one["samples"] for one in records if "step" in one and "samples" in one}
