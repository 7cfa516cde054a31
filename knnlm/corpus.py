"""The corpus: files, folders, globs and URLs become documents. The same for building and comparing.

A reader is a function from one file to documents, chosen by format in :data:`READERS`; what the formats are called by
suffix is :data:`knnlm.inputs.files.SUFFIXES`. Nothing of a file stays in memory but a few bytes for each document.
Knows no tokenizer and no datastore.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash

from knnlm.errors import CorpusError
from knnlm.inputs.document import Document, IntArray
from knnlm.inputs.files import CHUNK, COMPRESSED, Format, InputFile, Meter, is_unreadable, require_package
from knnlm.inputs.finding import BINARY, IGNORED, Found, find_files
from knnlm.inputs.html import read_html
from knnlm.inputs.ids import SeenIds
from knnlm.inputs.options import DEFAULT_ID_FIELD, DEFAULT_TEXT_FIELD, OnError
from knnlm.inputs.portions import Portion, choose_portions
from knnlm.inputs.problems import Problems
from knnlm.inputs.reading import Reader, Reading
from knnlm.inputs.records import is_unicode, read_jsonl
from knnlm.inputs.splitting import compile_cut
from knnlm.inputs.tables import read_dataset, read_parquet
from knnlm.inputs.text import read_text
from knnlm.inputs.tokens import read_tokens

__all__ = ["READERS", "Corpus", "Document"]

READERS: dict[Format, Reader] = {
    "text": read_text,
    "html": read_html,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "dataset": read_dataset,
    "tokens": read_tokens,
}

EMPTY = "files without text"


class Corpus:
    """The documents of files, folders, globs and URLs, in sorted order; docs/inputs.md says what each format gives.

    ``split_documents``: a regular expression (multi-line); in text files and web pages a new document begins at each
    match. ``on_error``: what can't be read is fatal (``stop``) or left out, counted and named (``skip``).
    ``text_field`` and ``id_field`` of JSON lines and tables. ``gitignore``: in folders, what .gitignore files there name
    is left out.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        split_documents: str | None = None,
        *,
        on_error: OnError = "stop",
        text_field: str = DEFAULT_TEXT_FIELD,
        id_field: str = DEFAULT_ID_FIELD,
        gitignore: bool = True,
    ) -> None:
        self._cut = compile_cut(split_documents) if split_documents is not None else None
        self._text_field, self._id_field = text_field, id_field
        self._paths = ", ".join(map(str, paths))
        self._unfound = Problems(on_error)
        self._found = find_files(paths, self._unfound, gitignore=gitignore)
        self._latest = _Progress(self._found, self._unfound)
        self._digest: str | None = None
        self._bytes_total = _total([file.size for file in self._found.files])
        self.pretokenized = self._check_files()

    def __iter__(self) -> Iterator[Document]:
        """All documents. Raises :class:`CorpusError` naming file and place for what can't be read, or an id used twice."""
        self._latest = progress = _Progress(self._found, self._unfound)
        seen, total, count = SeenIds(), xxhash.xxh3_128(), 0
        for file, document in self._read(progress):
            if seen.add(document.id):
                self._require_new(document.id, file, count)
            _digest_of(document, total)
            count += 1
            yield document
        if not count:
            raise CorpusError(f"No text found in {self._paths}: {self._nothing()}.")
        self._digest = total.hexdigest()

    def portions(self, budget: int) -> Iterator[CorpusPortion]:
        """About ``budget`` bytes of the corpus, spread over its files; each portion is to be iterated before the next.

        For a corpus whose size is known (:attr:`bytes_total`); ids are not compared, and no digest is made.
        """
        files = self._found.files
        self._latest = progress = _Progress(self._found, self._unfound)
        whole = [file.format == "html" or (file.format == "text" and self._cut is None) for file in files]
        for portion in choose_portions([file.size or 0 for file in files], whole, budget):
            yield CorpusPortion(portion, files[portion.file], self._read_file(files[portion.file], progress), progress.meter)

    @property
    def problems(self) -> Problems:
        """What could not be read in the latest iteration, by kind and in words."""
        return self._latest.problems

    @property
    def left_out(self) -> dict[str, list[str]]:
        """Names of what is left out without being a problem, by reason, as the latest iteration found it."""
        return self._latest.left_out.names

    @property
    def skipped(self) -> list[str]:
        """Binary files of folders, left out."""
        return self.left_out.get(BINARY, [])

    @property
    def ignored(self) -> list[str]:
        """Files and folders (with a slash) that a .gitignore file leaves out; a folder stands for all that it holds."""
        return self.left_out.get(IGNORED, [])

    @property
    def bytes_total(self) -> int | None:
        """Bytes of all files as they lie there; None if a filesystem does not say."""
        return self._bytes_total

    @property
    def bytes_read(self) -> int:
        """How many of them the latest iteration has read so far."""
        return self._latest.meter.total

    @property
    def digest(self) -> str | None:
        """xxh3 of all documents by content (ids, text or tokens, metadata; not where files lie) of the latest whole iteration."""
        return self._digest

    def read_digest(self) -> str:
        """The digest, reading everything once if no iteration came to its end yet."""
        if self._digest is None:
            for _ in self:
                pass
        assert self._digest is not None
        return self._digest

    def _read(self, progress: _Progress) -> Iterator[tuple[InputFile, Document]]:
        """Each document with its file."""
        for file in self._found.files:
            progress.meter.begin(file.size)
            for document in self._read_file(file, progress):
                yield file, document
            progress.meter.end()

    def _read_file(self, file: InputFile, progress: _Progress) -> Iterator[Document]:
        problems = progress.problems
        reading = Reading(self._cut, self._text_field, self._id_field, problems, progress.meter, progress.left_out)
        documents, has_text, before = 0, False, problems.total
        try:
            for document in READERS[file.format](file, reading):
                documents, has_text = documents + 1, has_text or not document.is_empty
                yield document
        except Exception as error:
            if not is_unreadable(file, error):
                raise
            read = f" to its end; {documents} documents of it were read" if documents else ""
            problems.found("unreadable files", f"{file.place} can't be read{read}: {_reason(error)}")
        if not has_text and problems.total == before:
            progress.left_out.add(EMPTY, file.name)

    def _require_new(self, identity: str, file: InputFile, count: int) -> None:
        """Raise :class:`CorpusError` if one of the first ``count`` documents has this very id, not only its hash."""
        again = self._read(_Progress(self._found, self._unfound))
        for _, (earlier, document) in zip(range(count), again, strict=False):
            if document.id == identity:
                raise CorpusError(f"Two documents have the id {identity!r}: in {earlier.place} and {file.place}.")

    def _check_files(self) -> bool:
        """Whether all of them are token arrays. Raises :class:`CorpusError`, :class:`MissingDependency`."""
        files = self._found.files
        if not files:
            raise CorpusError(f"No text found in {self._paths}: {self._nothing()}.")
        if odd := next((file for file in files if not is_unicode(file.place)), None):
            raise CorpusError(f"The file name {odd.place!r} is not UTF-8; rename the file.")
        arrays = [file for file in files if file.format == "tokens"]
        if arrays and len(arrays) != len(files):
            raise CorpusError(f"Token arrays ({arrays[0].name}, …) and text can't be mixed in one corpus; build two datastores.")
        for file in {file.format: file for file in files}.values():
            require_package(file)
        return bool(arrays)

    def _nothing(self) -> str:
        said = [f"{self.problems}, the first: {self.problems.first[0].removesuffix('.')}"] if self.problems.total else []
        said += [f"{self._latest.left_out} were left out"] if self.left_out else []
        return "; ".join(said) or "there are no files"


