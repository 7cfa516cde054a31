"""What other processes do to the datastores that are in use. Knows no engine and no request."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterable

from knnlm.errors import KNNLMError
from knnlm_server.served_stores import ServedStore

SECONDS_BETWEEN_LOOKS = 0.25

logger = logging.getLogger(__name__)


class StoreWatch:
    """Takes over removals from the datastores on disk. For the thread that searches: between its looks nothing changes.

    ``in_use`` says which are to be looked at. One that can't be read any more (deleted, damaged) is said once in the log;
    what is open stays as it is. ``clock``: seconds that only go forward.
    """

    def __init__(self, in_use: Callable[[], Iterable[ServedStore]], clock: Callable[[], float] = time.monotonic) -> None:
        self._in_use, self._clock = in_use, clock
        self._next_look = -float("inf")
        self._unreadable: weakref.WeakSet[ServedStore] = weakref.WeakSet()

    def look(self) -> None:
        """Call before each search; looks at the datastores at most every :data:`SECONDS_BETWEEN_LOOKS`."""
        now = self._clock()
        if now < self._next_look:
            return
        self._next_look = now + SECONDS_BETWEEN_LOOKS
        for served in self._in_use():
            self._look_at(served)

    def hurry(self) -> None:
        """Make the next look come with the next call, after a change that is known of; from any thread."""
        self._next_look = -float("inf")

    def _look_at(self, served: ServedStore) -> None:
        try:
            changed = served.store.refresh()
        except (KNNLMError, OSError) as error:
            if served not in self._unreadable:
                logger.warning("removals from the datastore %s can't be seen, and it is served as it was: %s", served.name, error)
            self._unreadable.add(served)
            return
        if changed or served in self._unreadable:
            removed = len(served.store.tombstones.documents)
            logger.info("the datastore %s was read again: %d of its documents are removed", served.name, removed)
        self._unreadable.discard(served)
