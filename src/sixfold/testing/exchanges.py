"""What ranks exchange while something runs, for tests and benchmarks that hold it against a formula.

Every exchange is an `Exchange` of the mesh that is started; here its topic is noted when it is. Nothing is
changed of what is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sixfold.base.ring import Topic
from sixfold.mesh.dispatch import Exchange


@contextmanager
def noted_exchanges() -> Iterator[list[Topic]]:
    """Inside, the topics of all exchanges that this process starts are added to the list, in order."""
    topics: list[Topic] = []
    start = Exchange.start

    def noting(exchange: Exchange) -> Exchange:
        topics.append(exchange.topic)
        return start(exchange)

    Exchange.start = noting  # type: ignore[method-assign,assignment]
    try:
        yield topics
    finally:
        Exchange.start = start  # type: ignore[method-assign]
