"""A file of a corpus, wherever it lies: its format by suffix, its bytes as a stream, how far reading has come."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa

from knnlm.errors import KNNLMError, MissingDependency

Format = Literal["text", "html", "jsonl", "parquet", "dataset", "tokens"]

SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".npy": "tokens",
}
"""Formats by suffix, in any case; a saved dataset is a folder, and every other file is UTF-8 text."""

COMPRESSED = (".gz", ".zst")
STREAMED = ("text", "html", "jsonl")
PACKAGES = {"html": ("resiliparse", "html"), "dataset": ("datasets", "datasets")}
CHUNK = 1 << 20
BEGINNING = BLOCK = 8192
UNREADABLE = (OSError, EOFError, zlib.error, pa.ArrowInvalid, pa.ArrowNotImplementedError)
"""What a local file that is missing, cut short or damaged raises while it is read."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file, or a folder that is read as one (a saved dataset).

    ``name``: its path within the corpus; ``place``: path or URL as the user would write it; ``path``: the same for
    ``filesystem`` (of fsspec); ``size`` in bytes, None if the filesystem does not say.
    """

    name: str
    place: str
    filesystem: Any
    path: str
    size: int | None
    format: Format
    remote: bool

    @property
    def source(self) -> str:
        """What its documents name as their source."""
        return self.place if self.remote else self.name


class Meter:
    """Bytes read of a corpus, as they lie in its files: compressed ones count compressed, a finished file counts whole."""

    def __init__(self) -> None:
        self._before = self._here = 0
        self._size: int | None = None

    @property
    def total(self) -> int:
        """Bytes read so far."""
        return self._before + (self._here if self._size is None else min(self._here, self._size))

    def begin(self, size: int | None) -> None:
        """Another file of that size (None: unknown) is read from now on."""
        self.end()
        self._size = size

    def end(self) -> None:
        """The file is finished, whether all of it was read or not."""
        self._before += self._here if self._size is None else self._size
        self._here, self._size = 0, None

    def leave(self) -> None:
        """The rest of the file will not be read."""
        self._before, self._here, self._size = self.total, 0, None

    def count(self, read: int) -> None:
        """That many more bytes of the file were read."""
        self._here += read

    def count_rows(self, done: int, rows: int) -> None:
        """So many rows of a table are done; where columns lie in a file says nothing about bytes."""
        self._here = (self._size or 0) * done // max(rows, 1)


@contextmanager
def opened(file: InputFile, meter: Meter) -> Iterator[io.BufferedReader]:
    """The file's bytes as a stream, decompressed where its suffix says so. Raises what :func:`is_unreadable` knows."""
    with file.filesystem.open(file.path, "rb") as raw:
        yield _decompressed(io.BufferedReader(_Counted(raw, meter), CHUNK), file.name)


def format_of(name: str) -> Format:
    """The format of a file by its suffix, looked for under the suffix of a compression."""
    path = PurePosixPath(name.lower())
    compressed = path.suffix in COMPRESSED
    found = SUFFIXES.get(PurePosixPath(path.stem).suffix if compressed else path.suffix, "text")
    return "text" if compressed and found not in STREAMED else found


def is_unreadable(file: InputFile, error: Exception) -> bool:
    """Whether an error says that a file is missing, damaged or out of reach; below a URL, network libraries have their own."""
    return isinstance(error, UNREADABLE) or (file.remote and not isinstance(error, KNNLMError))


def is_binary(file: InputFile) -> bool:
    """Whether a zero byte is in the beginning of a file; False for one that can't be read, which its reader will tell."""
    try:
        beginning = file.filesystem.cat_file(file.path, start=0, end=BEGINNING)
        return b"\0" in _decompressed(io.BufferedReader(_Counted(io.BytesIO(beginning), Meter())), file.name).read1(BEGINNING)
    except Exception:  # of the network library below a filesystem
        return False


def require_package(file: InputFile) -> None:
    """Raise :class:`MissingDependency` if the package that reads files of this format is not installed."""
    package, extra = PACKAGES.get(file.format, ("", ""))
    if package and find_spec(package) is None:
        raise MissingDependency(f"Reading {file.place} needs {package}, which is not installed; pip install 'knnlm[{extra}]'.")


def _decompressed(stream: io.BufferedReader, name: str) -> io.BufferedReader:
    suffix = PurePosixPath(name.lower()).suffix
    if suffix == ".gz":
        return io.BufferedReader(_Decompressed(gzip.GzipFile(fileobj=stream)), CHUNK)
    if suffix == ".zst":
        return io.BufferedReader(_Decompressed(pa.CompressedInputStream(pa.PythonFile(stream, "r"), "zstd")), CHUNK)
    return stream


class _Decompressed(io.RawIOBase):
    """What a compressed stream holds; all that stands before a damage is given out before the error that tells of it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._damage: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._damage is not None:
            raise self._damage
        filled = 0
        try:
            while filled < len(buffer) and (block := self._stream.read1(min(BLOCK, len(buffer) - filled))):
                buffer[filled : filled + len(block)] = block
                filled += len(block)
        except UNREADABLE as error:
            if not filled:
                raise
            self._damage = error
        return filled


class _Counted(io.RawIOBase):
    """A stream that tells a meter what was read."""

    def __init__(self, stream: Any, meter: Meter) -> None:
        self._stream, self._meter = stream, meter

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        read = self._stream.read(len(buffer))
        self._meter.count(len(read))
        buffer[: len(read)] = read
        return len(read)
