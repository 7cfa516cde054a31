"""Neighbour indexes: which entries lie nearest to a query. Candidates only; exact distances are the retriever's work.

``ExactIndex`` compares with every stored key and is the reference; ``FaissIndex`` is any FAISS index, on CPU or GPU.
Knows keys by number, not what they mean.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from knnlm.datastore.files import read_json_with_checksum, write_json_with_checksum
from knnlm.datastore.reader import ShardedRows
from knnlm.entry_mask import EntryMask
from knnlm.errors import IndexingError, InvalidInput, MissingDependency, StoreDamaged

EXACT = "exact"
INDEX_FILE, INDEX_METADATA = "index.faiss", "index.json"
TRAINING_POINTS_PER_LIST, FEWEST_TRAINING_POINTS = 64, 20_000
GPU_LIMIT = 2048
GPU_PQ_SIZES = (96, 64, 56, 48, 40, 32, 28, 24, 20, 16, 12, 8, 4)
ADD_ROWS = 65_536
SEED = 20200430


@dataclass(frozen=True)
class Candidates:
    """Results of a search in the index's own order: ``distances`` [n, c] float32, ``ids`` [n, c] int64, -1 where none."""

    distances: Tensor
    ids: Tensor


class NeighborIndex(Protocol):
    """Finds candidates for the nearest entries of each query."""

    @property
    def description(self) -> str:
        """What kind of index it is, for people."""

    @property
    def nlist(self) -> int:
        """Cells of its inverted file; 0 without one."""

    @property
    def entries(self) -> int:
        """Number of entries it holds."""

    def search(self, queries: Tensor, k: int, count: int, *, probes: int, allowed: EntryMask | None = None) -> Candidates:
        """The ``count`` best candidates of each query [n, d] float32, for ``k`` neighbours that are wanted in the end.

        ``probes``: how many cells an inverted file looks into; ``allowed``: the entries that may be returned (None: all).
        A row's result depends on these and on its own query alone.
        """


@dataclass(frozen=True)
class IndexFacts:
    """How an index was made. ``nlist``: cells of an inverted file, 0 without one. ``trained_on``: keys in its sample."""

    factory: str
    dimension: int
    entries: int
    nlist: int
    trained_on: int
    seed: int
    faiss_version: str | None


def choose_factory(entries: int, dimension: int, *, gpu: bool = False) -> str:
    """The FAISS factory string for ``--index auto``; ``docs/adr/0003-index-defaults.md`` has the figures behind it.

    GPU indexes have no RaBitQ, and product quantizers of certain sizes only.
    """
    if entries <= 50_000:
        return "Flat"
    reduced, width = ("", dimension) if dimension <= 1024 else ("PCAR512,", 512)
    root = math.sqrt(entries)
    if entries <= 1_000_000:
        return f"{reduced}IVF{_lists(2 * root, entries)},SQ8"
    code = "RaBitQ"
    if gpu:
        code = f"PQ{next((m for m in GPU_PQ_SIZES if width % m == 0), 1)}x8np"
    if entries <= 10_000_000:
        return f"{reduced}IVF{_lists(4 * root, entries)},{code}"
    if entries <= 100_000_000:
        return f"{reduced}IVF65536_HNSW32,{code}"
    return "OPQ64_256,IVF262144_HNSW32,PQ64x8np"


