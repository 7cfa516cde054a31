"""The inverted lists at the end of a FAISS index file, read list by list without holding them in memory.

FAISS writes an inverted file as a head (centroids, code tables) followed by its lists: the word ``ilar``, the number of
lists, the bytes of a code, the lists' sizes, then for each list its codes and its ids. A file of lists alone begins with
that word. Knows bytes; knows no search and no keys.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from knnlm.errors import StoreDamaged
from knnlm.index import INDEX_FILE, import_faiss, read_index_file

ID_BYTES = 8
PIECE_BYTES = 1 << 24
MOST_LISTS, MOST_CODE_BYTES = 1 << 28, 1 << 24

Sizes = np.ndarray[Any, np.dtype[np.int64]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class InvertedLists:
    """Lists of codes and ids in a file, memory-mapped. ``sizes`` [nlist] int64: entries of each; ``code_size`` in bytes.

    ``start``: where in the file they begin; they end with the file. Raises :class:`StoreDamaged`.
    """

    def __init__(self, path: Path, start: int = 0) -> None:
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.sizes, self.code_size, data = _read_sizes(self._map, start)
        except (OSError, ValueError, OverflowError, IndexError, struct.error) as error:
            raise StoreDamaged(f"{path} is damaged: it holds no inverted lists ({error}).") from error
        self.path = path
        self._starts = data + np.concatenate([[0], np.cumsum(self.sizes * (self.code_size + ID_BYTES))])
        if self._starts[-1] != len(self._map):
            raise StoreDamaged(f"{path} is damaged: it has {len(self._map)} bytes, but its lists end after {self._starts[-1]}.")

    @classmethod
    def of_index(cls, folder: Path) -> InvertedLists:
        """Lists of the index in ``folder``. Raises :class:`StoreDamaged` if its file does not end in plain lists."""
        path = folder / INDEX_FILE
        found = without_lists(path)
        if found is None:
            raise StoreDamaged(f"{path} does not end in plain inverted lists.")
        return cls(path, found[1])

    def codes(self, number: int) -> Iterator[Bytes]:
        """Codes of a list in pieces [n, code_size], each valid until the next is asked for."""
        return self._pieces(int(self._starts[number]), int(self.sizes[number]), self.code_size, np.dtype(np.uint8))

    def ids(self, number: int) -> Iterator[Sizes]:
        """Ids of a list in pieces [n], cut where :meth:`codes` is cut; each valid until the next is asked for."""
        start = int(self._starts[number]) + int(self.sizes[number]) * self.code_size
        return self._pieces(start, int(self.sizes[number]), ID_BYTES, np.dtype("<i8"))

    def _pieces(self, start: int, rows: int, width: int, dtype: np.dtype[Any]) -> Iterator[Any]:
        step = max(1, PIECE_BYTES // max(self.code_size, ID_BYTES))
        for first in range(0, rows, step):
            count = min(step, rows - first)
            flat = np.frombuffer(self._map, dtype, count * width // dtype.itemsize, start + first * width)
            yield flat.reshape(count, width) if dtype == np.uint8 else flat
            if count == step:
                self.forget()

    def forget(self) -> None:
        """Give back the memory of all pages read so far; they are read again where they are still in use."""
        self._map.madvise(mmap.MADV_DONTNEED)


def _read_sizes(content: mmap.mmap, start: int) -> tuple[Sizes, int, int]:
    """Sizes of the lists, bytes of a code, and where the first list begins."""
    word, nlist, code_size, kind, numbers = struct.unpack_from("<4sQQ4sQ", content, start)
    if word != b"ilar" or kind not in (b"full", b"sprs") or nlist > MOST_LISTS or code_size > MOST_CODE_BYTES:
        raise ValueError(f"found {word!r}, {nlist}, {code_size} and {kind!r}")
    data = start + struct.calcsize("<4sQQ4sQ")
    found = np.frombuffer(content, "<i8", numbers, data)
    if kind == b"full":
        sizes = found.copy()
    else:
        sizes = np.zeros(nlist, np.int64)
        sizes[found[::2]] = found[1::2]
    if len(sizes) != nlist or (sizes < 0).any():
        raise ValueError("the sizes of its lists make no sense")
    return sizes, code_size, data + found.nbytes


def lists_head(sizes: Sizes, code_size: int) -> bytes:
    """What stands before the lists themselves, as FAISS writes it: sparse where at most half of the lists hold entries."""
    filled = np.flatnonzero(sizes)
    full = len(filled) > len(sizes) // 2
    numbers = sizes if full else np.stack([filled, sizes[filled]], axis=1).ravel()
    return (
        struct.pack("<4sQQ4sQ", b"ilar", len(sizes), code_size, b"full" if full else b"sprs", len(numbers))
        + numbers.astype("<i8").tobytes()
    )


def without_lists(path: Path) -> tuple[Any, int] | None:
    """The FAISS index in a file less its entries, and where in the file its lists begin; None if it is not made so.

    The index is memory-mapped: to be written elsewhere, never to be added to.
    """
    faiss = import_faiss()
    index = read_index_file(path)
    inverted = faiss.try_extract_index_ivf(index)
    if not _has_plain_lists(inverted):
        return None
    lists = faiss.ArrayInvertedLists(inverted.nlist, inverted.code_size)
    inverted.replace_invlists(lists, True)
    lists.this.disown()
    index.ntotal = inverted.ntotal = 0
    start = lists_start(index)
    return None if start is None else (index, start)


def lists_start(index: Any) -> int | None:
    """Where in the file of an empty FAISS index its lists begin; None if it does not end in lists of plain codes."""
    faiss = import_faiss()
    inverted = faiss.try_extract_index_ivf(index)
    if not _has_plain_lists(inverted):
        return None
    end = _End()
    faiss.write_index(index, faiss.PyCallbackIOWriter(end.write))
    empty = lists_head(np.zeros(inverted.nlist, np.int64), inverted.code_size)
    return end.length - len(empty) if end.last.endswith(empty) else None


def _has_plain_lists(inverted: Any) -> bool:
    faiss = import_faiss()
    return inverted is not None and type(faiss.downcast_InvertedLists(inverted.invlists)) is faiss.ArrayInvertedLists


class _End:
    """A file of which only the length and the last bytes are kept."""

    def __init__(self) -> None:
        self.length, self.last = 0, b""

    def write(self, content: bytes) -> int:
        self.length += len(content)
        self.last = (self.last + content[-64:])[-64:]
        return len(content)


def list_sizes(folder: Path) -> Sizes:
    """Entries in each cell of the index in ``folder`` [nlist]; none for an index without an inverted file."""
    # What is taken out of an index lives as long as the index does.
    index = read_index_file(folder / INDEX_FILE)
    inverted = import_faiss().try_extract_index_ivf(index)
    return np.array([inverted.invlists.list_size(number) for number in range(inverted.nlist if inverted is not None else 0)], np.int64)


def imbalance(sizes: Sizes) -> float:
    """FAISS's imbalance factor: how much longer a search takes than in lists of equal sizes (1: no longer)."""
    total = float(sizes.sum())
    return float(len(sizes) * np.square(sizes.astype(np.float64)).sum() / (total * total)) if total else 1.0
