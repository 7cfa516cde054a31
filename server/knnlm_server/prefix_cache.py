"""Attention keys and values of the beginnings of recent texts, so that a prompt that shares one does not compute it again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from knnlm_server.prefix_blocks import BLOCK_TOKENS, PrefixBlocks


class PrefixCache:
    """A pool of blocks in at most ``max_bytes``, filled from the rows of a slot cache and copied into them.

    ``stores``: the slot cache's tensors [slots, heads, columns, width], always the same ones in the same order; the pool has
    their dtype and device and is made when the first block is kept. On a CPU it takes memory as blocks are used for the first
    time; on a GPU all of it at once.
    """

    def __init__(self, max_bytes: int, block_tokens: int = BLOCK_TOKENS) -> None:
        self._max_bytes, self._block_tokens = max_bytes, block_tokens
        self._blocks = PrefixBlocks(0, block_tokens)
        self._pools: list[Tensor] = []

    @torch.inference_mode()
    def load(self, stores: Sequence[Tensor], row: int, computed: int, tokens: Sequence[int], tenant: str) -> int:
        """Copy what is kept of a text into a row that holds its first ``computed`` tokens; return how many it holds then.

        Never the text's last token: what follows it has to be computed.
        """
        places = self._blocks.find(tokens[: len(tokens) - 1], tenant)
        end = len(places) * self._block_tokens
        if end <= computed:
            return computed
        first = computed // self._block_tokens
        wanted = places[first:]
        for store, pool in zip(stores, self._pools, strict=True):
            store[row, :, first * self._block_tokens : end] = pool[wanted].transpose(0, 1).flatten(1, 2)
        return end

    @torch.inference_mode()
    def save(self, stores: Sequence[Tensor], row: int, tokens: Sequence[int], tenant: str) -> None:
        """Keep the full blocks of ``tokens``, all of which the row holds."""
        if not self._pools:
            self._make(stores)
        known, places = self._blocks.add(tokens, tenant)
        if not places:
            return
        start, end = known * self._block_tokens, (known + len(places)) * self._block_tokens
        for store, pool in zip(stores, self._pools, strict=True):
            pool[places] = store[row, :, start:end].unflatten(1, (-1, self._block_tokens)).transpose(0, 1)

    def _make(self, stores: Sequence[Tensor]) -> None:
        block_bytes = sum(store[0, :, 0].numel() * store.element_size() for store in stores) * self._block_tokens
        capacity = self._max_bytes // block_bytes
        self._blocks = PrefixBlocks(capacity, self._block_tokens)
        # Not zeros, which would touch every page: a block is always written before it is read.
        self._pools = [store.new_empty(capacity, store.shape[1], self._block_tokens, store.shape[3]) for store in stores]
