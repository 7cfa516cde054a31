"""Parts of a datastore, nested in one another: what it would be with fewer documents, without building it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from knnlm.datastore.reader import Datastore
from knnlm.entry_mask import EntryMask
from knnlm.errors import InvalidInput, StoreError


@dataclass(frozen=True)
class Subset:
    """Some of the documents of a datastore, with their ``entries``. ``mask``: the entries that may be found (None: all)."""

    documents: int
    entries: int
    mask: EntryMask | None

    def allowed(self) -> EntryMask | None:
        """As a :class:`~knnlm.retrieval.Retriever` asks for it."""
        return self.mask


def nested_subsets(store: Datastore, shares: Sequence[float], seed: int) -> list[Subset]:
    """For each of ``shares`` (above 0, up to 1) the first documents of one random order, one or more, whose entries come
    nearest to it: every subset is part of the larger ones. Ascending; shares that fall on the same documents give one.

    Removed documents belong to none. Raises :class:`InvalidInput` for a share out of range, :class:`StoreError` where no
    document has an entry.
    """
    for share in shares:
        if not 0 < share <= 1:
            raise InvalidInput("size", f"is {share:g}, but must be above 0, up to 1 (all of the datastore).")
    table = store.documents
    live = np.setdiff1d(np.flatnonzero(table.token_counts > 1), store.tombstones.documents)
    if not len(live):
        raise StoreError(f"{store.path} has no document with an entry; there is nothing to measure.")
    order = np.random.default_rng(seed).permutation(live)
    entries = np.cumsum(table.token_counts[order] - 1)
    counts = {int(np.abs(entries - share * entries[-1]).argmin()) + 1 for share in shares}
    return [
        Subset(count, int(entries[count - 1]), store.allowed() if count == len(live) else _mask(store, order[:count]))
        for count in sorted(counts)
    ]


def _mask(store: Datastore, documents: np.ndarray[tuple[int], np.dtype[np.int64]]) -> EntryMask:
    others = np.setdiff1d(np.arange(len(store.documents)), documents)
    return EntryMask.without(len(store), store.documents.entry_ranges(others))
