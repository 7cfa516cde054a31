"""Where the keys of one shard go while it is made: a file of the store, or one without a name that nothing can read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from knnlm.datastore.files import named
from knnlm.datastore.reader import KEYS

PIECE_ROWS = 8_192


class KeyFile:
    """Rows [entries, dimension] of one dtype, written in any order. Plain writes, so that memory does not grow with the
    shard and a full disk is an error and not a signal. Use :meth:`create`, as a context."""

    def __init__(self, file: IO[bytes], path: Path, dtype: np.dtype[Any], entries: int, dimension: int) -> None:
        self._file, self._path, self._dtype, self._entries, self._dimension = file, path, dtype, entries, dimension
        self._head = file.tell()

    @classmethod
    def create(cls, folder: Path, dtype: str, entries: int, dimension: int) -> KeyFile:
        """``keys.npy`` in ``folder``; for dtype ``none`` a file without name, in float32, which ends with the process."""
        path = folder / KEYS
        if dtype == "none":
            return cls(tempfile.TemporaryFile(dir=folder), path, np.dtype(np.float32), entries, dimension)
        file = path.open("w+b")
        stored = np.dtype(dtype)
        head = {"descr": np.lib.format.dtype_to_descr(stored), "fortran_order": False, "shape": (entries, dimension)}
        np.lib.format.write_array_header_1_0(file, head)
        return cls(file, path, stored, entries, dimension)

    def write(self, row: int, keys: Tensor) -> None:
        """Rows from ``row`` on: [n, dimension] float32."""
        with named(self._path):
            self._file.seek(self._head + row * self._dimension * self._dtype.itemsize)
            self._file.write(keys.numpy().astype(self._dtype).tobytes())

    def pieces(self, first: int) -> Iterator[tuple[int, Tensor]]:
        """All rows in order, in pieces: (``first`` + number of the piece's first row, float32 [n, dimension])."""
        with named(self._path):
            self._file.flush()
        for start in range(0, self._entries, PIECE_ROWS):
            count = min(PIECE_ROWS, self._entries - start)
            self._file.seek(self._head + start * self._dimension * self._dtype.itemsize)
            raw = bytearray(self._file.read(count * self._dimension * self._dtype.itemsize))
            found = np.frombuffer(raw, dtype=self._dtype).reshape(count, self._dimension)
            yield first + start, torch.from_numpy(found.astype(np.float32, copy=False))

    def __enter__(self) -> KeyFile:
        return self

    def __exit__(self, *_: object) -> None:
        with named(self._path):
            self._file.close()
