"""Several datastores over the same text, one after another: each knows its model, and only one is open at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from knnlm.corpus import Corpus
from knnlm.datastore.reader import Datastore
from knnlm.datastore.selection import require_all
from knnlm.errors import InvalidInput
from knnlm.evaluation.breakdowns import gain_of
from knnlm.evaluation.compare import compare
from knnlm.evaluation.compared_stores import ComparedStore, ComparedStores, Pair, Setup
from knnlm.evaluation.comparison import Comparison
from knnlm.evaluation.statistics import Clusters, intervals_of_means, perplexity, relative
from knnlm.gate import DistanceBuckets, Gate
from knnlm.opening import OpenedKNNLM, open_store
from knnlm.tokenized import TokenizedDocument

StorePath = str | Path


@dataclass(frozen=True)
class OpenComparison:
    """A datastore while it is open, with the text that it was compared on and what came out."""

    opened: OpenedKNNLM
    corpus: Corpus
    text: list[TokenizedDocument]
    compared: ComparedStore


def compare_stores(
    stores: Sequence[StorePath],
    text: Sequence[str | Path],
    *,
    opening: Mapping[str, Any] | None = None,
    reading: Mapping[str, Any] | None = None,
    exclude: Sequence[str] = (),
    progress: Callable[[str, int, int | None], None] = lambda stage, done, total: None,
    visit: Callable[[OpenComparison], None] = lambda comparison: None,
    **comparing: Any,
) -> ComparedStores:
    """Compare base LM and kNN-LM on ``text`` (files, folders, globs, URLs) for each of ``stores``, which is closed before the next.

    ``opening``: options of :func:`knnlm.open_store`, ``reading`` of :class:`~knnlm.corpus.Corpus`, ``comparing`` of
    :func:`knnlm.compare`, the same for all. ``exclude``: ids of documents, each in one of the datastores at least. ``visit`` sees
    each datastore with its figures while it is open. Raises the errors of these, before any work where a datastore is missing.
    """
    if not stores:
        raise InvalidInput("stores", "is empty, but must name at least one datastore.")
    own_exclusions = _excluded_of_each(stores, exclude)
    compared = []
    for path, own in zip(stores, own_exclusions, strict=True):
        stage = "comparing" if len(stores) == 1 else f"comparing {path}"
        compared.append(_compare_one(path, text, dict(opening or {}), dict(reading or {}), own, stage, progress, visit, comparing))
        # A model and its index are large, and hold one another.
        gc.collect()
    return ComparedStores(tuple(compared), _pairs([each.comparison for each in compared], [each.setup.tokenizer for each in compared]))


def compare_opened(
    opened: OpenedKNNLM,
    text: Sequence[str | Path],
    *,
    name: str,
    reading: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **comparing: Any,
) -> OpenComparison:
    """One datastore that is open, under ``name``, as a row of the table; ``progress`` is called with tokens scored of all."""
    corpus = opened.corpus(*text, **(reading or {}))
    held = opened.read(corpus)
    total = sum(len(document.ids) - 1 for document in held)
    comparison = compare(opened.knn_lm, opened.store, held, progress=lambda done: progress(done, total), **comparing)
    compared = ComparedStore(name, setup_of(opened, comparison), comparison, corpus.left_out, corpus.problems.counts)
    return OpenComparison(opened, corpus, held, compared)


def _compare_one(
    path: StorePath,
    text: Sequence[str | Path],
    opening: dict[str, Any],
    reading: dict[str, Any],
    exclude: Sequence[str],
    stage: str,
    progress: Callable[[str, int, int | None], None],
    visit: Callable[[OpenComparison], None],
    comparing: Mapping[str, Any],
) -> ComparedStore:
    opened = open_store(path, **opening)
    found = compare_opened(
        opened,
        text,
        name=str(path),
        reading=reading,
        exclude=exclude,
        progress=lambda done, total: progress(stage, done, total),
        **comparing,
    )
    visit(found)
    return found.compared


def _excluded_of_each(stores: Sequence[StorePath], exclude: Sequence[str]) -> list[list[str]]:
    """Which of the ids ``exclude`` each datastore has; opens all of them, without models, so that a bad one is known at once."""
    wanted = list(dict.fromkeys(exclude))
    own = []
    for path in stores:
        documents = Datastore.open(path).documents
        known = set(documents.texts("id", documents.rows_of("id", wanted)))
        own.append([name for name in wanted if name in known])
    require_all(wanted, [name for names in own for name in names], "No datastore holds a document of this id")
    return own


def setup_of(opened: OpenedKNNLM, comparison: Comparison) -> Setup:
    """The facts of a datastore that was compared."""
    manifest, mixture = opened.store.manifest, comparison.mixture
    return Setup(
        model=opened.model.name,
        dtype=opened.model.dtype,
        tokenizer=manifest.model.fingerprint.tokenizer,
        key_layer=manifest.key.layer.kind,
        index=opened.retriever.index.description,
        entries=manifest.counts.entries,
        k=mixture.k,
        knn_temperature=mixture.temperature,
        weight=mixture.weight,
        mixture_from=opened.mixture_source if mixture == opened.knn_lm.mixture else "given",
        gate=_in_words(opened.searchable.gate) if comparison.gated else None,
        overfetch=opened.retriever.settings.for_k(mixture.k).overfetch,
        max_length=manifest.windowing.max_length,
        stride=manifest.windowing.stride,
    )


def _in_words(gate: Gate | None) -> str | None:
    if gate is None:
        return None
    form = "distance buckets" if isinstance(gate.form, DistanceBuckets) else "network"
    return form if gate.skip is None else f"{form}, skipping searches"


def _pairs(comparisons: Sequence[Comparison], tokenizers: Sequence[str]) -> tuple[Pair, ...]:
    pairs: list[Pair] = []
    for second, comparison in enumerate(comparisons):
        same = (
            first for first in range(second) if tokenizers[first] == tokenizers[second] and _same_tokens(comparisons[first], comparison)
        )
        pairs.extend(_pair(first, second, comparisons[first], comparison) for first in islice(same, 1))
    return tuple(pairs)


def _same_tokens(one: Comparison, other: Comparison) -> bool:
    return all(np.array_equal(getattr(one.per_token, name), getattr(other.per_token, name)) for name in ("doc", "position", "token_id"))


def _pair(first: int, second: int, one: Comparison, other: Comparison) -> Pair:
    gain = gain_of(one.per_token.logprob, other.per_token.logprob)
    clusters = Clusters.among(one.per_token.doc, one.per_token.position)
    change = perplexity(other.per_token.logprob) / perplexity(one.per_token.logprob) - 1
    return Pair(first, second, change, relative(intervals_of_means(gain, clusters)[0]), float((gain > 0).mean()), float((gain < 0).mean()))
