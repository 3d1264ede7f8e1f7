"""The samples of a run: drawn from the sources of a corpus, as its settings say.

Used by the loop and by `preview`, so that both see the same. It knows no model and no ranks.
"""

from __future__ import annotations

from sixfold.config import Config
from sixfold.data.corpus import Corpus
from sixfold.data.stream import Blend, TokenStream


def samples_of(config: Config, corpus: Corpus) -> Blend:
    """What the run trains on, sample after sample.

    Raises:
        DataError: a source has too little text for one sample, or the weights are not one for each.
    """
    length = config.data.sequence_length
    streams = [TokenStream(part.train, length, config.seed) for part in corpus.parts]
    return Blend(streams, config.data.weights)
