"""What files say now: read again when they change, without a thread that watches them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from knnlm.errors import KNNLMError

Content = TypeVar("Content")
Stamp = tuple[tuple[int, int, int], ...]

_log = logging.getLogger(__name__)


class WatchedFiles(Generic[Content]):
    """What ``read`` makes of some files, made again once one of them has changed. Safe to use from several threads.

    ``read`` raises a :class:`KNNLMError` or OSError for content that can't be used: from the constructor it goes to the caller; later
    it is logged, once for each change, and what was read before stays in force.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], Content]) -> None:
        self._paths, self._read = tuple(paths), read
        self._lock = threading.Lock()
        # Before the reading, so that a change in between is seen the next time.
        self._stamp = self._look()
        self._content = read()

    def current(self) -> Content:
        """What the files say now; costs one ``stat`` for each where nothing has changed."""
        with self._lock:
            stamp = self._look()
            if stamp != self._stamp:
                self._stamp = stamp
                self._reload()
            return self._content

    def _look(self) -> Stamp | None:
        try:
            found = [path.stat() for path in self._paths]
        except OSError:  # missing for the moment, as while it is replaced; reading says more
            return None
        return tuple((status.st_mtime_ns, status.st_size, status.st_ino) for status in found)

    def _reload(self) -> None:
        names = ", ".join(map(str, self._paths))
        try:
            self._content = self._read()
        except (KNNLMError, OSError) as error:  # files may vanish between two looks at them
            _log.error("%s changed and can't be used, so what was read before stays in force: %s", names, error)
        else:
            _log.info("%s changed and was read again", names)
