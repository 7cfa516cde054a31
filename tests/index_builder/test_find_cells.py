"""k-means that any number of threads does to the same bits, and as well as FAISS."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knnlm_index_builder.find_cells import BLOCK_ROWS, find_cells, in_blocks
from tests.indexes import clustered, faiss_threads


def spread(rows: np.ndarray, centroids: np.ndarray) -> float:
    """Mean squared distance of rows from their nearest centroids."""
    return float(((rows[:, None] - centroids[None]) ** 2).sum(2).min(1).mean())


def reference(rows: np.ndarray, centroids: np.ndarray, rounds: int) -> np.ndarray:
    """Lloyd's rounds, one row at a time, in float64."""
    for _ in range(rounds):
        nearest = ((rows[:, None] - centroids[None]) ** 2).sum(2).argmin(1)
        centroids = np.stack([rows[nearest == cell].mean(0) for cell in range(len(centroids))])
    return centroids


def test_rounds_are_lloyds() -> None:
    rows = clustered(900, 8)
    start = find_cells(rows, 12, 0, seed=3)
    assert all((row == rows).all(1).any() for row in start)
    np.testing.assert_allclose(find_cells(rows, 12, 4, seed=3), reference(rows.astype(np.float64), start, 4), rtol=1e-4, atol=1e-4)


def test_cells_are_as_close_as_those_that_faiss_finds() -> None:
    rows = clustered(3000, 16)
    ours = spread(rows, find_cells(rows, 40, 7, seed=1))
    theirs = faiss.Kmeans(16, 40, niter=10, seed=1)
    theirs.train(rows)
    assert ours < 1.05 * spread(rows, theirs.centroids)


def test_cells_without_rows_take_a_share_of_the_largest() -> None:
    """Two of the three first centroids are the same point, so one of them gets nothing."""
    rows = np.repeat(np.array([[0.0, 0.0], [8.0, 8.0], [8.0, 9.0]], np.float32), [200, 2, 2], axis=0)
    centroids = find_cells(rows, 4, 6, seed=0)
    assert np.isfinite(centroids).all()
    assert spread(rows, centroids) < 0.3


@pytest.mark.parametrize("count", [1, 5])
def test_as_many_cells_as_rows_are_the_rows(count: int) -> None:
    rows = clustered(60, 4)[:count]
    assert sorted(map(tuple, find_cells(rows, count, 3, seed=0))) == sorted(map(tuple, rows))


def test_any_number_of_threads_finds_the_same_cells() -> None:
    rows = 1000 + clustered(2 * BLOCK_ROWS + 7, 32)
    found = []
    for count in (1, 2, 5):
        with faiss_threads(count):
            found.append(find_cells(rows, 200, 3, seed=1))
    assert all(np.array_equal(found[0], other) for other in found[1:])


@given(rows=st.integers(1, 3 * BLOCK_ROWS), threads=st.integers(1, 4))
def test_blocks_come_back_in_their_order(rows: int, threads: int) -> None:
    content = np.arange(rows, dtype=np.float32)[:, None]
    sizes: list[int] = []

    def work(block: np.ndarray) -> np.ndarray:
        sizes.append(len(block))
        assert faiss.omp_get_max_threads() == 1
        return 2 * block

    with faiss_threads(threads):
        assert np.array_equal(in_blocks(work, content), 2 * content)
        assert faiss.omp_get_max_threads() == threads
    assert max(sizes) <= BLOCK_ROWS
    assert torch.tensor(sizes).sum() == rows
