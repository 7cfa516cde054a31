"""Filling a trained index: a part at a time, to be merged on disk by ``merge_index``, or whole, in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knnlm.datastore.files import written_aside
from knnlm.index import INDEX_FILE, IndexFacts, import_faiss, read_index_facts, read_index_file, to_gpu
from knnlm_index_builder.train_index import require_finite, said_of, steady_faiss, steady_lists, transforms, write_index

Pieces = Iterable[tuple[int, Tensor]]


def fill_part(trained: Path, pieces: Pieces, path: Path, device: str = "cpu", told: Callable[[int], None] = lambda _: None) -> None:
    """Code entries with the index in the folder ``trained`` and write their lists to ``path``, whole or not at all.

    ``pieces``: (number of the first entry, its and the following keys [n, d]); how they are cut changes nothing. ``told``
    is called with the number of entries after each step. Raises :class:`NonFiniteKey` or :class:`IndexingError`.
    """
    faiss = import_faiss()
    facts = read_index_facts(trained)
    index = read_index_file(trained / INDEX_FILE, mapped=False)
    inverted = faiss.downcast_index(faiss.extract_index_ivf(index))
    filled = inverted if device == "cpu" else to_gpu(inverted, device)
    threads = 1 if steady_lists(index) is None else None
    for ids, rows in _chunks(pieces, facts):
        with steady_faiss(1):
            for transform in transforms(index):
                rows = transform.apply(rows)
        with said_of(facts.factory, "take entries by number"), steady_faiss(threads):
            filled.add_with_ids(rows, ids)
        told(len(ids))
    if device != "cpu":
        filled = faiss.index_gpu_to_cpu(filled)
    with written_aside(path) as file:
        faiss.write_InvertedLists(faiss.extract_index_ivf(filled).invlists, faiss.PyCallbackIOWriter(file.write))


def fill_whole(source: Path, pieces: Pieces, folder: Path, told: Callable[[int], None] = lambda _: None) -> IndexFacts:
    """Add entries to the index in the folder ``source``, trained or filled before, in memory; write it to ``folder``.

    ``pieces`` and ``told`` as in :func:`fill_part`. With one thread, since not all of these kinds are the same with more.
    """
    facts = read_index_facts(source)
    index = read_index_file(source / INDEX_FILE, mapped=False)
    for ids, rows in _chunks(pieces, facts):
        with said_of(facts.factory, "take entries by number"), steady_faiss(1):
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
