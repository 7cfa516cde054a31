"""What other processes do to the datastore that is served. Knows no engine and no request."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from knnlm.datastore.reader import Datastore
from knnlm.errors import KNNLMError

SECONDS_BETWEEN_LOOKS = 0.25

logger = logging.getLogger(__name__)


class StoreWatch:
    """Takes over removals from the datastore on disk. For the thread that searches: between its looks nothing changes.

    A store that can't be read any more (deleted, damaged) is said once in the log; what is open stays as it is.
    ``clock``: seconds that only go forward.
    """

    def __init__(self, store: Datastore, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._clock = store, clock
        self._next_look = -float("inf")
        self._readable = True

    def look(self) -> None:
        """Call before each search; looks at the store at most every :data:`SECONDS_BETWEEN_LOOKS`."""
        now = self._clock()
        if now < self._next_look:
            return
        self._next_look = now + SECONDS_BETWEEN_LOOKS
        try:
            changed = self._store.refresh()
        except (KNNLMError, OSError) as error:
            if self._readable:
                logger.warning("removals from the datastore can't be seen, and it is served as it was: %s", error)
            self._readable = False
            return
        if changed or not self._readable:
            logger.info("the datastore was read again: %d of its documents are removed", len(self._store.tombstones.documents))
        self._readable = True
