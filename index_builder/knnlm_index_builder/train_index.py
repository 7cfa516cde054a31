"""Training an index: which one, on which keys, and so that the same keys give the same bytes on any number of threads.

A trained index is an index folder without entries. Knows no shards; ``fill_index`` fills it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnlm.datastore.files import made_aside, new_file
from knnlm.errors import IndexingError, InvalidInput, NonFiniteKey
from knnlm.index import INDEX_FILE, IndexFacts, faiss_said, import_faiss, write_index_facts
from knnlm.inverted_lists import lists_start
from knnlm.retrieval import Gatherable
from knnlm_index_builder.find_cells import Floats, find_cells, in_blocks

POINTS_PER_LIST, LEAST_POINTS_PER_LIST, FEWEST_POINTS = 64, 39, 20_000
GPU_PQ_SIZES = (96, 64, 56, 48, 40, 32, 28, 24, 20, 16, 12, 8, 4, 3, 2, 1)
SEED = 20200430
# Of real hidden states, 7 rounds find cells in which searches see as much as after 10, and more points do no better.
CELL_ITERATIONS, CODE_ITERATIONS = 7, 10
MOST_FILL_ROWS, FILL_FLOATS = 65_536, 1 << 24
CODE_ROWS = 512


def choose_factory(entries: int, dimension: int, *, gpu: bool = False, keys_stored: bool = True) -> str:
    """The FAISS factory string for ``--index auto``; ``docs/adr/0003-index-defaults.md`` has the figures behind it.

    GPU indexes have no RaBitQ, no graph over their cells, and product quantizers of certain sizes only. Without stored
    keys the codes give the distances, so there is always an inverted file to merge them into.
    """
    if entries <= 50_000 and keys_stored:
        return "Flat"
    reduced, width = ("", dimension) if dimension <= 1024 else ("PCAR512,", 512)
    root = math.sqrt(entries)
    if entries <= 1_000_000:
        return f"{reduced}IVF{_lists(2 * root, entries)},SQ8"
    code = f"PQ{next(m for m in GPU_PQ_SIZES if width % m == 0)}x8np" if gpu else "RaBitQ"
    if entries <= 10_000_000:
        return f"{reduced}IVF{_lists(4 * root, entries)},{code}"
    graph = "" if gpu else "_HNSW32"
    if entries <= 100_000_000:
        return f"{reduced}IVF65536{graph},{code}"
    return f"OPQ64_256,IVF262144{graph},PQ64x8np"


def _lists(wanted: float, entries: int) -> int:
    """A number of cells near ``wanted`` that ``entries`` training points can fill."""
    return max(1, min(round(wanted), entries // LEAST_POINTS_PER_LIST))


def training_points(nlist: int, entries: int, most: int | None = None) -> int:
    """How many keys to train on: 64 a cell and at least 20,000, but at most ``most`` unless that is below 39 a cell."""
    wanted = min(entries, max(POINTS_PER_LIST * nlist, FEWEST_POINTS))
    return wanted if most is None else max(min(wanted, most), min(entries, max(LEAST_POINTS_PER_LIST * nlist, FEWEST_POINTS)))


def training_sample(entries: int, most: int) -> Tensor:
    """Sorted numbers of at most ``most`` entries, drawn with the project's seed."""
    if entries <= most:
        return torch.arange(entries)
    # NumPy draws without a permutation of all entries, which could take more memory than the index.
    return torch.from_numpy(np.sort(np.random.default_rng(SEED).choice(entries, most, replace=False, shuffle=False)))


def gather_sample(keys: Gatherable, sample: Tensor, dimension: int) -> Floats:
    """The keys of a sorted ``sample`` of entries as float32 [m, dimension], read in order and in pieces."""
    rows = np.empty((len(sample), dimension), np.float32)
    start = 0
    for numbers in sample.split(fill_rows(dimension)):
        rows[start : start + len(numbers)] = keys.gather(numbers).float().numpy()
        start += len(numbers)
    return rows


