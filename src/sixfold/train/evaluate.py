"""Held-out bits per byte: every held-out token is predicted once, whatever the layout.

Called by the loop's callbacks on all ranks together; it changes nothing in the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from sixfold.config import Config
from sixfold.data.corpus import Corpus
from sixfold.data.stream import Tokens, windows
from sixfold.engine import Engine
from sixfold.plan.batch import share
from sixfold.train.subject import fields_of

WINDOWS_PER_RANK = 16


def bits_per_byte(engine: Engine, corpus: Corpus, config: Config) -> dict[str, float]:
    """Bits that the model needs per byte of held-out text, document marks included in the bits.

    bits per byte = (summed negative log-likelihood in nats) / ln 2 / (bytes of text).

    Returns:
        By source, and of all together under "".
    """
    bits = [_nats(engine, corpus, part.held_out, config) / math.log(2) for part in corpus.parts]
    each = {
        part.name: own / part.num_held_out_bytes for part, own in zip(corpus.record.parts, bits, strict=True)
    }
    return {"": sum(bits) / corpus.num_held_out_bytes, **each}


def _nats(engine: Engine, corpus: Corpus, tokens: Tokens, config: Config) -> float:
    total = 0.0
    for window_batch in _batches(tokens, config.data.sequence_length, WINDOWS_PER_RANK * engine.data_ranks):
        part = share(len(window_batch), engine.data_rank, engine.data_ranks)
        own = window_batch[part.start : part.stop]
        result = engine.eval_step(fields_of(config, corpus, own))
        total += result.loss * result.weight
    return total


def _batches(tokens: Tokens, sequence_length: int, size: int) -> Iterator[npt.NDArray[np.int64]]:
    """Windows of one length stacked, `size` at a time; the last, shorter one alone."""
    held: list[npt.NDArray[np.int64]] = []
    for window in windows(tokens, sequence_length):
        if held and (len(held) == size or len(window) != len(held[0])):
            yield np.stack(held)
            held = []
        held.append(window)
    if held:
        yield np.stack(held)