def _lists(wanted: float, entries: int) -> int:
    """A number of cells near ``wanted`` that ``entries`` training points can fill (FAISS wants 39 a cell)."""
    return max(1, min(round(wanted), entries // 39))


class ExactIndex:
    """Every key compared with every query, in tiles: torch only, no file of its own. The reference, and exact on a GPU."""

    def __init__(self, keys: ShardedRows, device: str = "cpu", tile: int = 32_768) -> None:
        self._keys, self._device, self._tile = keys, device, tile

    @property
    def description(self) -> str:
        """What kind of index it is, for people."""
        return f"exact search over the stored keys ({self._device})"

    @property
    def nlist(self) -> int:
        """See :attr:`NeighborIndex.nlist`."""
        return 0

    @property
    def entries(self) -> int:
        """Number of entries it holds."""
        return len(self._keys)

    def search(self, queries: Tensor, k: int, count: int, *, probes: int = 0, allowed: EntryMask | None = None) -> Candidates:
        """See :meth:`NeighborIndex.search`; ``k`` and ``probes`` make no difference here."""
        queries = queries.to(self._device)
        best = torch.full((len(queries), 0), torch.inf, device=self._device)
        ids = torch.zeros((len(queries), 0), dtype=torch.int64, device=self._device)
        for start, stored in self._keys.chunks(self._tile):
            keys = stored.to(self._device).float()
            distances = (keys * keys).sum(1) - 2 * (queries @ keys.T)
            if allowed is not None:
                distances.masked_fill_(~allowed.rows(start, start + len(keys)).to(self._device), torch.inf)
            values, places = _smallest(distances, min(count, len(keys)))
            best, order = _smallest(torch.cat([best, values], 1), min(count, best.shape[1] + values.shape[1]))
            ids = torch.cat([ids, places + start], 1).gather(1, order)
        ids = torch.where(best < torch.inf, ids, -1)
        best = (best + (queries * queries).sum(1, keepdim=True)).clamp_(min=0)
        missing = count - ids.shape[1]
        return Candidates(
            torch.nn.functional.pad(best.cpu(), (0, missing), value=torch.inf), torch.nn.functional.pad(ids.cpu(), (0, missing), value=-1)
        )


def _smallest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` smallest of each row by (value, place), in that order; ``topk`` alone takes any of equal ones."""
    best, places = values.topk(count, largest=False)
    last = best[:, -1:]
    tied = ((values == last).sum(1) > (best == last).sum(1)).nonzero()[:, 0]
    if len(tied):
        nearer, equal = values[tied] < last[tied], values[tied] == last[tied]
        still_free = count - nearer.sum(1, keepdim=True)
        places[tied] = (nearer | (equal & (equal.cumsum(1) <= still_free))).nonzero()[:, 1].view(-1, count)
    places = places.sort(dim=1).values
    best, order = values.gather(1, places).sort(dim=1, stable=True)
    return best, places.gather(1, order)


class FaissIndex:
    """A FAISS index with its facts; made by :func:`build_index`, opened by :meth:`open`."""

    def __init__(self, index: Any, facts: IndexFacts, device: str = "cpu") -> None:
        faiss = import_faiss()
        self.facts = facts
        self._device = device
        # FAISS leaves small batches of a flat search to a slow path unless this threshold fits the dimension.
        faiss.cvar.distance_compute_blas_threshold = 6 * facts.dimension
        if device != "cpu":
            index = _to_gpu(index, device)
        self._index = index
        self._transformed = isinstance(faiss.downcast_index(index), faiss.IndexPreTransform)
        self._selects = device == "cpu" and (facts.nlist > 0 or facts.factory == "Flat")

    @classmethod
    def open(cls, folder: Path, device: str = "cpu") -> FaissIndex:
        """Read an index from its folder; the file is memory-mapped on a CPU. Raises :class:`StoreDamaged`."""
        faiss = import_faiss()
        facts = read_index_facts(folder)
        path = folder / INDEX_FILE
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if device == "cpu" else 0)
        except RuntimeError as error:
            raise StoreDamaged(f"{path} is damaged: FAISS can't read it ({_first_line(error)}).") from error
        if index.ntotal != facts.entries or index.d != facts.dimension:
            raise StoreDamaged(
                f"{path} holds {index.ntotal} vectors of width {index.d}, but {INDEX_METADATA} says {facts.entries} of {facts.dimension}."
            )
        return cls(index, facts, device)

    @property
    def description(self) -> str:
        """What kind of index it is, for people."""
        return f"FAISS {self.facts.factory} ({self._device})"

    @property
    def entries(self) -> int:
        """Number of entries it holds."""
        return self.facts.entries

    @property
    def nlist(self) -> int:
        """See :attr:`NeighborIndex.nlist`."""
        return self.facts.nlist

    def list_sizes(self) -> Tensor | None:
        """Entries in each cell [nlist] int64; None without an inverted file, and on a GPU."""
        if not self.facts.nlist or self._device != "cpu":
            return None
        lists = import_faiss().extract_index_ivf(self._index).invlists
        return torch.tensor([lists.list_size(cell) for cell in range(self.facts.nlist)])

    def search(self, queries: Tensor, k: int, count: int, *, probes: int, allowed: EntryMask | None = None) -> Candidates:
        """See :meth:`NeighborIndex.search`."""
        if queries.ndim != 2 or queries.shape[1] != self.facts.dimension:
            raise IndexingError(f"Queries have shape {list(queries.shape)}, but the index holds vectors of width {self.facts.dimension}.")
        if self._device != "cpu" and max(count, probes) > GPU_LIMIT:
            raise IndexingError(
                f"A FAISS index on a GPU looks into at most {GPU_LIMIT} cells for at most {GPU_LIMIT} candidates, "
                f"but {probes} and {count} were asked for; use a smaller k."
            )
        rows = queries.float().cpu().contiguous()
        if allowed is not None and not self._selects:
            return self._search_and_leave_out(rows, count, probes, allowed)
        parameters = self._parameters(probes, allowed)
        found = self._search(rows, count, parameters)
        if self.facts.factory == "Flat" and self._device == "cpu":
            self._settle_ties(rows, k, count, found, parameters)
        return found

    def _search(self, queries: Tensor, count: int, parameters: Any) -> Candidates:
        distances, ids = self._index.search(queries.numpy(), count, params=parameters)
        return Candidates(torch.from_numpy(distances), torch.from_numpy(ids))

    def _search_and_leave_out(self, queries: Tensor, count: int, probes: int, allowed: EntryMask) -> Candidates:
        """For an index that takes no selector: ask for more until ``count`` allowed candidates are there, or no more come."""
        most = max(count, self.entries if self._device == "cpu" else min(self.entries, GPU_LIMIT))
        wanted = count
        while True:
            wanted = min(2 * wanted, most)
            found = self._search(queries, wanted, self._parameters(probes, None))
            kept = allowed.allows(found.ids)
            exhausted = found.ids[:, -1] < 0
            if wanted == most or bool(((kept.sum(1) >= count) | exhausted).all()):
                break
        # A stable sort brings the allowed ones to the front and leaves them in their order.
        order = (~kept).to(torch.int8).sort(dim=1, stable=True).indices[:, :count]
        kept = kept.gather(1, order)
        return Candidates(torch.where(kept, found.distances.gather(1, order), torch.inf), torch.where(kept, found.ids.gather(1, order), -1))

    def _settle_ties(self, queries: Tensor, k: int, count: int, found: Candidates, parameters: Any) -> None:
        """Search again, one by one, the rows where equal keys may reach from the k-th place beyond the last.

        Beginnings that many documents share give equal keys. For several queries at once FAISS takes matrix products,
        whose last bits differ between equal keys, so which of them it returns would depend on the batch; a query alone
        is measured key by key, and the first of equal ones is kept.
        """
        kth, last = found.distances[:, min(k, count) - 1], found.distances[:, -1]
        rounding = 1e-5 * ((queries * queries).sum(1) + last)
        doubtful = (kth + rounding >= last) & (found.ids[:, -1] >= 0)
        for row in doubtful.nonzero()[:, 0].tolist() if len(queries) > 1 else []:
            alone = self._search(queries[row : row + 1], count, parameters)
            found.distances[row], found.ids[row] = alone.distances[0], alone.ids[0]

    def _parameters(self, probes: int, allowed: EntryMask | None) -> Any:
        faiss = import_faiss()
        chosen = {} if allowed is None else {"sel": faiss.IDSelectorBitmap(allowed.bits)}
        if not self.facts.nlist:
            return faiss.SearchParameters(**chosen) if chosen else None
        inner = faiss.SearchParametersIVF(nprobe=probes, **chosen)
        return faiss.SearchParametersPreTransform(index_params=inner) if self._transformed else inner


def build_index(keys: ShardedRows, dimension: int, factory: str, folder: Path, device: str = "cpu") -> Iterator[tuple[str, int, int]]:
    """Train, fill and write an index into ``folder``; yields (stage, done, total) as it goes.

    The training sample is drawn with a fixed seed and read in ascending order; entries are added in order with their
    numbers as ids, so the same keys give the same file. Raises :class:`InvalidInput` for a factory string that FAISS
    refuses, :class:`IndexingError` if it fails.
    """
    if factory == EXACT:
        _write_facts(folder, IndexFacts(EXACT, dimension, len(keys), 0, 0, 0, None))
        return
    faiss = import_faiss()
    index, inverted = _new_index(factory, dimension, len(keys))
    nlist = inverted.nlist if inverted is not None else 0
    trained_on = 0
    if not index.is_trained:
        sample = training_sample(len(keys), max(TRAINING_POINTS_PER_LIST * nlist, FEWEST_TRAINING_POINTS))
        trained_on = len(sample)
        yield "training the index", 0, trained_on
        with _said_of(factory, f"be trained with {trained_on} entries"):
            index.train(keys.gather(sample).float().numpy())
        yield "training the index", trained_on, trained_on
    for start, piece in keys.chunks(ADD_ROWS):
        with _said_of(factory, "take entries by number"):
            index.add_with_ids(piece.float().numpy(), torch.arange(start, start + len(piece)).numpy())
        yield "filling the index", start + len(piece), len(keys)
    folder.mkdir(parents=True, exist_ok=True)
    faiss.write_index(index, str(folder / INDEX_FILE))
    _write_facts(folder, IndexFacts(factory, dimension, len(keys), nlist, trained_on, SEED, faiss.__version__))


@contextmanager
def _said_of(factory: str, work: str) -> Iterator[None]:
    """Turn a failure of FAISS into :class:`IndexingError` with the factory string."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        raise IndexingError(f"The index {factory!r} can't {work}: {_first_line(error)}. Choose another with --index.") from error


def require_buildable(factory: str, dimension: int, entries: int) -> None:
    """Raise :class:`InvalidInput` for a factory string that FAISS refuses, or that needs more entries than there are."""
    if factory != EXACT:
        _new_index(factory, dimension, entries)


def training_sample(entries: int, most: int) -> Tensor:
    """Sorted numbers of at most ``most`` entries, drawn with the project's seed."""
    if entries <= most:
        return torch.arange(entries)
    generator = torch.Generator().manual_seed(SEED)
    return torch.randperm(entries, generator=generator)[:most].sort().values


def _new_index(factory: str, dimension: int, entries: int) -> tuple[Any, Any]:
    faiss = import_faiss()
    try:
        index = faiss.index_factory(dimension, factory)
    except RuntimeError as error:
        raise InvalidInput("index", f"{factory!r} is no FAISS factory string for width {dimension}: {_first_line(error)}.") from None
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is None:
        index = faiss.IndexIDMap2(index)
    elif inverted.nlist > entries:
        raise InvalidInput(
            "index", f"{factory!r} has {inverted.nlist} cells, but there are only {entries} entries to train them with; use fewer."
        )
    else:
        inverted.cp.seed = SEED
    return index, inverted


def read_index_facts(folder: Path) -> IndexFacts:
    """Facts of the index in ``folder``; raises :class:`StoreDamaged`."""
    content = read_json_with_checksum(folder / INDEX_METADATA)
    try:
        facts = IndexFacts(**content)
    except TypeError as error:
        raise StoreDamaged(f"{folder / INDEX_METADATA} is damaged: {error}.") from error
    for name in ("dimension", "entries", "nlist", "trained_on", "seed"):
        if type(getattr(facts, name)) is not int:
            raise StoreDamaged(f"{folder / INDEX_METADATA} is damaged: {name} is {getattr(facts, name)!r}.")
    return facts


def open_index(folder: Path, keys: ShardedRows | None, entries: int, device: str = "cpu") -> NeighborIndex:
    """The index of a datastore of ``entries``, as its metadata says; exact search needs its ``keys``.

    Raises :class:`StoreDamaged` or :class:`MissingDependency`.
    """
    facts = read_index_facts(folder)
    if facts.entries != entries:
        raise StoreDamaged(f"{folder} indexes {facts.entries} entries, but the datastore has {entries}.")
    if facts.factory != EXACT:
        return FaissIndex.open(folder, device)
    if keys is None:
        raise StoreDamaged(f"{folder} says exact search, but the datastore keeps no keys to search.")
    return ExactIndex(keys, device)


def import_faiss() -> Any:
    """The faiss module; raises :class:`MissingDependency` that names the extra to install."""
    try:
        import faiss
    except ImportError as error:
        raise MissingDependency(
            f'FAISS is not installed ({error}); install it with: pip install "knnlm[cpu]" (or "knnlm[gpu]").'
        ) from error
    return faiss


def _to_gpu(index: Any, device: str) -> Any:
    faiss = import_faiss()
    if not hasattr(faiss, "StandardGpuResources"):
        raise MissingDependency('This FAISS has no GPU support; install it with: pip install "knnlm[gpu]".')
    try:
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), torch.device(device).index or 0, index)
    except RuntimeError as error:
        raise IndexingError(
            f"FAISS can't move this index to {device}: {_first_line(error)}. Build it with --index exact or IVF…,SQ8."
        ) from error


def _write_facts(folder: Path, facts: IndexFacts) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json_with_checksum(folder / INDEX_METADATA, json.loads(json.dumps(asdict(facts))))


def _first_line(error: Exception) -> str:
    """What FAISS said, without the function and source line that it says first."""
    return re.sub(r"^Error in .* at \S+:\d+: ", "", str(error).strip().split("\n")[-1])[:200]
