"""What the datastores had to do with a completion, gathered token by token. Draws nothing, searches nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from knnlm.datastore.reader import Datastore
from knnlm.distribution import log_weights
from knnlm.neighbors import Neighbors
from knnlm_server.sequence import CompletionEvidence, DocumentWeight, VerbatimRun
from knnlm_server.verbatim_runs import Ints, Run, VerbatimRuns


class NamedStore(Protocol):
    """A datastore, and what it is called on this server."""

    @property
    def name(self) -> str:
        """By which requests choose it."""

    @property
    def store(self) -> Datastore:
        """The datastore itself."""


class EvidenceCollector:
    """Gathers the evidence of one completion.

    ``stores``: its datastores by the number that neighbours have; ``decode`` makes text of tokens; at most
    ``most_documents`` are named, and none that was removed while the completion grew.
    """

    def __init__(self, stores: Mapping[int, NamedStore], decode: Callable[[list[int]], str], most_documents: int) -> None:
        self._stores, self._decode, self._most_documents = stores, decode, most_documents
        self._tokens: list[int] = []
        self._changed = self._searched = 0
        self._runs = {number: VerbatimRuns(named.store) for number, named in sorted(stores.items())}
        self._weights: dict[tuple[int, int], float] = defaultdict(float)  # by number of datastore and document

    def add(self, token: int, alone: int, found: Neighbors | None, temperature: float, share: float) -> None:
        """Take the next token of the completion.

        ``alone``: the one that the base model alone would have drawn. ``found``: the neighbours of its row, as a batch of
        one (None: no search was made), of which ``share`` of the token's probability came; ``temperature`` is theirs.
        """
        self._tokens.append(token)
        self._changed += token != alone
        self._searched += found is not None
        voters = {} if found is None else self._count(token, found, temperature, share)
        for number, runs in self._runs.items():
            runs.add(self._tokens, voters.get(number, np.zeros(0, np.int64)))

    def result(self) -> CompletionEvidence:
        """The evidence of all tokens so far."""
        changed = self._changed / len(self._tokens) if self._tokens else 0.0
        return CompletionEvidence(changed, self._searched, self._documents(), self._verbatim())

    def _count(self, token: int, found: Neighbors, temperature: float, share: float) -> dict[int, Ints]:
        """Give documents their parts of ``share``; returns the entries that voted for ``token``, by number of datastore."""
        voters = found.each(lambda part: part[:, found.tokens[0] == token])
        if voters.ids.numel() == 0:
            return {}
        entries = voters.ids[0].numpy()
        numbers = np.zeros_like(entries) if voters.stores is None else voters.stores[0].numpy()
        # Of voters alone, so these are their shares among themselves.
        parts = share * log_weights(voters, temperature)[0].exp().numpy()
        voted = {number: entries[numbers == number] for number in np.unique(numbers).tolist()}
        for number, mine in voted.items():
            documents, which = np.unique(self._stores[number].store.documents.of_entries(mine), return_inverse=True)
            weights = np.bincount(which, weights=parts[numbers == number])
            for document, weight in zip(documents.tolist(), weights.tolist(), strict=True):
                self._weights[number, document] += weight
        return voted

    def _documents(self) -> tuple[DocumentWeight, ...]:
        """The heaviest ones; of equal ones in the order of datastores and documents."""
        removed = {number: set(named.store.tombstones.documents.tolist()) for number, named in self._stores.items()}
        left = [(key, weight) for key, weight in self._weights.items() if key[1] not in removed[key[0]]]
        left.sort(key=lambda item: (-item[1], item[0]))
        weights = []
        for (number, row), weight in left[: self._most_documents]:
            named = self._stores[number]
            document = named.store.documents[row]
            weights.append(DocumentWeight(named.name, document.id, document.source, weight))
        return tuple(weights)

    def _verbatim(self) -> VerbatimRun | None:
        found = [(number, run) for number, runs in self._runs.items() if (run := runs.longest()) is not None]
        if not found:
            return None
        number, run = min(found, key=lambda item: (-item[1].tokens, item[1].start))
        named = self._stores[number]
        document = named.store.documents[run.document]
        characters = _characters(named.store, run)
        first, last = characters or (None, None)
        return VerbatimRun(
            start=run.start,
            tokens=run.tokens,
            text=self._decode(self._tokens[run.start : run.start + run.tokens]),
            datastore=named.name,
            document_id=document.id,
            source=document.source,
            character_start=first,
            character_end=last,
            line=None if first is None else document.line_of(first),
        )


def _characters(store: Datastore, run: Run) -> tuple[int, int] | None:
    """Characters [start, end) of a run in its document; None where the store was built from token ids."""
    if store.spans is None:
        return None
    spans = store.spans.slice(run.position, run.position + run.tokens).numpy().astype(np.int64)
    # Special tokens stand at no character, wherever they come.
    standing = spans[spans[:, 1] > spans[:, 0]]
    return (int(standing[0, 0]), int(standing[-1, 1])) if len(standing) else (int(spans[0, 0]), int(spans[0, 1]))
