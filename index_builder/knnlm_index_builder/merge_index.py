"""Indexes made on disk out of lists that are there: merged of parts, filtered, or emptied to be filled with others.

Inverted files with plain lists of codes (Flat, SQ, PQ, RaBitQ and others, also behind a rotation) are made of parts; a part
is a file of inverted lists alone. Memory does not grow with what is merged.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from knnlm.datastore.files import made_aside, new_file, written_aside
from knnlm.errors import StoreDamaged
from knnlm.index import EXACT, INDEX_FILE, IndexFacts, import_faiss, read_index_facts, read_index_file, write_index_facts
from knnlm.inverted_lists import ID_BYTES, PIECE_BYTES, Bytes, InvertedLists, Sizes, lists_head, without_lists
from knnlm_index_builder.machine import require_free
from knnlm_index_builder.train_index import write_index

Kept = np.ndarray[Any, np.dtype[np.bool_]]


class Lists(Protocol):
    """Lists to be written: those of a file, or made of them on the way. As in :class:`~knnlm.inverted_lists.InvertedLists`."""

    sizes: Sizes
    code_size: int

    def codes(self, number: int) -> Iterator[Bytes]:
        """Codes of a list in pieces [n, code_size]."""

    def ids(self, number: int) -> Iterator[Sizes]:
        """Ids of a list in pieces [n]."""

    def forget(self) -> None:
        """Give back the memory of what was read so far."""


class Joined:
    """Several lists one after another, under each number."""

    def __init__(self, sources: Sequence[Lists]) -> None:
        self._sources = sources
        self.code_size = sources[0].code_size
        self.sizes: Sizes = np.sum([source.sizes for source in sources], axis=0)

    def codes(self, number: int) -> Iterator[Bytes]:
        """See :meth:`Lists.codes`."""
        for source in self._sources:
            yield from source.codes(number)

    def ids(self, number: int) -> Iterator[Sizes]:
        """See :meth:`Lists.ids`."""
        for source in self._sources:
            yield from source.ids(number)

    def forget(self) -> None:
        """See :meth:`Lists.forget`."""
        for source in self._sources:
            source.forget()


class Filtered:
    """Lists less the entries that are not ``kept`` [entries]; the others are numbered anew, without gaps."""

    def __init__(self, source: InvertedLists, kept: Kept) -> None:
        self._source, self._kept = source, kept
        self._numbers = np.cumsum(kept, dtype=np.int32 if len(kept) < 1 << 31 else np.int64) - 1
        self.code_size = source.code_size
        self.sizes: Sizes = np.array([self._count(number) for number in range(len(source.sizes))], np.int64)

    def codes(self, number: int) -> Iterator[Bytes]:
        """See :meth:`Lists.codes`."""
        for codes, ids in zip(self._source.codes(number), self._source.ids(number), strict=True):
            yield codes[self._kept[ids]]

    def ids(self, number: int) -> Iterator[Sizes]:
        """See :meth:`Lists.ids`."""
        for ids in self._source.ids(number):
            yield self._numbers[ids[self._kept[ids]]].astype(np.int64)

    def forget(self) -> None:
        """See :meth:`Lists.forget`."""
        self._source.forget()

    def _count(self, number: int) -> int:
        total = 0
        for ids in self._source.ids(number):
            if not 0 <= ids.min() <= ids.max() < len(self._kept):
                raise StoreDamaged(
                    f"{self._source.path} is damaged: it has ids from {ids.min()} to {ids.max()}, but there are {len(self._kept)} entries."
                )
            total += int(self._kept[ids].sum())
        return total


def write_lists(lists: Lists, file: BinaryIO) -> None:
    """Write ``lists`` as FAISS would."""
    file.write(lists_head(lists.sizes, lists.code_size))
    pending = 0
    for number in np.flatnonzero(lists.sizes).tolist():
        for codes in lists.codes(number):
            file.write(codes.data)
        for ids in lists.ids(number):
            file.write(ids.data)
        pending += int(lists.sizes[number]) * (lists.code_size + ID_BYTES)
        if pending > PIECE_BYTES:
            lists.forget()
            pending = 0


def merge_parts(trained: Path, parts: Sequence[Path], folder: Path) -> IndexFacts:
    """Merge ``parts`` (files of lists, or folders of indexes trained alike) into an index in ``folder``.

    Their entries follow one another in each list, so parts in ascending order of entries leave its ids ascending. Raises
    ``OSError`` (ENOSPC) before it writes what does not fit, and :class:`StoreDamaged` for a part of another index.
    """
    found = without_lists(trained / INDEX_FILE)
    if found is None:
        raise StoreDamaged(f"{trained} is no index that parts can be merged into.")
    index = found[0]
    inverted = import_faiss().extract_index_ivf(index)
    sources = [InvertedLists.of_index(part) if part.is_dir() else InvertedLists(part) for part in parts]
    for source in sources:
        if (len(source.sizes), source.code_size) != (inverted.nlist, inverted.code_size):
            raise StoreDamaged(
                f"{source.path} has {len(source.sizes)} lists of {source.code_size} bytes a code, but {trained} has "
                f"{inverted.nlist} of {inverted.code_size}: it belongs to another index."
            )
    lists = Joined(sources)
    index.ntotal = inverted.ntotal = int(lists.sizes.sum())
    # A scratch copy of the parts is given back only after the merge, so nothing becomes free on the way.
    folder.parent.mkdir(parents=True, exist_ok=True)
    needed = (trained / INDEX_FILE).stat().st_size + 16 * inverted.nlist + index.ntotal * (inverted.code_size + ID_BYTES)
    require_free(folder.parent, needed, "the index")
    facts = replace(read_index_facts(trained), entries=index.ntotal)
    with made_aside(folder) as aside:
        with new_file(aside / INDEX_FILE) as file:
            import_faiss().write_index(index, import_faiss().PyCallbackIOWriter(file.write))
            # FAISS wrote empty lists; the full ones take their place.
            file.seek(-len(lists_head(np.zeros_like(lists.sizes), inverted.code_size)), os.SEEK_CUR)
            write_lists(lists, file)
        write_index_facts(aside, facts)
    return facts


def filter_part(folder: Path, kept: Kept, path: Path) -> None:
    """Write the lists of the index in ``folder`` to ``path`` without the entries that are not ``kept`` [entries].

    The others are numbered anew, without gaps and in the same order. Takes 4 bytes an entry (8 from 2^31) beside ``kept``.
    """
    with written_aside(path) as file:
        write_lists(Filtered(InvertedLists.of_index(folder), kept), file)


def is_mergeable(folder: Path) -> bool:
    """Whether the index in ``folder`` is one that is made of parts."""
    return read_index_facts(folder).factory != EXACT and without_lists(folder / INDEX_FILE) is not None


def trained_of(folder: Path, trained: Path) -> IndexFacts:
    """Write the index in ``folder`` without its entries to the folder ``trained``, to fill it with others."""
    facts = read_index_facts(folder)
    found = without_lists(folder / INDEX_FILE)
    if found is not None:
        index = found[0]
    else:
        index = read_index_file(folder / INDEX_FILE, mapped=False)
        index.reset()
    facts = replace(facts, entries=0, trained_entries=facts.entries if facts.trained_entries is None else facts.trained_entries)
    write_index(index, facts, trained)
    return facts


def write_exact(folder: Path, dimension: int, entries: int) -> IndexFacts:
    """Write the facts that stand for exact search, which has no index file."""
    facts = IndexFacts(EXACT, dimension, entries, 0, 0, 0, None)
    with made_aside(folder) as aside:
        write_index_facts(aside, facts)
    return facts
