"""Reading text: files, folders, JSON lines and token arrays become documents. The same for building and comparing.

A reader is a function from one file to documents, chosen by suffix in :data:`READERS`; a new format is a new entry
there. Text is read one file at a time. Knows no tokenizer and no datastore.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from knnlm.arrays import map_array
from knnlm.errors import CorpusError, InvalidInput

IntArray = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Document:
    """One document: either ``text`` or ``tokens`` (1-D integers) is set.

    ``id`` names it within the corpus, ``source`` is the file it came from, ``metadata`` what else the input said.
    """

    id: str
    source: str
    text: str | None = None
    tokens: IntArray | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


class Corpus:
    """The documents of files and folders, in sorted order.

    A folder is searched to any depth; hidden files and folders are left out, and so are binary files, which
    :attr:`skipped` names. ``split_documents``: a regular expression (multi-line); a new document begins at each match.
    """

    def __init__(self, paths: Sequence[str | Path], split_documents: str | None = None) -> None:
        self._cut = _compile(split_documents)
        self.skipped: list[str] = []
        self._files: list[tuple[str, Path]] = []
        for path in map(Path, paths):
            self._files.extend(self._find(path, several=len(paths) > 1))
        if not self._files:
            raise CorpusError(f"No text found in {', '.join(map(str, paths))}: {self._nothing()}.")
        if odd := next((path for name, path in self._files if not _is_unicode(name)), None):
            raise CorpusError(f"The file name {str(odd)!r} is not UTF-8; rename the file.")
        arrays = [name for name, path in self._files if path.suffix == ".npy"]
        if arrays and len(arrays) != len(self._files):
            raise CorpusError(f"Token arrays ({arrays[0]}, …) and text can't be mixed in one corpus; build two datastores.")
        self.pretokenized = bool(arrays)

    def __iter__(self) -> Iterator[Document]:
        """All documents. Raises :class:`CorpusError` naming file and place for what can't be read, or an id used twice."""
        seen: dict[str, Path] = {}
        for name, path in self._files:
            for document in READERS.get(path.suffix, _read_text)(name, path, self._cut):
                if document.id in seen:
                    raise CorpusError(f"Two documents have the id {document.id!r}: in {seen[document.id]} and {path}.")
                seen[document.id] = path
                yield document

    def digest(self) -> str:
        """xxh3 of all documents by content: ids, text or tokens, metadata; not of where the files lie."""
        total = xxhash.xxh3_128()
        for document in self:
            content = document.text.encode() if document.text is not None else _tokens(document).tobytes()
            head = json.dumps([document.id, document.metadata, len(content)], sort_keys=True)
            total.update(head.encode() + content)
        return total.hexdigest()

    def _find(self, path: Path, *, several: bool) -> Iterator[tuple[str, Path]]:
        if path.is_file():
            yield path.name, path
            return
        if not path.is_dir():
            raise CorpusError(f"There is no file or folder {path}.")
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            relative = file.relative_to(path)
            if any(part.startswith(".") for part in relative.parts):
                continue
            if file.suffix not in READERS and _is_binary(file):
                self.skipped.append(str(relative))
                continue
            yield (f"{path.name}/{relative.as_posix()}" if several else relative.as_posix()), file

    def _nothing(self) -> str:
        return f"{len(self.skipped)} binary files were left out" if self.skipped else "there are no files"


def _compile(pattern: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern, re.MULTILINE) if pattern is not None else None
    except re.error as error:
        raise InvalidInput("split_documents", f"{pattern!r} is no regular expression: {error}.") from None


def _is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(8192)


def _read_text(name: str, path: Path, cut: re.Pattern[str] | None) -> Iterator[Document]:
    text = _decode(path.read_bytes(), path)
    if cut is None:
        yield Document(name, name, text)
        return
    starts = sorted({0, *(match.start() for match in cut.finditer(text))})
    line = 1
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(text)], strict=True)):
        piece = text[start:end]
        yield Document(f"{name}#{number}", name, piece, metadata={"first_character": start, "first_line": line})
        line += piece.count("\n")


def _decode(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} is not UTF-8: byte {error.start} is 0x{content[error.start]:02x}. Convert it, or leave it out."
        ) from None


def _read_jsonl(name: str, path: Path, cut: re.Pattern[str] | None) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CorpusError(f"{where} is no JSON: {error}.") from None
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise CorpusError(f'{where} has no field "text" with a string.')
            if b"\\u" in line and not _is_unicode(json.dumps(record, ensure_ascii=False)):
                raise CorpusError(f"{where} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character.")
            identity = record.get("id")
            rest = {key: value for key, value in record.items() if key != "text"}
            yield Document(str(identity) if isinstance(identity, str | int) else f"{name}:{number}", name, record["text"], metadata=rest)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_array(name: str, path: Path, cut: re.Pattern[str] | None) -> Iterator[Document]:
    try:
        array = map_array(path, "r")
    except ValueError as error:
        raise CorpusError(f"{path} is no NumPy array: {error}.") from None
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise CorpusError(f"{path} must be a 1-D or 2-D array of integer token ids, but is {array.dtype}{list(array.shape)}.")
    if array.ndim == 1:
        yield Document(name, name, tokens=array)
    else:
        for row, tokens in enumerate(array):
            yield Document(f"{name}:{row}", name, tokens=tokens)


def _tokens(document: Document) -> IntArray:
    assert document.tokens is not None
    return document.tokens.astype(np.int64)


READERS: dict[str, Callable[[str, Path, re.Pattern[str] | None], Iterator[Document]]] = {".jsonl": _read_jsonl, ".npy": _read_array}
"""Formats by suffix; every other file is UTF-8 text."""
