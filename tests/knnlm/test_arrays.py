"""NumPy files are as ``np.save`` writes them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from knnlm.arrays import map_array, write_array


@pytest.mark.parametrize("dtype", ["float16", "float32", "int32", "int64", "uint32"])
@pytest.mark.parametrize("shape", [(0,), (7,), (3, 2), (0, 4)])
def test_arrays_are_written_as_numpy_writes_them(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    array = np.arange(np.prod(shape)).astype(dtype).reshape(shape)
    expected = io.BytesIO()
    np.save(expected, array)
    path = tmp_path / "array.npy"
    with path.open("wb") as file:
        write_array(file, array)
    assert path.read_bytes() == expected.getvalue()
    if array.size:
        assert np.array_equal(map_array(path, "r"), array)


def test_every_second_row_is_written_in_order(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.int32).reshape(8, 3)[::2]
    with (tmp_path / "array.npy").open("wb") as file:
        write_array(file, array)
    assert np.array_equal(np.load(tmp_path / "array.npy"), array)
