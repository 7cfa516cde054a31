"""Whether an index holds every entry once and can answer: FAISS has no checksums, and searches damaged files without a word."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from knnlm.errors import StoreDamaged
from knnlm.index import EXACT, INDEX_FILE, faiss_said, import_faiss, read_index_facts, read_index_file
from knnlm.inverted_lists import InvertedLists

ROWS_AT_ONCE = 65_536

Ids = np.ndarray[Any, np.dtype[np.int64]]


def index_problems(folder: Path, entries: int) -> Iterator[str]:
    """A sentence for each thing that is wrong with the index in ``folder`` of a datastore with ``entries``.

    Every number from 0 to ``entries`` - 1 must stand in it once and no other, and its cells and whole keys must be
    finite. Takes a byte an entry. An index that can't be opened at all is one problem.
    """
    path = folder / INDEX_FILE
    try:
        facts = read_index_facts(folder)
        if facts.entries != entries:
            yield f"{folder} indexes {facts.entries} entries, but the datastore has {entries}."
        if facts.factory == EXACT:
            return
        index = read_index_file(path)
        yield from (f"{path} {problem}" for problem in _wrong_ids(_ids(folder, index), entries))
    except StoreDamaged as damage:
        yield str(damage)
        return
    yield from (f"{path} {problem}" for problem in _wrong_vectors(index))


def _ids(folder: Path, index: Any) -> Iterator[Ids]:
    """All ids in the index, in pieces."""
    faiss = import_faiss()
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is None:
        yield faiss.vector_to_array(index.id_map)
    elif isinstance(faiss.downcast_InvertedLists(inverted.invlists), faiss.ArrayInvertedLists):
        lists = InvertedLists.of_index(folder)
        for number in range(len(lists.sizes)):
            yield from lists.ids(number)
    else:
        for number in range(inverted.nlist):
            if size := inverted.invlists.list_size(number):
                yield faiss.rev_swig_ptr(inverted.invlists.get_ids(number), size)


def _wrong_ids(pieces: Iterator[Ids], entries: int) -> Iterator[str]:
    """What is there that should not be, more than once, or not at all: how many of them, and one."""
    seen, strays, doubles = np.zeros(entries, dtype=bool), _Some(), _Some()
    for ids in pieces:
        inside = (ids >= 0) & (ids < entries)
        strays.add(ids[~inside])
        numbers, times = np.unique(ids[inside], return_counts=True)
        doubles.add(numbers[(times > 1) | seen[numbers]])
        seen[numbers] = True
    if strays.count:
        yield f"holds {strays.count} ids that no entry has, such as {strays.first}."
    if doubles.count:
        yield f"holds entries more than once, such as {doubles.first}."
    if not seen.all():
        yield f"lacks {int((~seen).sum())} of {entries} entries, the first of them {int(np.argmin(seen))}."


class _Some:
    """How many ids of a kind there are, and the first that was found."""

    def __init__(self) -> None:
        self.count, self.first = 0, -1

    def add(self, ids: Ids) -> None:
        if len(ids) and not self.count:
            self.first = int(ids[0])
        self.count += len(ids)


def _wrong_vectors(index: Any) -> Iterator[str]:
    """Centroids and whole keys that are not finite; an index that can't give any back has none to look at."""
    faiss = import_faiss()
    inverted = faiss.try_extract_index_ivf(index)
    vectors = inverted.quantizer if inverted is not None else faiss.downcast_index(index.index)
    what = "cell" if inverted is not None else "entry"
    for first in range(0, vectors.ntotal, ROWS_AT_ONCE):
        try:
            rows = vectors.reconstruct_n(first, min(ROWS_AT_ONCE, vectors.ntotal - first))
        except RuntimeError as error:
            if "not implemented" not in faiss_said(error):
                raise
            return
        wrong = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(wrong):
            yield f"has a vector that is not finite, that of {what} {first + int(wrong[0])}."
