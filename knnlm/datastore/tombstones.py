"""Tombstones: the serials of removed documents, and the entries that a search leaves out for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from knnlm.arrays import map_array, write_array
from knnlm.datastore.documents import DocumentTable
from knnlm.datastore.files import written_aside
from knnlm.entry_mask import EntryMask
from knnlm.errors import StoreDamaged

Serials = np.ndarray[Any, np.dtype[np.int64]]


class Tombstones:
    """Removed documents of one table: ``serials`` and row numbers ``documents``, both ascending, and the ``mask`` of
    the entries that are left (None: nothing was removed)."""

    def __init__(self, table: DocumentTable, entries: int, serials: Serials) -> None:
        self.documents = np.flatnonzero(np.isin(table.serials, serials))
        self.serials: Serials = table.serials[self.documents]
        self.mask = EntryMask.without(entries, table.entry_ranges(self.documents)) if len(self.documents) else None


def write_serials(path: Path, serials: Serials) -> None:
    """Write a tombstone file whole or not at all; durable when this returns."""
    with written_aside(path) as file:
        write_array(file, serials)


def read_serials(path: Path) -> Serials:
    """The serials in a tombstone file; raises :class:`StoreDamaged`."""
    try:
        serials = map_array(path, "r")
    except ValueError as error:
        raise StoreDamaged(f"{path} is damaged: {error}") from error
    if serials.dtype != np.int64 or serials.ndim != 1 or bool((np.diff(serials) <= 0).any()):
        raise StoreDamaged(f"{path} is damaged: it holds {serials.dtype}{list(serials.shape)}, expected ascending int64 numbers.")
    return np.array(serials)
