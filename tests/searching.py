"""What tests of search settings share: clustered keys in documents, real FAISS indexes over them, and slow references."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
import torch

from knnlm.datastore.reader import ShardedRows
from knnlm.entry_mask import EntryMask
from knnlm.index import FaissIndex, IndexFacts
from knnlm.search_measurement import Searched
from knnlm.search_positions import Positions
from tests import reference

DIMENSION, ENTRIES, VOCABULARY = 16, 2000, 40
DOCUMENT = 50
INDEX_BYTES = 60_000

Array = np.ndarray[Any, Any]


def clustered_keys(entries: int = ENTRIES, seed: int = 0) -> Array:
    """Keys in clusters; each document lies around a point of its own, so its entries are near one another."""
    chance = np.random.default_rng(seed)
    centres = chance.normal(size=(25, DIMENSION))
    documents = chance.normal(size=(-(-entries // DOCUMENT), DIMENSION)).repeat(DOCUMENT, axis=0)[:entries]
    return (centres[chance.integers(0, 25, entries)] + 0.5 * documents + 0.7 * chance.normal(size=(entries, DIMENSION))).astype(np.float32)


def values_of(keys: Array) -> Array:
    """Tokens that go with the place of a key, so that neighbours agree on some."""
    return (np.abs(keys[:, 0] * 3).astype(np.int32) + 7 * (keys[:, 1] > 0)).astype(np.int32) % VOCABULARY


def faiss_index(factory: str, keys: Array) -> FaissIndex:
    """An index of ``keys`` with their numbers as ids, in memory."""
    index = faiss.index_factory(keys.shape[1], factory)
    inverted = faiss.try_extract_index_ivf(index)
    nlist = 0
    if inverted is None:
        index = faiss.IndexIDMap2(index)
    else:
        inverted.cp.seed = 1
        nlist = inverted.nlist
    index.train(keys)
    index.add_with_ids(keys, np.arange(len(keys)))
    facts = IndexFacts(
        factory=factory, dimension=keys.shape[1], entries=len(keys), nlist=nlist, trained_on=len(keys), seed=1, faiss_version=None
    )
    return FaissIndex(index, facts)


def searched(factory: str, keys: Array, *, stored: bool = True, allowed: EntryMask | None = None) -> Searched:
    """``keys`` in two shards under an index."""
    cut = len(keys) // 3
    rows = ShardedRows([keys[:cut].copy(), keys[cut:].copy()], [0, cut])
    values = ShardedRows([values_of(keys)], [0])
    return Searched(faiss_index(factory, keys), rows if stored else None, values, allowed, INDEX_BYTES, VOCABULARY)


def positions_at(keys: Array, entries: Array, width: int = DOCUMENT) -> Positions:
    """Stored entries, each without the ``width`` entries of its document."""
    first = torch.from_numpy(entries // width * width)
    left_out = torch.stack([first, (first + width).clamp(max=len(keys))], dim=1)
    return Positions(torch.from_numpy(keys[entries]), torch.from_numpy(values_of(keys)[entries]).long(), left_out, "stored entries")


def exact_distribution(keys: Array, query: Array, kept: Array, k: int, temperature: float) -> tuple[Array, set[int]]:
    """p_kNN over the vocabulary and the ids of the k nearest among the entries ``kept``, by brute force in float64."""
    distances, order = reference.neighbors(query.astype(np.float64), keys[kept].astype(np.float64), k)
    ids = kept[order]
    return reference.knn_probabilities(distances, values_of(keys)[ids].astype(np.int64), temperature, VOCABULARY), set(ids.tolist())
