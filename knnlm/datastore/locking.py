"""One writer at a time: the lock that build, append, removal and compaction hold on a store's folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from knnlm.errors import StoreLocked


@contextmanager
def locked(store: Path) -> Iterator[None]:
    """Hold the folder ``store`` for one writer. The system lets go of it when the process ends, however it ends.

    Raises :class:`StoreLocked` at once if another process holds it.
    """
    descriptor = os.open(store, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreLocked(f"Another build, append, removal or compaction is writing {store}; wait for it.") from None
        yield
    finally:
        os.close(descriptor)
