"""The slot cache: attention keys and values of all running sequences, one row each, each row with its own length.

A row's tokens are written by position, so rows need neither padding nor copying when the batch changes. Beyond a
row's length there are zeros, never leftovers: a NaN behind the mask would still leak through V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from knnlm_server.prefix_blocks import BLOCK_TOKENS
from knnlm_server.prefix_cache import PrefixCache


@dataclass
class _Placement:
    """Where the tokens of the forward pass that runs now belong: rows [start, stop), positions [rows, new tokens]."""

    start: int
    stop: int
    positions: Tensor
    length: int


class _SlotLayer(CacheLayerMixin):
    """One layer: keys and values [slots, heads, capacity + 1, width]; the last column takes padding and is never read."""

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        slots, columns = self._cache.slots, self._cache.capacity + 1
        self.keys = key_states.new_zeros(slots, key_states.shape[1], columns, key_states.shape[3])
        self.values = value_states.new_zeros(slots, value_states.shape[1], columns, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        placement = self._cache.placement
        return self._write(self.keys, key_states, placement), self._write(self.values, value_states, placement)

    def _write(self, store: Tensor | None, states: Tensor, placement: _Placement) -> Tensor:
        assert store is not None
        rows = store[placement.start : placement.stop]
        rows[torch.arange(len(rows), device=rows.device)[:, None], :, placement.positions] = states.transpose(1, 2)
        return rows[:, :, : placement.length]

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.placement.length, 0

    def get_max_length(self) -> int:
        return self._cache.capacity


class SlotCache(Cache):
    """Rows for ``slots`` sequences of up to ``capacity`` tokens. The scheduler's :class:`Rows`.

    ``prefix_bytes``: for beginnings of texts that are kept for others that share them (0: none are), in blocks of
    ``block_tokens``.
    """

    def __init__(self, layers: int, slots: int, capacity: int, prefix_bytes: int = 0, block_tokens: int = BLOCK_TOKENS) -> None:
        self.slots, self.capacity = slots, capacity
        self.block_tokens = block_tokens if prefix_bytes else 0
        self._prefixes = PrefixCache(prefix_bytes, block_tokens)
        self._slot_layers = [_SlotLayer(self) for _ in range(layers)]
        super().__init__(layers=list(self._slot_layers))
        self.placement = _Placement(0, 0, torch.zeros((0, 0), dtype=torch.int64), 0)

    def place(self, start: int, starts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Prepare a forward pass over rows [start, start + n): row i brings ``counts[i]`` tokens from ``starts[i]`` on.

        ``starts`` and ``counts`` [n] int64. Returns position ids [n, widest] and the attention mask
        [n, 1, widest, length] bool. A row with fewer tokens than the widest is filled up: the filling repeats the
        row's last position, is written where nothing reads, and so changes nothing.
        """
        widest = int(counts.max())
        offsets = torch.arange(widest, device=starts.device)
        real = offsets < counts[:, None]
        positions = starts[:, None] + torch.minimum(offsets, counts[:, None] - 1)
        length = int((starts + counts).max())
        self.placement = _Placement(start, start + len(starts), torch.where(real, positions, self.capacity), length)
        mask = torch.arange(length, device=starts.device) <= positions[:, None, :, None]
        return positions, mask

    @torch.inference_mode()
    def swap(self, first: int, second: int, length: int) -> None:
        """Exchange two rows; neither holds more than ``length`` tokens."""
        pair, exchanged = [first, second], [second, first]
        for store in self._stores():
            store[pair, :, :length] = store[exchanged, :, :length]

    @torch.inference_mode()
    def clear(self, row: int, length: int) -> None:
        """Fill a row with zeros up to ``length`` tokens: all that it holds."""
        for store in self._stores():
            store[row, :, :length] = 0

    def reuse(self, row: int, computed: int, tokens: Sequence[int], tenant: str) -> int:
        """Copy into a row what is kept of its text; see :meth:`PrefixCache.load`."""
        return self._prefixes.load(self._stores(), row, computed, tokens, tenant)

    def keep(self, row: int, tokens: Sequence[int], tenant: str) -> None:
        """Keep what a row holds of its text; see :meth:`PrefixCache.save`."""
        self._prefixes.save(self._stores(), row, tokens, tenant)

    def _stores(self) -> list[Tensor]:
        return [store for layer in self._slot_layers for store in (layer.keys, layer.values) if store is not None]
