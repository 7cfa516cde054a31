"""What an index will take, known before anything runs: cells, training sample, memory, disk; and what can't be built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from knnlm.errors import InvalidInput
from knnlm.index import EXACT, import_faiss
from knnlm.inverted_lists import ID_BYTES, lists_start
from knnlm_index_builder.train_index import CODE_ROWS, GPU_PQ_SIZES, fill_rows, new_index, training_points, transforms

# Measured: what FAISS takes beside the arrays counted below.
WORKING_BYTES = 160 << 20
FLOAT_BYTES, POINT_BYTES, COPIES = 4, 32, 3


@dataclass(frozen=True)
class IndexPlan:
    """An index that can be built.

    ``nlist``: its cells, 0 without an inverted file. ``mergeable``: it is filled in parts that are merged on disk, else
    whole in memory. ``training_points``: keys in its training sample, 0 if it needs none. ``training_bytes`` and
    ``filling_bytes``: memory at the peak of each, upper bounds, model and keys not counted. ``entry_bytes``: of an entry's
    code and number in its file; ``disk_bytes``: of the file.
    """

    factory: str
    nlist: int
    mergeable: bool
    training_points: int
    training_bytes: int
    filling_bytes: int
    entry_bytes: int
    disk_bytes: int


def plan_index(
    factory: str, dimension: int, entries: int, *,
    device: str = "cpu", memory: int | None = None, keys_stored: bool = True, part_entries: int | None = None,
) -> IndexPlan:  # fmt: skip
    """The plan of an index over ``entries`` keys, to be built within ``memory`` bytes (None: as much as it takes).

    ``part_entries``: entries of the largest part, to be filled at once (None: all). Raises :class:`InvalidInput` for a
    string that FAISS refuses, for more cells than entries, for what needs more memory or what a GPU can't do, and,
    without stored keys, for what would keep whole keys or has no distances of its own.
    """
    if factory == EXACT:
        if not keys_stored:
            raise InvalidInput("index", "'exact' searches the stored keys, but none are kept; choose IVF…,SQ8 or IVF…,RaBitQ.")
        return IndexPlan(EXACT, 0, False, 0, 0, 0, 0, 0)
    index = new_index(factory, dimension)
    inverted = import_faiss().try_extract_index_ivf(index)
    if inverted is not None and inverted.nlist > entries:
        raise InvalidInput(
            "index", f"{factory!r} has {inverted.nlist} cells, but there are only {entries} entries to train them with; use fewer."
        )
    if isinstance(import_faiss().downcast_index(index), import_faiss().IndexIVFFlatDedup):
        raise InvalidInput("index", f"{factory!r} keeps equal keys once, but each is an entry of its own; choose IVF…,Flat.")
    mergeable = lists_start(index) is not None
    if not keys_stored:
        _require_codes(factory, inverted, mergeable)
    if device != "cpu":
        _require_gpu(factory, index)
    plan = _sized(factory, dimension, entries, index, mergeable, memory, part_entries or entries)
    if memory is not None and (needed := max(plan.training_bytes, plan.filling_bytes)) > memory:
        work = "training" if needed == plan.training_bytes else "filling"
        raise InvalidInput(
            "index",
            f"{work} {factory!r} takes up to {needed} bytes of memory (with the least sample that it can do with), but {memory} are "
            "allowed; allow more, or choose fewer cells, smaller codes or a reduction such as PCAR256 in front.",
        )
    return plan


def _sized(factory: str, dimension: int, entries: int, index: Any, mergeable: bool, memory: int | None, part_entries: int) -> IndexPlan:
    inverted = import_faiss().try_extract_index_ivf(index)
    nlist, width = (0, dimension) if inverted is None else (inverted.nlist, inverted.d)
    cells = nlist * (width * FLOAT_BYTES + _links(inverted.quantizer if inverted is not None else None))
    fixed = WORKING_BYTES + _tables(inverted) + COPIES * cells
    # The sample, the same behind a rotation, and what is left of it beside its cells' centroids.
    per_point = FLOAT_BYTES * (dimension + width * (2 if transforms(index) else 1)) + POINT_BYTES
    points = 0
    if not index.is_trained:
        affordable = None if memory is None else max(memory - fixed, 0) // per_point
        points = training_points(nlist, entries, affordable)
    code = (inverted.code_size if mergeable else _code_size(index)) + ID_BYTES
    filled = part_entries if mergeable else entries
    step = min(fill_rows(dimension), filled) * FLOAT_BYTES * (dimension + COPIES * width)
    # A list that grows is copied to one of twice its size.
    filling = WORKING_BYTES + _tables(inverted) + 2 * cells + step + COPIES * filled * code
    training = fixed + points * per_point if points else 0
    return IndexPlan(factory, nlist, mergeable, points, training, filling, code, cells + entries * code)


def _code_size(index: Any) -> int:
    """Bytes of an entry in an index that is filled whole."""
    faiss = import_faiss()
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexIDMap) else index
    return int(getattr(inner, "storage", inner).sa_code_size()) + _links(inner)


def _links(index: Any) -> int:
    """Bytes of an entry's links in a graph; 0 for what is no graph."""
    faiss = import_faiss()
    graph = getattr(faiss.downcast_index(index), "hnsw", None) if index is not None else None
    # Those of the ground level; the few above it, and where each entry's begin, take about as much as four more.
    return 0 if graph is None else (graph.nb_neighbors(0) + 4) * FLOAT_BYTES


def _tables(inverted: Any) -> int:
    """Bytes of the distances from a block of vectors to every word of a product code, in all threads."""
    faiss = import_faiss()
    codes = faiss.downcast_index(inverted) if inverted is not None else None
    if not isinstance(codes, faiss.IndexIVFPQ):
        return 0
    return int(faiss.omp_get_max_threads() * CODE_ROWS * codes.pq.M * codes.pq.ksub * FLOAT_BYTES)


def _require_codes(factory: str, inverted: Any, mergeable: bool) -> None:
    faiss = import_faiss()
    if not mergeable or isinstance(faiss.downcast_index(inverted), faiss.IndexIVFFlat):
        raise InvalidInput(
            "index",
            f"{factory!r} keeps whole keys or can't be made on disk, but no keys are kept; choose an inverted file with codes, "
            "such as IVF…,SQ8, IVF…,RaBitQ or IVF…,PQ64x8np.",
        )


def _require_gpu(factory: str, index: Any) -> None:
    """FAISS's classic GPU indexes: Flat, and inverted files over flat cells with keys, scalar or 8-bit product codes."""
    faiss = import_faiss()
    inverted = faiss.try_extract_index_ivf(index)
    inner = faiss.downcast_index(inverted if inverted is not None else index.index)
    problem = None
    if type(inner) not in {faiss.IndexFlat, faiss.IndexFlatL2, faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ}:
        problem = "FAISS has no such index on a GPU"
    elif inverted is not None and type(faiss.downcast_index(inverted.quantizer)) not in {faiss.IndexFlat, faiss.IndexFlatL2}:
        problem = "on a GPU, cells are compared one by one, without a graph or codes over them"
    elif type(inner) is faiss.IndexIVFPQ and (inner.pq.nbits != 8 or inner.pq.M not in GPU_PQ_SIZES):
        sizes = ", ".join(map(str, sorted(GPU_PQ_SIZES)))
        problem = f"a GPU's product codes have 8 bits and {sizes} parts, not {inner.pq.nbits} and {inner.pq.M}"
    if problem is not None:
        raise InvalidInput("index", f"{factory!r} can't be used on a GPU: {problem}; choose IVF…,SQ8, IVF…,PQ64x8np or exact.")
