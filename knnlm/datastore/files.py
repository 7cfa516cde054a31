"""Files of a datastore: written whole or not at all, with checksums. Knows nothing of what is in them."""

from __future__ import annotations

import json
import os
import shutil
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from knnlm.errors import StoreDamaged


@dataclass(frozen=True)
class FileFacts:
    """Size in bytes and xxh3 (128 bits, hexadecimal) of one file."""

    bytes: int
    xxh3: str


def write_json_with_checksum(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` and a ``checksum`` over it, atomically: a reader sees the old file or the whole new one."""
    write_atomically(path, _with_checksum(content))


def _with_checksum(content: Mapping[str, Any]) -> bytes:
    # No line end: every byte counts, so that a file that was cut anywhere is no JSON.
    return json.dumps({**content, "checksum": checksum(content)}, indent=1, ensure_ascii=False).encode()


def write_atomically(path: Path, content: bytes) -> None:
    """Write aside, flush to disk, rename."""
    with written_aside(path) as file:
        file.write(content)


@contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes its place at ``path`` when the block ends, whole and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    with new_file(aside) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync_folder(path.parent)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, in a folder that is made aside; an OSError names it."""
    with named(path), path.open("wb") as file:
        yield file


@contextmanager
def made_aside(folder: Path) -> Iterator[Path]:
    """A new folder to write files into, which takes its place at ``folder`` when the block ends; nothing may be there."""
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with named(aside):
        yield aside
    for path in aside.iterdir():
        sync_file(path)
    aside.rename(folder)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make renames within a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json_with_checksum(path: Path) -> dict[str, Any]:
    """Read what :func:`write_json_with_checksum` wrote; raise :class:`StoreDamaged` if it was changed since."""
    try:
        written = path.read_bytes()
        content = json.loads(written)
        found = content.pop("checksum")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreDamaged(f"{path} is damaged: it can't be read as JSON with a checksum ({error}).") from error
    if found != (expected := checksum(content)):
        raise StoreDamaged(f"{path} is damaged: its checksum is {found}, but its content gives {expected}.")
    # Version 1 ended with a line end. A flipped bit may leave the meaning as it was (1e-5, 1E-5).
    if written.removesuffix(b"\n") != _with_checksum(content):
        raise StoreDamaged(f"{path} is damaged: it is not written as knnlm writes it.")
    return typing.cast("dict[str, Any]", content)


def checksum(content: Mapping[str, Any]) -> str:
    """xxh3 (128 bits, hexadecimal) of ``content`` as JSON with sorted keys."""
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def file_facts(path: Path, most: int | None = None) -> FileFacts:
    """Size and checksum of a file, or of its first ``most`` bytes, read in pieces."""
    digest = xxhash.xxh3_128()
    size = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22 if most is None else min(1 << 22, most - size)):
            digest.update(piece)
            size += len(piece)
    return FileFacts(size, digest.hexdigest())


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Give an OSError that says of no file (a write to a full disk) the name of this one, and the system's words."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def sync_file(path: Path) -> None:
    """Make a file's content durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
