"""One writer at a time: the lock that build, append, removal and compaction hold on a store's folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from knnlm.errors import StoreLocked, StoreNotFound


@contextmanager
def locked(store: Path) -> Iterator[None]:
    """Hold the folder ``store`` for one writer. The system lets go of it when the process ends, however it ends.

    Raises :class:`StoreLocked` at once if another process holds it, :class:`StoreNotFound` if there is no such folder.
    """
    try:
        descriptor = os.open(store, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        raise StoreNotFound(f"There is no datastore at {store}: no such folder.") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreLocked(f"Another build, append, removal or compaction is writing {store}; wait for it.") from None
        yield
    finally:
        os.close(descriptor)


def being_written(store: Path) -> bool:
    """Whether another process holds the lock of ``store`` now."""
    try:
        with locked(store):
            return False
    except StoreLocked:
        return True
