"""First stage: the corpus becomes one token stream and a document table, beside the store until it is complete."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from knnlm.corpus import Corpus
from knnlm.datastore.documents import DocumentRecord, DocumentWriter
from knnlm.datastore.files import write_atomically
from knnlm.errors import CorpusError
from knnlm.tokenization import TextTokenizer
from knnlm.tokenized import TokenizedDocument, tokenize

TOKENS, SPANS, DOCUMENTS, RECEIPT = "tokens.bin", "spans.bin", "documents.arrow", "corpus.json"


@dataclass(frozen=True)
class CorpusReceipt:
    """What the first stage found. ``empty``: documents without any token, which are left out and counted."""

    documents: int
    tokens: int
    empty: int

    @property
    def entries(self) -> int:
        """Each token but the first of a document is a value once."""
        return self.tokens - self.documents


def ingest(corpus: Corpus, tokenizer: TextTokenizer, vocabulary_size: int, folder: Path, progress: Callable[[int], None]) -> CorpusReceipt:
    """Write tokens, spans and the document table into ``folder``, and the receipt last; return it.

    A receipt that is there already is taken as it is. ``progress`` is called with the number of tokens so far. Raises
    :class:`CorpusError` for input that can't be read or yields no entry.
    """
    receipt_path = folder / RECEIPT
    if receipt_path.exists():
        return CorpusReceipt(**json.loads(receipt_path.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    documents = tokens = 0
    table = DocumentWriter(folder / DOCUMENTS)
    counting = _Counting(corpus)
    with (folder / TOKENS).open("wb") as token_file, (folder / SPANS).open("wb") as span_file:
        for document in tokenize(counting, tokenizer, vocabulary_size):
            token_file.write(document.ids.tobytes())
            if document.spans is not None:
                span_file.write(document.spans.tobytes())
            table.add(_record(document, tokens, documents))
            documents, tokens = documents + 1, tokens + len(document.ids)
            progress(tokens)
    table.close()
    receipt = CorpusReceipt(documents, tokens, counting.count - documents)
    if receipt.entries < 1:
        raise CorpusError(
            f"The corpus yields no entry: {documents} documents with {tokens} tokens, {receipt.empty} empty ones; "
            "each document needs at least two tokens."
        )
    write_atomically(receipt_path, json.dumps(asdict(receipt)).encode())
    return receipt


class _Counting:
    """Counts documents as they are read, the empty ones too."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus, self.count = corpus, 0

    def __iter__(self) -> Any:
        for document in self._corpus:
            self.count += 1
            yield document


def _record(tokenized: TokenizedDocument, token_start: int, serial: int) -> DocumentRecord:
    document = tokenized.document
    text = document.text or ""
    return DocumentRecord(
        id=document.id,
        source=document.source,
        token_start=token_start,
        tokens=len(tokenized.ids),
        characters=len(text),
        line_starts=_line_starts(text),
        metadata=document.metadata,
        serial=serial,
    )


def _line_starts(text: str) -> list[int]:
    starts, at = [0] if text else [], text.find("\n")
    while at != -1:
        if at + 1 < len(text):
            starts.append(at + 1)
        at = text.find("\n", at + 1)
    return starts


@dataclass(frozen=True)
class IngestedCorpus:
    """The first stage's files, memory-mapped: ``tokens`` [tokens] int32, ``spans`` [tokens, 2] uint32 or None."""

    tokens: np.ndarray[Any, np.dtype[np.int32]]
    spans: np.ndarray[Any, np.dtype[np.uint32]] | None

    @classmethod
    def open(cls, folder: Path, *, pretokenized: bool) -> IngestedCorpus:
        """Map what :func:`ingest` wrote."""
        tokens = np.memmap(folder / TOKENS, dtype=np.int32, mode="r")
        return cls(tokens, None if pretokenized else np.memmap(folder / SPANS, dtype=np.uint32, mode="r").reshape(-1, 2))
