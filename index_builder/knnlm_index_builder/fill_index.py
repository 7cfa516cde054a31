"""Filling a trained index: a part at a time, to be merged on disk by ``merge_index``, or whole, in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from knnlm.datastore.files import written_aside
from knnlm.index import INDEX_FILE, IndexFacts, import_faiss, read_index_facts, read_index_file, to_gpu
from knnlm.inverted_lists import Bytes, Sizes, lists_head
from knnlm_index_builder.find_cells import Floats, in_blocks
from knnlm_index_builder.train_index import one_thread, require_finite, said_of, steady_faiss, transforms, write_index

Pieces = Iterable[tuple[int, Tensor]]


def fill_part(trained: Path, pieces: Pieces, path: Path, device: str = "cpu", told: Callable[[int], None] = lambda _: None) -> None:
    """Code entries with the index in the folder ``trained`` and write their lists to ``path``, whole or not at all.

    ``pieces``: (number of the first entry, its and the following keys [n, d]); how they are cut changes nothing. ``told``
    is called with the number of entries after each step. Raises :class:`NonFiniteKey` or :class:`IndexingError`.
    """
    facts = read_index_facts(trained)
    index = read_index_file(trained / INDEX_FILE, mapped=False)
    with said_of(facts.factory, "code entries"), steady_faiss():
        lists = (_Coded if device == "cpu" else _CodedOnGpu)(index, device)
        for ids, rows in _chunks(pieces, facts):
            lists.add(ids, rows)
            told(len(ids))
        with written_aside(path) as file:
            lists.write(file)


class _Coded:
    """Codes of entries with the numbers of their lists, in the order in which they came."""

    def __init__(self, index: Any, _: str) -> None:
        self._index, self._inverted = index, import_faiss().extract_index_ivf(index)
        self._codes: list[Bytes] = [np.empty((0, index.sa_code_size()), np.uint8)]
        self._ids: list[Sizes] = [np.empty(0, np.int64)]

    def add(self, ids: Sizes, rows: Floats) -> None:
        self._codes.append(in_blocks(self._index.sa_encode, rows))
        self._ids.append(ids.copy())

    def write(self, file: BinaryIO) -> None:
        """Write the lists as FAISS does."""
        head = self._inverted.coarse_code_size()
        codes, ids = np.concatenate(self._codes), np.concatenate(self._ids)
        numbers = codes[:, :head].astype(np.int64) @ (1 << 8 * np.arange(head))
        order = np.argsort(numbers, kind="stable")
        sizes = np.bincount(numbers, minlength=self._inverted.nlist)
        file.write(lists_head(sizes, self._inverted.code_size))
        start = 0
        for size in sizes[sizes > 0].tolist():
            chosen = order[start : start + size]
            file.write(codes[chosen, head:].data)
            file.write(ids[chosen].data)
            start += size


class _CodedOnGpu:
    """The same in FAISS's own lists, which is how a GPU gives them."""

    def __init__(self, index: Any, device: str) -> None:
        self._index, self._on_gpu = index, to_gpu(import_faiss().extract_index_ivf(index), device)

    def add(self, ids: Sizes, rows: Floats) -> None:
        for transform in transforms(self._index):
            rows = in_blocks(transform.apply, rows)
        self._on_gpu.add_with_ids(rows, ids)

    def write(self, file: BinaryIO) -> None:
        """Write the lists as FAISS does."""
        faiss = import_faiss()
        index = faiss.index_gpu_to_cpu(self._on_gpu)
        faiss.write_InvertedLists(index.invlists, faiss.PyCallbackIOWriter(file.write))


def fill_whole(source: Path, pieces: Pieces, folder: Path, told: Callable[[int], None] = lambda _: None) -> IndexFacts:
    """Add entries to the index in the folder ``source``, trained or filled before, in memory; write it to ``folder``.

    ``pieces`` and ``told`` as in :func:`fill_part`. With one thread, since not all of these kinds are the same with more.
    """
    facts = read_index_facts(source)
    index = read_index_file(source / INDEX_FILE, mapped=False)
    for ids, rows in _chunks(pieces, facts):
        with said_of(facts.factory, "take entries by number"), steady_faiss(), one_thread():
            index.add_with_ids(rows, ids)
        told(len(ids))
    facts = replace(facts, entries=index.ntotal)
    write_index(index, facts, folder)
    return facts


def _chunks(pieces: Pieces, facts: IndexFacts) -> Iterator[tuple[Any, Any]]:
    """The same entries in steps of ``facts.fill_rows``: ids [n] int64, finite keys [n, d] float32."""
    ids = torch.empty(facts.fill_rows, dtype=torch.int64)
    rows = torch.empty((facts.fill_rows, facts.dimension))
    held = 0
    for first, keys in pieces:
        taken = 0
        while taken < len(keys):
            count = min(len(keys) - taken, len(ids) - held)
            ids[held : held + count] = torch.arange(first + taken, first + taken + count)
            rows[held : held + count] = keys[taken : taken + count]
            require_finite(rows[held : held + count].numpy(), first + taken)
            taken, held = taken + count, held + count
            if held == len(ids):
                yield ids.numpy(), rows.numpy()
                held = 0
    if held:
        yield ids[:held].numpy(), rows[:held].numpy()
