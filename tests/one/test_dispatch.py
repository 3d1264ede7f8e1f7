"""What the dispatcher records, where its rank and the watcher beside it come to the same exchanges."""

from __future__ import annotations

import threading
from collections.abc import Callable

from sixfold.base.ring import OVER, Topic
from sixfold.mesh.dispatch import Dispatcher


class OnDevice:
    """Work that a device has yet to do; whoever asks about it is held up by `meanwhile`, once."""

    def __init__(self) -> None:
        self.is_done = False
        self.meanwhile: Callable[[], object] | None = None

    def wait(self) -> None:
        """Nothing that blocks."""

    def is_completed(self) -> bool:
        """Whether it is done by now."""
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return self.is_done


def test_two_threads_that_settle_at_once_note_what_has_ended_and_nothing_else() -> None:
    dispatcher = Dispatcher()
    ring = dispatcher.ring
    works, places = [OnDevice(), OnDevice()], []
    for number, work in enumerate(works):
        places.append(ring.post(Topic("all-reduce", 2, "float32", 8, "0-1"), number + 1, "train.py:9"))
        dispatcher.linger(ring.num_posted, places[-1], [work])

    def watch() -> None:
        watcher = threading.Thread(target=dispatcher.settle)
        watcher.start()
        watcher.join()

    works[0].is_done, works[0].meanwhile = True, watch
    dispatcher.settle()
    assert ring.times[places[0] + OVER] > 0
    assert ring.times[places[1] + OVER] == 0
    works[1].is_done = True
    dispatcher.settle()
    assert ring.times[places[1] + OVER] > 0
