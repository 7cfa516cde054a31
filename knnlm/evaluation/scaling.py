"""How perplexity follows the datastore: its size (documents left out at random), k, and how far a search looks.

The LM reads the text once. Each size is searched once, for the largest k, with the entries of the other documents left
out of the search; fewer neighbours are the first of these. Nothing is built again, so an index keeps the cells and codes
that it learnt from all entries: a store built from the smaller corpus alone may have others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from knnlm.errors import InvalidInput
from knnlm.evaluation.mixture_fit import best_weight, mixed_log_probs, powers_of_two
from knnlm.evaluation.several_searches import Found, Reading, Reference, Search, search_several
from knnlm.evaluation.statistics import Clusters, perplexity, standard_error
from knnlm.evaluation.subsets import Subset, nested_subsets
from knnlm.index import ExactIndex
from knnlm.mixture import MOST_NEIGHBORS, Mixture
from knnlm.opening import OpenedKNNLM
from knnlm.retrieval import Retriever
from knnlm.search_measurement import REFERENCE_OVERFETCH
from knnlm.search_settings import SearchSetting, SearchSettings
from knnlm.search_tuning import compares_every_key
from knnlm.tokenized import TokenizedDocument

SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
LARGEST_K = 1024
EXACT_TOKENS = 512
SEED = 20200430

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Options:
    """What is measured.

    ``shares`` of the entries; ``ks`` (None: powers of two up to 1024, or to all entries); search ``settings`` as (probes,
    over-fetch) (None: around the store's own). How far a setting is from exact search is measured at ``exact_tokens``
    tokens; ``seed`` draws these, and the documents.
    """

    shares: Sequence[float] = SHARES
    ks: Sequence[int] | None = None
    settings: Sequence[tuple[int, float]] | None = None
    exact_tokens: int = EXACT_TOKENS
    seed: int = SEED


@dataclass(frozen=True)
class Measured:
    """Perplexity with its standard error, and its relative ``change`` against the base LM with the standard error of the
    paired difference; ``weight`` λ."""

    weight: float
    perplexity: float
    standard_error: float
    change: float
    change_standard_error: float


@dataclass(frozen=True)
class Point:
    """One size and one k. ``fixed``: with the mixture's λ; ``refitted``: with the λ that fits the calibration text best at
    this size and k (None: no such text)."""

    documents: int
    entries: int
    k: int
    fixed: Measured
    refitted: Measured | None


@dataclass(frozen=True)
class SettingPoint:
    """One search setting, all entries, the mixture's k. ``own``: the store's own setting.

    ``total_variation`` of p_kNN from exact search, mean over the sample, with its standard error; ``recall`` of the neighbours;
    ``tokens_per_second`` of LM, search and mixing.
    """

    probes: int
    overfetch: float
    own: bool
    total_variation: float
    total_variation_standard_error: float
    recall: float
    measured: Measured
    tokens_per_second: float


@dataclass(frozen=True)
class Scaling:
    """All that was measured over ``tokens`` of ``documents``.

    ``points``: every size with every k, sizes and then k ascending; ``settings`` (empty for an index that compares every
    key: it has none). ``reference``: what settings were compared with, at ``reference_tokens`` tokens. ``clusters``: what
    the standard errors count as independent.
    """

    documents: int
    tokens: int
    calibration_tokens: int
    base: Measured
    base_tokens_per_second: float
    mixture: Mixture
    points: list[Point]
    settings: list[SettingPoint]
    reference: str
    reference_tokens: int
    clusters: str
    seed: int

    def at_k(self, k: int) -> list[Point]:
        """The points of one k, by size."""
        return [point for point in self.points if point.k == k]

    def at_size(self, entries: int) -> list[Point]:
        """The points of one size, by k."""
        return [point for point in self.points if point.entries == entries]


def measure_scaling(
    opened: OpenedKNNLM, documents: Sequence[TokenizedDocument], calibration: Sequence[TokenizedDocument] = (),
    options: Options | None = None, *, batch_tokens: int = 2048, progress: Callable[[str, int], None] = lambda stage, done: None,
) -> Scaling:  # fmt: skip
    """Measure over ``documents``; λ is fitted again on ``calibration`` where that is given.

    ``progress`` is called with ``fitting`` or ``measuring`` and the tokens done. Raises :class:`CorpusError` if no token
    can be scored, :class:`InvalidInput` for an option out of range.
    """
    options, mixture = options or Options(), opened.knn_lm.mixture
    subsets = nested_subsets(opened.store, options.shares, options.seed)
    ks, settings = _ks(opened, options), _settings(opened, options)
    sizes = [Search(_of_subset(opened, subset), ks) for subset in subsets]
    fitted = None
    if calibration:
        fitted = search_several(
            opened, calibration, sizes, mixture.temperature, batch_tokens=batch_tokens, progress=lambda done: progress("fitting", done)
        )
    varied = [Search(_with_setting(opened, setting), (mixture.k,), compared=True) for setting in settings]
    tokens = sum(max(len(document.ids) - 1, 0) for document in documents)
    reference, name = _reference(opened, tokens, options)
    reading = search_several(
        opened, documents, [*sizes, *varied], mixture.temperature, reference=reference if varied else None,
        batch_tokens=batch_tokens, progress=lambda done: progress("measuring", done),
    )  # fmt: skip
    judge = _Judge(reading.lm.astype(np.float64), Clusters.among(*_places(documents)))
    weights = None if fitted is None else _fitted_weights(fitted)
    own = opened.retriever.settings.for_k(mixture.k)
    return Scaling(
        documents=len(documents),
        tokens=tokens,
        calibration_tokens=0 if fitted is None else len(fitted.lm),
        base=judge.measured(judge.lm, 0.0),
        base_tokens_per_second=tokens / reading.lm_seconds,
        mixture=mixture,
        points=_points(judge, subsets, ks, mixture.weight, reading.found, weights),
        settings=[
            _setting_point(judge, setting, setting == (own.probes, own.overfetch), mixture.weight, found, reading.lm_seconds)
            for setting, found in zip(settings, reading.found[len(sizes) :], strict=True)
        ],
        reference=name,
        reference_tokens=len(reference.rows) if varied else 0,
        clusters=judge.clusters.name,
        seed=options.seed,
    )


def _places(documents: Sequence[TokenizedDocument]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Document and position of each scored token."""
    counts = [max(len(document.ids) - 1, 0) for document in documents]
    return np.repeat(np.arange(len(counts)), counts), np.concatenate([np.arange(1, count + 1) for count in counts])


@dataclass(frozen=True)
class _Judge:
    """Perplexities of n tokens: ``lm`` [n] of the base LM, ``clusters`` what counts as independent."""

    lm: Array
    clusters: Clusters

    def measured(self, log_probs: Array, weight: float) -> Measured:
        """Of the mixture's ``log_probs`` [n]."""
        value = perplexity(log_probs)
        ratio = value / perplexity(self.lm)
        return Measured(
            weight,
            value,
            value * standard_error(log_probs, self.clusters),
            ratio - 1,
            ratio * standard_error(log_probs - self.lm, self.clusters),
        )

    def mixed(self, knn: np.ndarray[Any, Any], weight: float) -> Measured:
        """Of the mixture with ``knn`` [n], log p_kNN, and one λ."""
        return self.measured(mixed_log_probs(self.lm, knn.astype(np.float64), weight), weight)


def _points(
    judge: _Judge, subsets: Sequence[Subset], ks: Sequence[int], weight: float, found: Sequence[Found], weights: Array | None
) -> list[Point]:
    return [
        Point(
            subset.documents,
            subset.entries,
            k,
            judge.mixed(found[size].log_probs[place], weight),
            None if weights is None else judge.mixed(found[size].log_probs[place], float(weights[size, place])),
        )
        for size, subset in enumerate(subsets)
        for place, k in enumerate(ks)
    ]


def _setting_point(judge: _Judge, setting: tuple[int, float], own: bool, weight: float, found: Found, lm_seconds: float) -> SettingPoint:
    variation = np.asarray(found.variation)
    error = float(variation.std(ddof=1) / math.sqrt(len(variation))) if len(variation) > 1 else math.nan
    return SettingPoint(
        probes=setting[0],
        overfetch=setting[1],
        own=own,
        total_variation=float(variation.mean()),
        total_variation_standard_error=error,
        recall=float(np.mean(found.recall)),
        measured=judge.mixed(found.log_probs[0], weight),
        tokens_per_second=len(judge.lm) / (lm_seconds + found.seconds),
    )


def _fitted_weights(reading: Reading) -> Array:
    """The λ that fits best, for each size and k: [sizes, ks]."""
    lm = reading.lm.astype(np.float64)
    return np.array([[best_weight(lm, knn.astype(np.float64))[0] for knn in found.log_probs] for found in reading.found])


def _ks(opened: OpenedKNNLM, options: Options) -> tuple[int, ...]:
    """Ascending, the mixture's own among them."""
    for k in options.ks or ():
        if not 1 <= k <= MOST_NEIGHBORS:
            raise InvalidInput("k", f"is {k}, but must be from 1 to {MOST_NEIGHBORS}.")
    wanted = options.ks or powers_of_two(max(1, min(LARGEST_K, opened.store.manifest.live_entries)))
    return tuple(sorted({*wanted, opened.knn_lm.mixture.k}))


def _settings(opened: OpenedKNNLM, options: Options) -> list[tuple[int, float]]:
    """(probes, over-fetch), ascending; none where the index compares every key."""
    index, distance = opened.retriever.index, opened.retriever.distance
    if compares_every_key(index):
        if options.settings:
            raise InvalidInput("setting", f"is of no use here, since the index is {index.description}, which compares every key.")
        return []
    for probes, overfetch in options.settings or ():
        if not (1 if index.nlist else 0) <= probes <= index.nlist:
            raise InvalidInput("setting", f"has {probes} probes, but the index has {index.nlist} cells.")
        if not 1 <= overfetch < math.inf or (distance == "index" and overfetch != 1):
            raise InvalidInput("setting", f"has over-fetch {overfetch:g}, but must have 1 or more, and 1 in a store without keys.")
    own = opened.retriever.settings.for_k(opened.knn_lm.mixture.k)
    return sorted({*(options.settings or _around(own, index.nlist, fixed=distance == "index")), (own.probes, own.overfetch)})


def _around(own: SearchSetting, nlist: int, *, fixed: bool) -> list[tuple[int, float]]:
    """Fewer and more probes with the same over-fetch, and other over-fetch (unless it is ``fixed``) with the same probes."""
    probes = [min(max(1, round(own.probes * factor)), nlist) for factor in (1 / 16, 1 / 4, 1, 4)] if nlist else [0]
    return [*((count, own.overfetch) for count in probes), *((own.probes, factor) for factor in (1.0, 2.0, 4.0) if not fixed)]


def _of_subset(opened: OpenedKNNLM, subset: Subset) -> Retriever:
    store, retriever = opened.store, opened.retriever
    return Retriever(retriever.index, store.keys, store.values, retriever.settings, subset.allowed)


def _with_setting(opened: OpenedKNNLM, setting: tuple[int, float]) -> Retriever:
    store, index = opened.store, opened.retriever.index
    return Retriever(index, store.keys, store.values, SearchSettings.fixed(index.nlist, index.entries, *setting), store.allowed)


def _reference(opened: OpenedKNNLM, tokens: int, options: Options) -> tuple[Reference, str]:
    """Exact search where keys are stored, else the index's own search of all its cells; at tokens drawn without repetition."""
    store, index = opened.store, opened.retriever.index
    if store.keys is not None:
        exact = ExactIndex(store.keys, str(opened.model.device))
        settings = SearchSettings.fixed(0, index.entries, 0, REFERENCE_OVERFETCH)
        retriever, name = Retriever(exact, store.keys, store.values, settings, store.allowed), "exact search over the stored keys"
    else:
        settings = SearchSettings.fixed(index.nlist, index.entries, index.nlist, 1.0)
        retriever, name = Retriever(index, None, store.values, settings, store.allowed), "the index's own search of all its cells"
    rows = np.sort(np.random.default_rng(options.seed).choice(tokens, min(options.exact_tokens, tokens), replace=False))
    return Reference(retriever, rows), name
