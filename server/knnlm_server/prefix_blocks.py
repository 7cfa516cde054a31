"""Which beginnings of texts are kept, block by block, and which go when room is needed. Knows no tensors.

A block is known by its tokens and by the block before it, that one by its own, and so on to the tenant's beginning:
dictionaries compare all of it, so a block is found by exactly the text that it was computed for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

BLOCK_TOKENS = 32
# What comes before a block: the number of the block before, or the tenant where it is the first.
_Before = int | str
_Key = tuple[_Before, tuple[int, ...]]


@dataclass(frozen=True)
class _Block:
    number: int  # never used again, so what followed a block that is gone is not found after another one
    place: int


class PrefixBlocks:
    """Up to ``capacity`` blocks of ``block_tokens`` tokens; the ones not used for longest make room for new ones."""

    def __init__(self, capacity: int, block_tokens: int = BLOCK_TOKENS) -> None:
        self.capacity, self.block_tokens = capacity, block_tokens
        self._blocks: OrderedDict[_Key, _Block] = OrderedDict()  # the last used at the end; a block never before its successors
        self._free = list(range(capacity))
        self._numbers = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def find(self, tokens: Sequence[int], tenant: str) -> list[int]:
        """Places of the blocks that a text of ``tenant`` begins with, in order: full ones, and as far as they are kept."""
        keys, _ = self._known(tokens, tenant)
        self._touch(keys)
        return [self._blocks[key].place for key in keys]

    def add(self, tokens: Sequence[int], tenant: str) -> tuple[int, list[int]]:
        """Keep the full blocks of a text; return how many were known, and the places where those after them belong.

        Where all places are taken by the text itself, its end is not kept.
        """
        keys, before = self._known(tokens, tenant)
        self._touch(keys)
        known, own = len(keys), set(keys)
        for start in range(known * self.block_tokens, len(tokens) - self.block_tokens + 1, self.block_tokens):
            place = self._place(own)
            if place is None:
                break
            key = before, tuple(tokens[start : start + self.block_tokens])
            self._numbers += 1
            self._blocks[key] = _Block(self._numbers, place)
            before = self._numbers
            keys.append(key)
            own.add(key)
        self._touch(keys)
        return known, [self._blocks[key].place for key in keys[known:]]

    def _known(self, tokens: Sequence[int], tenant: str) -> tuple[list[_Key], _Before]:
        keys: list[_Key] = []
        before: _Before = tenant
        for start in range(0, len(tokens) - self.block_tokens + 1, self.block_tokens):
            key = before, tuple(tokens[start : start + self.block_tokens])
            block = self._blocks.get(key)
            if block is None:
                break
            keys.append(key)
            before = block.number
        return keys, before

    def _touch(self, keys: list[_Key]) -> None:
        # The first block last: it is of use to all that follow, and nothing finds them without it.
        for key in reversed(keys):
            self._blocks.move_to_end(key)

    def _place(self, own: set[_Key]) -> int | None:
        if self._free:
            return self._free.pop()
        oldest = next(iter(self._blocks), None)
        return None if oldest is None or oldest in own else self._blocks.pop(oldest).place
