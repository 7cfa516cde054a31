"""Neighbour indexes: which entries lie nearest to a query. Candidates only; exact distances are the retriever's work.

``ExactIndex`` compares with every stored key and is the reference; ``FaissIndex`` is any FAISS index, on CPU or GPU.
Knows keys by number, not what they mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from knnlm.datastore.files import read_json_with_checksum, write_json_with_checksum
from knnlm.datastore.reader import ShardedRows
from knnlm.entry_mask import EntryMask
from knnlm.errors import IndexingError, MissingDependency, StoreDamaged

EXACT = "exact"
INDEX_FILE, INDEX_METADATA = "index.faiss", "index.json"
GPU_LIMIT = 2048
# Codes of more bytes need lookup tables of half precision: a GPU's shared memory holds no larger ones.
GPU_FULL_TABLES = 48
RESIDENT_SHARE = 0.8


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
    """How an index was made.

    ``nlist``: cells of an inverted file, 0 without one. ``trained_on``: keys in its training sample, drawn with ``seed``
    out of ``trained_entries`` (all that there were then; None: ``entries``). ``points_per_list``: how many keys the sample
    was to have for each cell; ``cell_iterations`` and ``code_iterations``: rounds of k-means for cells and for product
    codes; ``fill_rows``: keys coded at a time. Those with a default were not noted in format version 1, which had it.
    """

    factory: str
    dimension: int
    entries: int
    nlist: int
    trained_on: int
    seed: int
    faiss_version: str | None
    trained_entries: int | None = None
    points_per_list: int = 64
    cell_iterations: int = 10
    code_iterations: int = 25
    fill_rows: int = 65_536


class ExactIndex:
    """Every key compared with every query, in tiles: torch only, no file of its own. The reference, and exact on a GPU.

    ``resident``: bytes of the device's memory that the keys may stay in, in their stored dtype (None: on a GPU 80 % of
    what is free, on a CPU none); keys that need more are read tile by tile at each search.
    """

    def __init__(self, keys: ShardedRows, device: str = "cpu", tile: int = 32_768, resident: int | None = None) -> None:
        self._keys, self._device, self._tile = keys, device, tile
        self._resident = _resident_keys(keys, device, tile, _spare_memory(device) if resident is None else resident)

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
        for start, keys in self._tiles():
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

    def _tiles(self) -> Iterator[tuple[int, Tensor]]:
        """All keys on the device in float32: (number of the first, tile)."""
        if self._resident is None:
            for start, stored in self._keys.chunks(self._tile):
                yield start, stored.to(self._device).float()
            return
        for start in range(0, len(self._resident), self._tile):
            yield start, self._resident[start : start + self._tile].float()


def _spare_memory(device: str) -> int:
    return 0 if device == "cpu" else int(RESIDENT_SHARE * torch.cuda.mem_get_info(torch.device(device))[0])


def _resident_keys(keys: ShardedRows, device: str, tile: int, memory: int) -> Tensor | None:
    """All keys on the device, in their stored dtype; None if they need more than ``memory`` bytes."""
    row = keys.slice(0, 1)
    if len(keys) * row.nbytes > memory:
        return None
    resident = torch.empty((len(keys), row.shape[1]), dtype=row.dtype, device=device)
    for start, stored in keys.chunks(tile):
        resident[start : start + len(stored)] = stored
    return resident


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
    """A FAISS index with its facts, opened by :meth:`open`."""

    def __init__(self, index: Any, facts: IndexFacts, device: str = "cpu") -> None:
        faiss = import_faiss()
        self.facts = facts
        self._device = device
        # FAISS leaves small batches of a flat search to a slow path unless this threshold fits the dimension.
        faiss.cvar.distance_compute_blas_threshold = 6 * facts.dimension
        if device != "cpu":
            index = to_gpu(index, device)
        self._index = index
        self._transformed = isinstance(faiss.downcast_index(index), faiss.IndexPreTransform)
        self._selects = device == "cpu" and (facts.nlist > 0 or facts.factory == "Flat")

    @classmethod
    def open(cls, folder: Path, device: str = "cpu") -> FaissIndex:
        """Read an index from its folder; the file is memory-mapped on a CPU. Raises :class:`StoreDamaged`."""
        facts = read_index_facts(folder)
        index = read_index_file(folder / INDEX_FILE, mapped=device == "cpu")
        _check_counts(folder / INDEX_FILE, index, facts)
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


def read_index_file(path: Path, *, mapped: bool = True) -> Any:
    """The FAISS index in a file; ``mapped``: without taking memory, and never to be added to (FAISS may abort the process).

    Raises :class:`StoreDamaged`.
    """
    faiss = import_faiss()
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
    except RuntimeError as error:
        raise StoreDamaged(f"{path} is damaged: FAISS can't read it ({faiss_said(error)}).") from error


def _check_counts(path: Path, index: Any, facts: IndexFacts) -> None:
    if index.ntotal != facts.entries or index.d != facts.dimension:
        raise StoreDamaged(
            f"{path} holds {index.ntotal} vectors of width {index.d}, but {INDEX_METADATA} says {facts.entries} of {facts.dimension}."
        )
    inverted = import_faiss().try_extract_index_ivf(index)
    nlist = 0 if inverted is None else inverted.nlist
    if nlist != facts.nlist:
        raise StoreDamaged(f"{path} has {nlist} cells, but {INDEX_METADATA} says {facts.nlist}.")
    if nlist and (held := inverted.invlists.compute_ntotal()) != facts.entries:
        raise StoreDamaged(f"{path} is damaged: its lists hold {held} entries, but its head says {facts.entries}.")


def read_index_facts(folder: Path) -> IndexFacts:
    """Facts of the index in ``folder``; raises :class:`StoreDamaged`."""
    content = read_json_with_checksum(folder / INDEX_METADATA)
    try:
        facts = IndexFacts(**content)
    except TypeError as error:
        raise StoreDamaged(f"{folder / INDEX_METADATA} is damaged: {error}.") from error
    for name, value in asdict(facts).items():
        if name not in ("factory", "faiss_version") and type(value) is not int and (name, value) != ("trained_entries", None):
            raise StoreDamaged(f"{folder / INDEX_METADATA} is damaged: {name} is {value!r}.")
    return facts


def write_index_facts(folder: Path, facts: IndexFacts) -> None:
    """Write what :func:`read_index_facts` reads; last of an index's files."""
    write_json_with_checksum(folder / INDEX_METADATA, asdict(facts))


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


def to_gpu(index: Any, device: str) -> Any:
    """A copy of a FAISS index on a GPU (``cuda[:N]``). Raises :class:`MissingDependency` or :class:`IndexingError`."""
    faiss = import_faiss()
    if not hasattr(faiss, "StandardGpuResources"):
        raise MissingDependency('This FAISS has no GPU support; install it with: pip install "knnlm[gpu]".')
    options = faiss.GpuClonerOptions()
    inverted = faiss.try_extract_index_ivf(index)
    options.useFloat16LookupTables = inverted is not None and inverted.code_size > GPU_FULL_TABLES
    try:
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), torch.device(device).index or 0, index, options)
    except RuntimeError as error:
        raise IndexingError(
            f"FAISS can't move this index to {device}: {faiss_said(error)}. Build it with --index exact or IVF…,SQ8."
        ) from error


def faiss_said(error: Exception) -> str:
    """What FAISS said, without the function and source line that it says first."""
    return re.sub(r"^Error in .* at \S+:\d+: ", "", str(error).strip().split("\n")[-1])[:200]
