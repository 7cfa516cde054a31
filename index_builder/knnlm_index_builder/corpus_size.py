"""How large a corpus will be as a token stream: counted where it is small, else told from a sample spread over its files."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from knnlm.corpus import Corpus, Document
from knnlm.datastore.documents import ROWS_AT_ONCE, DocumentWriter
from knnlm.tokenization import TextTokenizer
from knnlm.tokenized import TokenizedDocument, tokenize
from knnlm_index_builder.ingest import DOCUMENTS, TOKENS, record_of, require_entries

READ_WHOLE, READ_AT_MOST = 64_000_000, 16_000_000
"""Bytes of a corpus that is read from beginning to end, and about how many are read of a larger one."""
TOKENIZED_AT_MOST = 8_000_000
SAMPLED_AT_MOST = 65_536
ROW_BYTES, BATCH_BYTES = 52, 1_500


@dataclass(frozen=True)
class CorpusSize:
    """What the first stage would find. ``exact``: everything was read and tokenised, else ``sampled_documents`` were.

    ``empty``: documents without a token; ``table_bytes``: of the document table; ``read_seconds``: to read and tokenise all.
    """

    documents: int
    tokens: int
    empty: int
    table_bytes: int
    sampled_documents: int
    exact: bool
    read_seconds: float

    @property
    def entries(self) -> int:
        """Each token but the first of a document is a value once."""
        return self.tokens - self.documents


@dataclass
class _Tally:
    """Sums over documents. ``length``: characters, or tokens of arrays; ``measured_``: over those that were tokenised."""

    documents: float = 0
    empty: float = 0
    length: float = 0
    table_bytes: float = 0
    measured_length: float = 0
    measured_tokens: float = 0

    def add(self, other: _Tally, scale: float) -> None:
        """Count ``other`` as ``scale`` times as much."""
        for name in (field.name for field in fields(self)):
            setattr(self, name, getattr(self, name) + scale * getattr(other, name))


def measure_corpus(
    corpus: Corpus, tokenizer: TextTokenizer, vocabulary_size: int, folder: Path, progress: Callable[[str, int, int | None], None]
) -> CorpusSize:
    """The size of ``corpus``; token ids and document table of what was tokenised go into ``folder``, to be encoded from there.

    Raises :class:`CorpusError` as building does, for as much as is read.
    """
    total = corpus.bytes_total
    whole = total is None or total <= READ_WHOLE
    read = total or 0 if whole else READ_AT_MOST
    # Token arrays cost nothing to tokenise.
    every = 1 if corpus.pretokenized else max(1, -(-read // TOKENIZED_AT_MOST))
    started = time.perf_counter()
    tally = _Tally()
    with _Sample(folder, every, tokenizer, vocabulary_size) as sample:
        if whole or total is None:
            tally.add(sample.take(_told(corpus, corpus, read, progress)), 1)
        else:
            for portion in corpus.portions(READ_AT_MOST):
                found = sample.take(_told(portion, corpus, read, progress))
                tally.add(found, portion.share * total / max(portion.bytes, 1))
    seconds = time.perf_counter() - started
    tokens = tally.length * tally.measured_tokens / max(tally.measured_length, 1)
    documents, empty = round(tally.documents), round(tally.empty)
    require_entries(documents, round(tokens), empty)
    # Of the time, all but the reading itself, which is next to nothing, went into what was tokenised.
    read_seconds = seconds * tally.length / max(sample.length, 1)
    table_bytes = tally.table_bytes + BATCH_BYTES * (1 + documents // ROWS_AT_ONCE)
    return CorpusSize(documents, round(tokens), empty, round(table_bytes), sample.documents, whole and every == 1, read_seconds)


def _told(
    documents: Iterable[Document], corpus: Corpus, total: int, progress: Callable[[str, int, int | None], None]
) -> Iterator[Document]:
    for document in documents:
        progress("reading bytes", min(corpus.bytes_read, total) if total else corpus.bytes_read, total or None)
        yield document


class _Sample:
    """Tokenises every so-manieth document and keeps its first tokens. ``documents`` and ``length`` of what it tokenised."""

    def __init__(self, folder: Path, every: int, tokenizer: TextTokenizer, vocabulary_size: int) -> None:
        self._every, self._tokenizer, self._vocabulary_size = every, tokenizer, vocabulary_size
        self._file, self._table = (folder / TOKENS).open("wb"), DocumentWriter(folder / DOCUMENTS)
        self._seen = self._kept = 0
        self.documents = self.length = 0

    def take(self, documents: Iterable[Document]) -> _Tally:
        """Count ``documents``, all of one portion."""
        tally, kept, before = _Tally(), 0, self.documents
        for tokenized in tokenize(self._chosen(documents, tally), self._tokenizer, self._vocabulary_size):
            tally.measured_tokens += len(tokenized.ids)
            self._keep(tokenized)
            kept += 1
        # A text may come to no token at all.
        without_tokens = self._every * (self.documents - before - kept)
        tally.documents, tally.empty = tally.documents - without_tokens, tally.empty + without_tokens
        return tally

    def _chosen(self, documents: Iterable[Document], tally: _Tally) -> Iterator[Document]:
        for document in documents:
            if document.is_empty:
                tally.empty += 1
                continue
            length = _length(document)
            tally.documents, tally.length = tally.documents + 1, tally.length + length
            tally.table_bytes += _row_bytes(document)
            if self._seen % self._every == 0:
                tally.measured_length += length
                self.documents, self.length = self.documents + 1, self.length + length
                yield document
            self._seen += 1

    def _keep(self, tokenized: TokenizedDocument) -> None:
        kept = TokenizedDocument(tokenized.document, tokenized.ids[:SAMPLED_AT_MOST], None)
        self._file.write(kept.ids.tobytes())
        self._table.add(record_of(kept, self._kept, 0))
        self._kept += len(kept.ids)

    def __enter__(self) -> _Sample:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._table.close()


def _length(document: Document) -> int:
    return len(document.text) if document.text is not None else len(document.tokens if document.tokens is not None else ())


def _row_bytes(document: Document) -> int:
    """Of a document in the table: numbers and offsets, names, metadata, and where its lines start."""
    text = document.text or ""
    lines = text.count("\n") + (bool(text) and not text.endswith("\n"))
    metadata = json.dumps(document.metadata, ensure_ascii=False, sort_keys=True)
    return ROW_BYTES + len(document.id.encode()) + len(document.source.encode()) + len(metadata.encode()) + 4 * lines
