"""The slot cache: attention keys and values of all running sequences, one row each, each row with its own length.

A row's tokens are written by position, so rows need neither padding nor copying when the batch changes. Beyond a
row's length there are zeros, never leftovers: a NaN behind the mask would still leak through V.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from knnlm_server.prefix_blocks import BLOCK_TOKENS
from knnlm_server.prefix_cache import PrefixCache


class _Placement:
    """Where the tokens of the forward pass that runs now belong.

    Rows [start, stop) of a cache of so many ``columns``, at ``positions`` [rows, new tokens]; ``length`` of them are read.
    """

    def __init__(self, start: int, stop: int, length: int, columns: int, positions: Tensor) -> None:
        self.start, self.stop, self.length = start, stop, length
        self._rows = torch.arange(start, stop, device=positions.device)[:, None, None]
        self._columns, self._positions = columns, positions[:, None]
        self._cells: dict[int, Tensor] = {}

    def cells(self, heads: int) -> Tensor:
        """Where each head of each new token belongs [rows · heads · new tokens] in a layer's [slots · heads · columns]."""
        if heads not in self._cells:
            each = torch.arange(heads, device=self._rows.device)[:, None]
            self._cells[heads] = ((self._rows * heads + each) * self._columns + self._positions).flatten()
        return self._cells[heads]


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
        # One flat index of whole vectors is several times faster than an index of rows and positions.
        store.view(-1, store.shape[3]).index_copy_(0, placement.cells(store.shape[1]), states.reshape(-1, store.shape[3]))
        return store[placement.start : placement.stop, :, : placement.length]

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
        self.block_tokens, self._prefix_bytes = block_tokens if prefix_bytes else 0, prefix_bytes
        self._prefixes = PrefixCache(prefix_bytes, block_tokens)
        self._slot_layers = [_SlotLayer(self) for _ in range(layers)]
        super().__init__(layers=list(self._slot_layers))
        self.placement = _Placement(0, 0, 0, capacity + 1, torch.zeros((0, 0), dtype=torch.int64))

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
        written = torch.where(real, positions, self.capacity)
        self.placement = _Placement(start, start + len(starts), length, self.capacity + 1, written)
        mask = torch.arange(length, device=starts.device) <= positions[:, None, :, None]
        return positions, mask

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers; 0 before the first forward pass."""
        return sum(store[0, :, 0].numel() * store.element_size() for store in self._stores())

    @property
    def kept_tokens(self) -> int:
        """Most tokens of one text that are kept; before the first forward pass, of which nothing is known, as many as a row has."""
        block_bytes = self.token_bytes * self.block_tokens
        return self._prefix_bytes // block_bytes * self.block_tokens if block_bytes else self.capacity

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
