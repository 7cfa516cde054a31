"""How much computing an index is, counted in multiplications and additions; ``speed`` says how many a second does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from knnlm.index import EXACT, import_faiss
from knnlm.search_positions import POSITIONS
from knnlm_index_builder.plan_index import IndexPlan
from knnlm_index_builder.train_index import CELL_ITERATIONS, CODE_ITERATIONS, POINTS_PER_LIST, new_index, transforms

GRAPH_COMPARISONS = 4096
"""What finding a cell through a graph costs, in comparisons made many at a time: it makes fewer, but one by one."""
SEARCHED_KEYS = 2_000_000
"""Choosing search settings takes an exact search at its positions, and searches that cost about as much as one in so many
keys: measured at 102,000 and 324,000 entries of width 256, where the number of entries made no difference."""


@dataclass(frozen=True)
class IndexWork:
    """Multiplications and additions of training an index, of filling it, and of choosing its search settings."""

    training: float
    filling: float
    searching: float


def index_work(plan: IndexPlan, dimension: int, *, new: int, entries: int) -> IndexWork:
    """The work for an index of ``entries`` of which ``new`` are to be coded: a count of the large terms, no bound."""
    if plan.factory == EXACT:
        return IndexWork(0, 0, 0)
    index = new_index(plan.factory, dimension)
    inverted = import_faiss().try_extract_index_ivf(index)
    centroids = _product_centroids(index if inverted is None else inverted)
    coding = 2.0 * dimension * (centroids + sum(transform.d_out for transform in transforms(index)))
    cells_training = cells_filling = 0.0
    if inverted is not None:
        # Training compares with every cell in each round, and once more for what codes are trained on.
        cells_training = 2.0 * inverted.d * inverted.nlist * (CELL_ITERATIONS + 1)
        graph = hasattr(import_faiss().downcast_index(inverted.quantizer), "hnsw")
        cells_filling = 2.0 * inverted.d * (min(inverted.nlist, GRAPH_COMPARISONS) if graph else inverted.nlist)
    codes = 2.0 * dimension * centroids * min(plan.training_points, POINTS_PER_LIST * centroids) * CODE_ITERATIONS
    searching = 0.0 if plan.factory == "Flat" else 2.0 * POSITIONS * dimension * (entries + SEARCHED_KEYS)
    return IndexWork(plan.training_points * cells_training + codes, new * (cells_filling + coding), searching)


def _product_centroids(index: Any) -> int:
    """Centroids that each part of a vector is compared with; 0 for an index without product codes."""
    faiss = import_faiss()
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexIDMap) else faiss.downcast_index(index)
    product = getattr(inner, "pq", None)
    return 0 if product is None else int(product.ksub)
