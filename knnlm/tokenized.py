"""Documents as token ids, with the character span of each token: what building stores and evaluation scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from knnlm.corpus import Document
from knnlm.errors import CorpusError
from knnlm.tokenization import TextTokenizer

DOCUMENTS_AT_ONCE = 64
CHARACTERS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class TokenizedDocument:
    """A document's token ids [n] int32 and, for text, the character span of each [n, 2] uint32 (0, 0 for special tokens)."""

    document: Document
    ids: np.ndarray[Any, np.dtype[np.int32]]
    spans: np.ndarray[Any, np.dtype[np.uint32]] | None

    def scored_bytes(self) -> int | None:
        """UTF-8 bytes of the text that tokens 1..n-1 stand for; None for token input."""
        if self.spans is None or self.document.text is None:
            return None
        return len(self.document.text[int(self.spans[0, 1]) :].encode())


def tokenize(documents: Iterable[Document], tokenizer: TextTokenizer, vocabulary_size: int) -> Iterator[TokenizedDocument]:
    """Token ids of each document that has any; one without text of its own (empty) is left out.

    Raises :class:`CorpusError` for a token id that the model does not have.
    """
    for group in _groups(documents):
        texts = [document for document in group if document.tokens is None]
        encodings = iter(tokenizer.encode_documents([document.text or "" for document in texts]))
        for document in group:
            if document.tokens is not None:
                ids, spans = np.asarray(document.tokens), None
                _check_ids(document, ids, vocabulary_size)
            else:
                encoding = next(encodings)
                ids, spans = np.asarray(encoding.ids), np.asarray(encoding.spans, dtype=np.uint32).reshape(-1, 2)
            if len(ids) and (document.tokens is not None or document.text):
                yield TokenizedDocument(document, ids.astype(np.int32), spans)


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups that the tokenizer reads at once: not many, and no more than one that brings much text."""
    group: list[Document] = []
    characters = 0
    for document in documents:
        group.append(document)
        characters += len(document.text or "")
        if len(group) == DOCUMENTS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _check_ids(document: Document, ids: np.ndarray[Any, Any], vocabulary_size: int) -> None:
    if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < vocabulary_size):
        raise CorpusError(
            f"{document.id}: token ids run from {ids.min()} to {ids.max()}, but the model's vocabulary is 0 to {vocabulary_size - 1}."
        )
