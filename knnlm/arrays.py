"""NumPy files: memory-mapped, and a damaged one fails in one way. Knows nothing of what they hold."""

from __future__ import annotations

from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO, Literal

import numpy as np


def map_array(path: Path, mode: Literal["r", "c"]) -> np.ndarray[Any, Any]:
    """The array of a ``.npy`` file, read-only (``r``) or copy-on-write (``c``). Raises ValueError if it is none."""
    try:
        found = np.load(path, mmap_mode=mode, allow_pickle=False)
    # NumPy parses a head as Python, and lets the parser's errors through.
    except (OSError, EOFError, SyntaxError, TokenError) as error:
        raise ValueError(str(error)) from error
    if not isinstance(found, np.ndarray):
        raise ValueError("it is an archive of arrays")
    return found


def write_array(file: BinaryIO, array: np.ndarray[Any, Any]) -> None:
    """Write ``array`` as ``np.save`` does, which says of a full disk neither that it is full nor where."""
    array = np.ascontiguousarray(array)
    write_header(file, array.dtype, array.shape)
    file.write(array.data)


def write_header(file: BinaryIO, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """The head of a ``.npy`` file, after which the array's bytes follow in C order."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
