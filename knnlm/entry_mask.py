"""Which entries a search may return: a bit for each. Knows nothing of documents or of why an entry is left out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Bits = np.ndarray[Any, np.dtype[np.uint8]]


class EntryMask:
    """A bitmap over entries 0 to ``length`` - 1; a set bit allows the entry. Never changed once it is made.

    ``bits`` [ceil(length / 8)] uint8, lowest bit first, as FAISS's ``IDSelectorBitmap`` reads it; ``allowed`` counts the
    set ones.
    """

    def __init__(self, bits: Bits, length: int) -> None:
        self.bits, self.length = bits, length
        self.allowed = int(np.bitwise_count(bits).sum(dtype=np.int64))

    @classmethod
    def without(cls, length: int, ranges: Iterable[tuple[int, int]]) -> EntryMask:
        """All entries but those of ``ranges`` [start, stop)."""
        bits = np.full(-(-length // 8), 0xFF, np.uint8)
        _clear(bits, length, 8 * len(bits))
        for start, stop in ranges:
            _clear(bits, start, stop)
        return cls(bits, length)

    def without_range(self, start: int, stop: int) -> EntryMask:
        """The same mask less the entries [start, stop)."""
        bits = self.bits.copy()
        _clear(bits, start, stop)
        return EntryMask(bits, self.length)

    def allows(self, ids: Tensor) -> Tensor:
        """Which of the entries ``ids`` (any shape, int64) are allowed; numbers outside of the bitmap (-1) are not."""
        numbers = ids.numpy()
        inside = (numbers >= 0) & (numbers < self.length)
        safe = np.where(inside, numbers, 0)
        set_bits = (self.bits[safe >> 3] >> (safe & 7).astype(np.uint8)) & 1
        return torch.from_numpy(np.asarray(inside & set_bits.astype(bool)))

    def at(self, ranks: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The allowed entries with these numbers among the allowed ones: [m], each from 0 to ``allowed`` - 1."""
        counts = np.bitwise_count(self.bits)
        ends = np.cumsum(counts, dtype=np.int64)
        places = np.searchsorted(ends, ranks, side="right")
        within = ranks - (ends - counts)[places]
        kept = np.unpackbits(self.bits[places, None], axis=1, bitorder="little")
        entries: np.ndarray[Any, np.dtype[np.int64]] = 8 * places + (kept.cumsum(axis=1) > within[:, None]).argmax(axis=1)
        return entries

    def rows(self, start: int, stop: int) -> Tensor:
        """Which of the entries [start, stop) are allowed: [stop - start] bool."""
        first = start // 8
        kept = np.unpackbits(self.bits[first : -(-stop // 8)], bitorder="little")
        return torch.from_numpy(kept[start - 8 * first : stop - 8 * first].astype(bool))


def _clear(bits: Bits, start: int, stop: int) -> None:
    """Take the bits [start, stop) out, without unpacking the others: stores may have more entries than there is room."""
    first, last = start // 8, -(-stop // 8)
    kept = np.unpackbits(bits[first:last], bitorder="little")
    kept[start - 8 * first : stop - 8 * first] = 0
    bits[first:last] = np.packbits(kept, bitorder="little")
