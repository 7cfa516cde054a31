"""Which ids were seen before, in a few bytes an id."""

from __future__ import annotations

from array import array

import xxhash

SLOTS = 1024


class SeenIds:
    """A set of ids that keeps 8-byte hashes only: 12 to 24 bytes an id (open addressing, at most two thirds full).

    Two ids of one hash are taken for one; among n ids that happens with probability n² / 2⁶⁵, so a hit is to be
    confirmed.
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * SLOTS))
        self._count = 0

    def add(self, identity: str) -> bool:
        """Add an id; return whether it, or another of its hash, was there already."""
        value = _hash(identity)
        if not _place(self._slots, value):
            return True
        self._count += 1
        if 3 * self._count > 2 * len(self._slots):
            self._grow()
        return False

    def _grow(self) -> None:
        larger = array("Q", bytes(16 * len(self._slots)))
        for value in self._slots:
            if value:
                _place(larger, value)
        self._slots = larger


def _hash(identity: str) -> int:
    """xxh3 of the id, never 0, which marks a free slot."""
    return xxhash.xxh3_64_intdigest(identity.encode()) or 1


def _place(slots: array[int], value: int) -> bool:
    """Put a hash into the first free slot from its own on; False if it is there already."""
    mask = len(slots) - 1
    at = value & mask
    while slots[at]:
        if slots[at] == value:
            return False
        at = (at + 1) & mask
    slots[at] = value
    return True
