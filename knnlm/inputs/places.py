"""What a user writes to say where input is: a path, a glob or a URL, local and remote in one way."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from knnlm.errors import CorpusError, MissingDependency

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.:_-]*://")
MAGIC = re.compile(r"[*?\[]")
WHOLE_TREE = "**"


@dataclass(frozen=True)
class Place:
    """A file or folder as the user writes it: ``scheme`` and ``chain`` stand around the path of a URL, empty for a local one.

    In a chained URL (``zip://text/*.txt::s3://bucket/a.zip``) the first path is the one that files are looked for in.
    """

    scheme: str
    typed: str
    chain: str

    @classmethod
    def of(cls, given: str) -> Place:
        """The place that a path or URL names."""
        if not URL.match(given):
            return cls("", given, "")
        scheme, separator, rest = given.partition("://")
        path, chain, after = rest.partition("::")
        return cls(scheme + separator, path, chain + after)

    @property
    def remote(self) -> bool:
        """Whether it is a URL."""
        return bool(self.scheme)

    @property
    def name(self) -> str:
        """The last part of its path, which tells several folders apart."""
        if self.remote:
            path = self.typed.partition("?")[0] if self.scheme.startswith("http") else self.typed
            return path.rstrip("/").rpartition("/")[2]
        here = Path(self.typed)
        return here.name if here.name not in ("", "..") else here.resolve().name

    def at(self, parts: tuple[str, ...]) -> str:
        """What is at a path below it, as the user would write it."""
        if not self.remote:
            return str(Path(self.typed, *parts))
        return self.scheme + "/".join([*([self.typed.rstrip("/")] if self.typed else []), *parts]) + self.chain

    def __str__(self) -> str:
        return self.scheme + self.typed + self.chain

    @cached_property
    def _located(self) -> tuple[Any, str]:
        if not self.remote:
            return LocalFileSystem(), str(Path(self.typed).absolute())
        try:
            filesystem, path = url_to_fs(str(self))
        except ImportError as error:
            raise MissingDependency(f"Reading {self} needs a package that is not installed: {error}.") from None
        except ValueError as error:
            raise CorpusError(f"{self} is no URL that can be read: {error}.") from None
        return filesystem, path

    @property
    def filesystem(self) -> Any:
        """The filesystem (of fsspec) that it lies in. Raises :class:`MissingDependency`, :class:`CorpusError`."""
        return self._located[0]

    @property
    def path(self) -> str:
        """Its path for that filesystem."""
        return self._located[1]

    def info(self) -> dict[str, Any] | None:
        """What the filesystem says of it; None if there is nothing. Raises :class:`CorpusError`."""
        try:
            return dict(self.filesystem.info(self.path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (CorpusError, MissingDependency):
            raise
        except Exception as error:  # of the network library below a filesystem
            raise CorpusError(f"{self} can't be read: {error}.") from error


class Pattern:
    """A glob below a folder: ``*`` and ``?`` stay within a name, ``**`` is any number of folders; a folder that matches is taken whole."""

    def __init__(self, pattern: str) -> None:
        self._parts = pattern.strip("/").split("/")
        self._expression = re.compile(glob_translate("/".join(self._parts)))

    def matches(self, parts: tuple[str, ...]) -> bool:
        """Whether a path is meant."""
        return self._expression.match("/".join(parts)) is not None

    def may_match_in(self, parts: tuple[str, ...]) -> bool:
        """Whether something in the folder of that path may be meant, so that it must be looked into."""
        heads = self._parts[: len(parts)]
        if WHOLE_TREE in heads:
            return True
        return len(parts) < len(self._parts) and re.match(glob_translate("/".join(heads)), "/".join(parts)) is not None


def as_glob(place: Place) -> tuple[Place, Pattern] | None:
    """The folder above the first wildcard, and the pattern below it; None for a path without one. Raises :class:`CorpusError`."""
    parts = place.typed.split("/")
    first = next((at for at, part in enumerate(parts) if MAGIC.search(part)), None)
    if first is None:
        return None
    above = "/".join(parts[:first]) or ("/" if first else "")
    try:
        pattern = Pattern("/".join(parts[first:]))
    except (ValueError, re.error) as error:
        raise CorpusError(f"{place} is no pattern of file names: {error}.") from None
    return Place(place.scheme, above if place.remote else above or ".", place.chain), pattern