class CorpusPortion:
    """Documents from the beginning of one file, to be iterated once; then :attr:`bytes` says how many bytes they stand for.

    ``share`` of the whole corpus (0 to 1) that the portion stands for.
    """

    def __init__(self, portion: Portion, file: InputFile, documents: Iterator[Document], meter: Meter) -> None:
        self.share, self.bytes = portion.share, 0
        self._limit, self._file, self._documents, self._meter = portion.limit, file, documents, meter

    def __iter__(self) -> Iterator[Document]:
        """Documents up to the portion's limit; at least one, if the file has any."""
        self._meter.begin(self._file.size)
        before = self._meter.total
        given = last = 0
        for document in self._documents:
            read = self._meter.total - before
            if (covered := self._covered(given, last, read)) >= self._limit and covered:
                self.bytes = covered
                break
            # A text that is cut is read ahead by more than a chunk, but its pieces together are its bytes.
            given += len((document.text or "").encode())
            last = read
            yield document
        else:
            self.bytes = self._file.size or 0
        self._meter.leave()

    def _covered(self, given: int, last: int, read: int) -> int:
        """Bytes that the documents so far stand for, ``given`` as text; 0 where that is not known.

        ``last`` were read when the last of them came, and ``read`` are now: streams are read ahead by a chunk, of which a
        document that brings another one is the end, and rows of tables are counted after they came.
        """
        compressed = self._file.name.lower().endswith(COMPRESSED)
        if self._file.format == "text" and not compressed:
            return given
        if read == last:
            return 0
        if self._file.format in ("parquet", "dataset"):
            return read
        # What is decompressed is read ahead once more: half a chunk of it, on average.
        return round(last * given / (given + CHUNK / 2)) if compressed else last


class _Progress:
    """How far one iteration has come, and what it found on the way."""

    def __init__(self, found: Found, problems: Problems) -> None:
        self.left_out, self.problems, self.meter = found.left_out.copy(), problems.copy(), Meter()


def _total(sizes: list[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _digest_of(document: Document, total: xxhash.xxh3_128) -> None:
    """Add a document's content to a digest of many."""
    content = document.text.encode() if document.text is not None else _tokens(document).tobytes()
    head = json.dumps([document.id, document.metadata, len(content)], sort_keys=True)
    total.update(head.encode() + content)


def _tokens(document: Document) -> IntArray:
    assert document.tokens is not None
    return document.tokens.astype(np.int64)


def _reason(error: Exception) -> str:
    """Why a file can't be read, without its path, which stands before it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