def fill_rows(dimension: int) -> int:
    """How many keys are coded at a time. FAISS's last bits depend on it behind a rotation, so nothing else may decide it."""
    return max(1, min(MOST_FILL_ROWS, FILL_FLOATS // dimension))


def new_index(factory: str, dimension: int) -> Any:
    """An untrained FAISS index that takes entries by number. Raises :class:`InvalidInput` for a string FAISS refuses."""
    faiss = import_faiss()
    try:
        index = faiss.index_factory(dimension, factory)
    except RuntimeError as error:
        raise InvalidInput("index", f"{factory!r} is no FAISS factory string for width {dimension}: {faiss_said(error)}.") from None
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is None:
        return faiss.IndexIDMap(index)
    inverted.cp.seed, inverted.cp.niter = SEED, CELL_ITERATIONS
    codes = faiss.downcast_index(inverted)
    if isinstance(codes, faiss.IndexIVFPQ):
        codes.pq.cp.max_points_per_centroid, codes.pq.cp.niter = POINTS_PER_LIST, CODE_ITERATIONS
    return index


def train(factory: str, dimension: int, sample: Floats, entries: int, folder: Path, device: str = "cpu") -> IndexFacts:
    """Train an index on ``sample`` [m, dimension], drawn out of ``entries``, and write it to ``folder``, without entries.

    The same sample gives the same bytes on any number of threads. Raises :class:`NonFiniteKey`, :class:`InvalidInput`
    or :class:`IndexingError`.
    """
    faiss = import_faiss()
    require_finite(sample, None)
    index = new_index(factory, dimension)
    trained_on = 0 if index.is_trained else len(sample)
    if trained_on or not index.is_trained:
        with said_of(factory, f"be trained with {len(sample)} entries"):
            _train(index, sample, device)
    inverted = faiss.try_extract_index_ivf(index)
    facts = IndexFacts(
        factory, dimension, 0, 0 if inverted is None else inverted.nlist, trained_on, SEED, faiss.__version__,
        trained_entries=entries, points_per_list=POINTS_PER_LIST, cell_iterations=CELL_ITERATIONS,
        code_iterations=CODE_ITERATIONS, fill_rows=fill_rows(dimension),
    )  # fmt: skip
    write_index(index, facts, folder)
    return facts


def _train(index: Any, sample: Floats, device: str) -> None:
    inverted = _flat_cells(index)
    with steady_faiss():
        rows = sample
        if inverted is not None:
            for transform in transforms(index):
                with one_thread():
                    transform.train(rows)
                rows = in_blocks(transform.apply, rows)
            centroids = find_cells(rows, inverted.nlist, CELL_ITERATIONS, SEED, device)
        # Rotations, graphs and codes come out differently with more threads.
        with one_thread():
            if inverted is None:
                index.train(sample)
            else:
                inverted.quantizer.add(centroids)
                inverted.train(rows)
    index.is_trained = True


def _flat_cells(index: Any) -> Any:
    """The inverted file that is filled in parts, if its cells are points, with or without a graph over them; else None."""
    faiss = import_faiss()
    inverted = faiss.try_extract_index_ivf(index)
    points = {faiss.IndexFlat, faiss.IndexFlatL2, faiss.IndexHNSWFlat}
    if lists_start(index) is None or type(faiss.downcast_index(inverted.quantizer)) not in points:
        return None
    return inverted


def transforms(index: Any) -> list[Any]:
    """What an index does to a vector before it looks at it, in order."""
    faiss = import_faiss()
    if not isinstance(index, faiss.IndexPreTransform):
        return []
    return [faiss.downcast_VectorTransform(index.chain.at(place)) for place in range(index.chain.size())]


@contextmanager
def steady_faiss() -> Iterator[None]:
    """Let FAISS compute distances in one way only, and product codes in small blocks.

    Distances of few or narrow vectors take another way, much slower for a product code's parts, and with other last bits,
    below a threshold that any opened index moves. Product codes of large blocks take gigabytes.
    """
    faiss = import_faiss()
    settings = {"distance_compute_blas_threshold": 1, "product_quantizer_compute_codes_bs": CODE_ROWS}
    found = {name: getattr(faiss.cvar, name) for name in settings}
    for name, value in settings.items():
        setattr(faiss.cvar, name, value)
    try:
        yield
    finally:
        for name, value in found.items():
            setattr(faiss.cvar, name, value)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let FAISS compute with one thread."""
    faiss = import_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


@contextmanager
def said_of(factory: str, work: str) -> Iterator[None]:
    """Turn a failure of FAISS into :class:`IndexingError` with the factory string."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        raise IndexingError(f"The index {factory!r} can't {work}: {faiss_said(error)}. Choose another with --index.") from error


def require_finite(rows: Floats, first: int | None) -> None:
    """Raise :class:`NonFiniteKey` for a row that FAISS would take in silence and never find; ``first``: its entry number."""
    if np.isfinite(rows.sum(dtype=np.float64)):
        return
    row = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
    which = "a key of the training sample" if first is None else f"the key of entry {first + row}"
    raise NonFiniteKey(f"The index can't be made: {which} is not finite; build the datastore again with --dtype float32.")


def write_index(index: Any, facts: IndexFacts, folder: Path) -> None:
    """Write a FAISS index and its facts to ``folder``, whole or not at all."""
    with made_aside(folder) as aside:
        with new_file(aside / INDEX_FILE) as file:
            # Through a file of our own: FAISS's loses the end on a full disk and only prints a line.
            import_faiss().write_index(index, import_faiss().PyCallbackIOWriter(file.write))
        write_index_facts(aside, facts)
