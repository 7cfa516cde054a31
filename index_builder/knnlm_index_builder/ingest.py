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
from knnlm.datastore.files import named, new_file, sync_file, write_atomically
from knnlm.errors import CorpusError, StoreDamaged
from knnlm.tokenization import TextTokenizer
from knnlm.tokenized import TokenizedDocument, tokenize
from knnlm_index_builder.plan import require_same

TOKENS, SPANS, DOCUMENTS, RECEIPT = "tokens.bin", "spans.bin", "documents.arrow", "corpus.json"


@dataclass(frozen=True)
class CorpusReceipt:
    """What the first stage found. ``empty``: documents without any token, which are left out and counted; ``digest``: of
    the corpus by content."""

    documents: int
    tokens: int
    empty: int
    digest: str

    @property
    def entries(self) -> int:
        """Each token but the first of a document is a value once."""
        return self.tokens - self.documents


def ingest(
    corpus: Corpus, tokenizer: TextTokenizer, vocabulary_size: int, folder: Path, progress: Callable[[str, int, int | None], None],
    *, first_token: int = 0, first_serial: int = 0,
) -> CorpusReceipt:  # fmt: skip
    """Write tokens, spans and the document table into ``folder``, and the receipt last; return it.

    The corpus continues a store of ``first_token`` tokens, its documents' serials begin with ``first_serial``. A receipt
    that is there already is taken, if it is of the same corpus. Raises :class:`CorpusError` for input that can't be read
    or yields no entry, :class:`StoreMismatch` if the receipt is of another corpus.
    """
    receipt_path = folder / RECEIPT
    if receipt_path.exists():
        return _same_corpus(CorpusReceipt(**json.loads(receipt_path.read_bytes())), corpus, folder.parent)
    folder.mkdir(parents=True, exist_ok=True)
    receipt = _write(corpus, tokenizer, vocabulary_size, folder, progress, first_token, first_serial)
    if receipt.entries < 1:
        raise CorpusError(
            f"The corpus yields no entry: {receipt.documents} documents with {receipt.tokens} tokens, {receipt.empty} empty ones; "
            "each document needs at least two tokens."
        )
    for name in (TOKENS, SPANS, DOCUMENTS):
        sync_file(folder / name)
    write_atomically(receipt_path, json.dumps(asdict(receipt)).encode())
    return receipt


def was_ingested(folder: Path) -> bool:
    """Whether an earlier call came to its end in ``folder``."""
    return (folder / RECEIPT).exists()


def _same_corpus(receipt: CorpusReceipt, corpus: Corpus, store: Path) -> CorpusReceipt:
    require_same({"corpus": receipt.digest}, {"corpus": corpus.read_digest()}, f"{store} holds an unfinished build of another text")
    return receipt


def _write(
    corpus: Corpus, tokenizer: TextTokenizer, vocabulary_size: int, folder: Path, progress: Callable[[str, int, int | None], None],
    first_token: int, first_serial: int,
) -> CorpusReceipt:  # fmt: skip
    documents = tokens = 0
    table = DocumentWriter(folder / DOCUMENTS)
    counting = _Counting(corpus)
    with new_file(folder / TOKENS) as token_file, new_file(folder / SPANS) as span_file:
        for document in tokenize(counting, tokenizer, vocabulary_size):
            with named(folder / TOKENS):
                token_file.write(document.ids.tobytes())
            if document.spans is not None:
                span_file.write(document.spans.tobytes())
            table.add(_record(document, first_token + tokens, first_serial + documents))
            documents, tokens = documents + 1, tokens + len(document.ids)
            progress("reading bytes", corpus.bytes_read, corpus.bytes_total)
    table.close()
    return CorpusReceipt(documents, tokens, counting.count - documents, corpus.read_digest())


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
    """The first stage's files in ``folder``; their first token is token ``first`` of the store's stream."""

    folder: Path
    first: int
    pretokenized: bool

    def tokens(self, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Tokens [start, stop) of the store's stream. Read, not mapped: memory does not grow with the corpus."""
        return _read(self.folder / TOKENS, np.dtype(np.int32), start - self.first, stop - self.first)

    def spans(self, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.uint32]] | None:
        """Character spans [stop - start, 2] of those tokens; None for token arrays."""
        if self.pretokenized:
            return None
        return _read(self.folder / SPANS, np.dtype(np.uint32), 2 * (start - self.first), 2 * (stop - self.first)).reshape(-1, 2)


def _read(path: Path, dtype: np.dtype[Any], start: int, stop: int) -> np.ndarray[Any, Any]:
    found = np.fromfile(path, dtype=dtype, count=stop - start, offset=start * dtype.itemsize)
    if len(found) != stop - start:
        raise StoreDamaged(f"{path} ends too early; remove the folder {path.parent} and build again.")
    return found
