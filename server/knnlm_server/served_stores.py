"""A datastore as it is served, and those that one request has chosen. Held for as long as a request uses it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from knnlm.datastore.reader import Datastore
from knnlm.datastore_mix import StoreMix, StoreShare
from knnlm.following import context_of
from knnlm.gated import GatedRows, StoreGate
from knnlm.opening import SearchableStore
from knnlm.retrieval import Retriever
from knnlm_server.sequence import DatastoreInfo, RetrievalParams


@dataclass(frozen=True, eq=False)
class ServedStore:
    """One opening of a datastore under a name. ``number``: its own in the life of the server, by which neighbours name it; a
    reload is another opening. ``facts``: what is told of it, as it was when it was opened; ``gate``: its own, None where it has
    none. Equal to itself alone.
    """

    name: str
    number: int
    store: Datastore
    retriever: Retriever
    facts: DatastoreInfo
    gate: StoreGate | None = None

    @classmethod
    def of(cls, name: str, number: int, opened: SearchableStore) -> ServedStore:
        """A datastore that was just opened."""
        store, mixture, manifest = opened.store, opened.mixture, opened.store.manifest
        facts = DatastoreInfo(
            name=name,
            fingerprint=manifest.fingerprint,
            entries=manifest.live_entries,
            documents=manifest.live_documents,
            index=opened.retriever.index.description,
            key_layer=f"{manifest.key.layer.kind} ({manifest.key.layer.module})",
            key_dimension=manifest.key.dimension,
            distance=opened.retriever.distance,
            default_retrieval=RetrievalParams(mixture.weight, mixture.k, mixture.temperature, adaptive=opened.gate is not None),
            defaults_source=opened.mixture_source,
        )
        return cls(name, number, store, opened.retriever, facts, opened.store_gate)

    @property
    def info(self) -> DatastoreInfo:
        """What is told of it now: entries and documents that are not removed."""
        mask = self.store.allowed()
        documents = len(self.store.documents) - len(self.store.tombstones.documents)
        return replace(self.facts, entries=len(self.store) if mask is None else mask.allowed, documents=documents)

    def warm_up(self) -> None:
        """Search once, so that the first request does not wait for files to be read and pools to be made."""
        self.retriever.retrieve(torch.zeros((1, self.facts.key_dimension)), self.facts.default_retrieval.k)


@dataclass(frozen=True)
class ChosenStores:
    """The datastores that one request uses, each with its weight, as they were when it came; none at weight 0. ``gate``: what
    gives λ to each of its tokens (None: the request's own weight)."""

    weights: tuple[tuple[ServedStore, float], ...] = ()
    gate: StoreGate | None = None

    @classmethod
    def of(cls, weights: tuple[tuple[ServedStore, float], ...], retrieval: RetrievalParams) -> ChosenStores:
        """What a request chose. Its gate is that of the datastore as it is now, which may have been opened again since the
        request was read: it belongs to its own k and temperature."""
        if not retrieval.adaptive or len(weights) != 1:
            return cls(weights)
        (served, _), default = weights[0], weights[0][0].facts.default_retrieval
        same = (default.k, default.temperature) == (retrieval.k, retrieval.temperature)
        return cls(weights, served.gate if same else None)

    @property
    def mix(self) -> StoreMix:
        """A source of neighbours from all of them."""
        return StoreMix([served.retriever for served, _ in self.weights], [weight for _, weight in self.weights])


def gated_rows(rows: Sequence[ChosenStores], texts: Sequence[Sequence[int]]) -> list[GatedRows]:
    """The rows of a step that have a gate, by gate; ``texts``: the tokens that the LM has read in each row."""
    by_gate: dict[int, list[int]] = {}
    for row, chosen in enumerate(rows):
        if chosen.gate is not None:
            by_gate.setdefault(id(chosen.gate), []).append(row)
    return [
        GatedRows(gate, torch.tensor(theirs), torch.tensor([context_of(texts[row]) for row in theirs]))
        for theirs in by_gate.values()
        if (gate := rows[theirs[0]].gate) is not None
    ]


def shares_of(rows: Sequence[ChosenStores]) -> list[StoreShare]:
    """The datastores that the rows of a step use, each once with its weight in every row."""
    weights: dict[ServedStore, Tensor] = {}
    for row, chosen in enumerate(rows):
        for served, weight in chosen.weights:
            weights.setdefault(served, torch.zeros(len(rows), dtype=torch.float64))[row] = weight
    return [StoreShare(served.number, served.retriever, of_rows) for served, of_rows in weights.items()]
