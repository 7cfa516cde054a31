"""Cells of an inverted file by k-means, and work on many rows, to the same bits with any number of threads.

BLAS cuts a product into pieces by the number of its threads, and its last bits with them; where two cells are about as near,
these decide. So each thread computes blocks of one size by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from knnlm.index import import_faiss, to_gpu

BLOCK_ROWS = 4096

Floats = np.ndarray[Any, np.dtype[np.float32]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]


def in_blocks(work: Callable[[Floats], Any], rows: Floats) -> Any:
    """``work`` done on blocks of ``rows`` by as many threads as FAISS may use, and its results one after another."""
    faiss = import_faiss()
    blocks = [rows[start : start + BLOCK_ROWS] for start in range(0, len(rows), BLOCK_ROWS)]
    # How many threads FAISS takes is a setting of the thread that calls it.
    with ThreadPoolExecutor(faiss.omp_get_max_threads(), initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        return np.concatenate(list(pool.map(work, blocks)))


def find_cells(rows: Floats, count: int, rounds: int, seed: int, device: str = "cpu") -> Floats:
    """Centroids [count, d] of ``rows`` [n, d] by Lloyd's k-means from random rows; a cell that got none halves another's."""
    chance = np.random.default_rng(seed)
    centroids = torch.from_numpy(rows[np.sort(chance.choice(len(rows), count, replace=False))])
    for _ in range(rounds):
        cells = torch.from_numpy(_nearest(rows, centroids.numpy(), device))
        sizes = torch.bincount(cells, minlength=count)
        sums = torch.zeros_like(centroids).index_add_(0, cells, torch.from_numpy(rows))
        centroids = sums / sizes.clamp(min=1).unsqueeze(1)
        _halve_for_empty(centroids, sizes)
    found: Floats = centroids.numpy()
    return found


def _nearest(rows: Floats, centroids: Floats, device: str) -> Numbers:
    """The cell of each row [n]."""
    index = import_faiss().IndexFlatL2(centroids.shape[1])
    index.add(centroids)
    if device == "cpu":
        cells: Numbers = in_blocks(lambda block: index.search(block, 1)[1][:, 0], rows)
    else:
        cells = to_gpu(index, device).search(rows, 1)[1][:, 0]
    return cells


def _halve_for_empty(centroids: torch.Tensor, sizes: torch.Tensor) -> None:
    """Give each cell without rows a place beside the centroid of the one that has most, so that they share its rows."""
    aside = 1 + torch.where(torch.arange(centroids.shape[1]) % 2 == 0, 1, -1) / 1024
    for empty in (sizes == 0).nonzero()[:, 0].tolist():
        largest = int(sizes.argmax())
        centroids[empty], centroids[largest] = centroids[largest] * aside, centroids[largest] / aside
        sizes[empty] = sizes[largest] // 2
        sizes[largest] -= sizes[empty]
