"""Token ids in NumPy files: documents that no tokenizer is needed for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from knnlm.arrays import map_array
from knnlm.inputs.document import Document, IntArray
from knnlm.inputs.files import InputFile
from knnlm.inputs.reading import Reading


def read_tokens(file: InputFile, reading: Reading) -> Iterator[Document]:
    """A 1-D array is a document, a 2-D array one for each row; both are mapped, not read into memory."""
    with _mappable(file) as path:
        try:
            array = map_array(path, "r")
        except ValueError as error:
            reading.problems.found("unreadable files", f"{file.place} is no NumPy array: {error}")
            return
        if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
            reading.problems.found(
                "no token ids",
                f"{file.place} must be a 1-D or 2-D array of integer token ids, but is {array.dtype}{list(array.shape)}",
            )
            return
        yield from _documents(file, array, reading)


def _documents(file: InputFile, array: IntArray, reading: Reading) -> Iterator[Document]:
    if array.ndim == 1:
        yield Document(file.name, file.source, tokens=array)
        return
    for row, tokens in enumerate(array):
        reading.meter.count(tokens.nbytes)
        yield Document(f"{file.name}:{row}", file.source, tokens=tokens)


@contextmanager
def _mappable(file: InputFile) -> Iterator[Path]:
    """A local file with its bytes: a remote one is copied beside, for what is mapped must lie on a disk."""
    if not file.remote:
        yield Path(file.path)
        return
    with TemporaryDirectory(prefix="knnlm-") as folder:
        path = Path(folder) / "tokens.npy"
        file.filesystem.get_file(file.path, str(path))
        yield path
