"""Whether the gate of calibrated datastores does harm: base LM, best fixed λ and gate on texts that fit the datastore or don't.

``python -m benchmarks.no_regret --pair STORE TEXT …``, each pair with a calibrated datastore (``knnlm calibrate``); it
measures what is there, and chooses nothing. Differences are paired, with bootstrap intervals over documents (or blocks
of 256 tokens where there are fewer than 20).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.inputs import first_documents
from benchmarks.reports import print_table, say
from knnlm import console
from knnlm.errors import InvalidInput
from knnlm.evaluation.comparison import Interval
from knnlm.evaluation.mixture_fit import mixed_log_probs
from knnlm.evaluation.scoring import score
from knnlm.evaluation.statistics import Clusters, intervals_of_means
from knnlm.gate import LMSummary, lm_features
from knnlm.gated import StoreGate
from knnlm.knn_lm import KNNLanguageModel
from knnlm.opening import OpenedKNNLM, open_store
from knnlm.tokenized import TokenizedDocument

TOKENS = 20_000

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Measured:
    """One pair. Perplexities; ``against_fixed`` and ``against_base``: relative change by the gate with its interval, below 0 where
    the gate is better, ``fixed_against_base`` of the fixed λ; ``skipped``: share of searches not made; ``zeros``: of λ 0."""

    store: str
    text: str
    tokens: int
    clusters: str
    weight: float
    base: float
    fixed: float
    gated: float
    fixed_against_base: tuple[float, Interval]
    against_fixed: tuple[float, Interval]
    against_base: tuple[float, Interval]
    skipped: float
    zeros: float


def main() -> None:
    """Measure the pairs in turn."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.no_regret", description=__doc__)
    parser.add_argument(
        "--pair", nargs=2, action="append", required=True, metavar=("STORE", "TEXT"), help="a calibrated datastore and a text; repeatable"
    )
    parser.add_argument("--split", nargs=2, action="append", default=[], metavar=("TEXT", "REGEX"), help="where documents of TEXT begin")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="documents of each text until they hold so many (default 20,000)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    console.quiet_transformers()
    splits, found = dict(options.split), []
    for store, text in options.pair:
        found.append(measure(store, text, splits.get(text), options.tokens))
        say(_line(found[-1]))
    show(found)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(one) for one in found], indent=2) + "\n")


def measure(store: str, text: str, split: str | None, tokens: int) -> Measured:
    """Score the tokens once with the profile's gate, whose neighbours serve its fixed λ, too."""
    opened = open_store(store)
    held = first_documents(opened.read(opened.corpus(text, split_documents=split)), tokens)
    scored = _scored(opened, held)
    clusters, weight = _clusters(held), opened.knn_lm.mixture.weight
    with_fixed = mixed_log_probs(scored.lm, scored.knn, weight)
    return Measured(
        store=Path(store).name,
        text=text,
        tokens=len(scored.lm),
        clusters=clusters.name,
        weight=weight,
        base=math.exp(-scored.lm.mean()),
        fixed=math.exp(-with_fixed.mean()),
        gated=math.exp(-scored.gated.mean()),
        fixed_against_base=_change(with_fixed, scored.lm, clusters),
        against_fixed=_change(scored.gated, with_fixed, clusters),
        against_base=_change(scored.gated, scored.lm, clusters),
        skipped=float(scored.skipped.mean()),
        zeros=float((scored.weights == 0).mean()),
    )


@dataclass(frozen=True)
class _Scored:
    """Of each token [n]: log-probabilities by LM, neighbours and gated mixture, λ, and whether the gate would not search."""

    lm: Array
    knn: Array
    gated: Array
    weights: Array
    skipped: Array


def _scored(opened: OpenedKNNLM, held: Sequence[TokenizedDocument]) -> _Scored:
    """Every token is searched; where the gate's rule skips, λ is 0 afterwards, which is the same."""
    gate = opened.searchable.gate
    if opened.store.profile is None:
        raise InvalidInput("pair", f"names {opened.store.path}, which has no profile; run knnlm calibrate on it first.")
    # Where calibration found no gate worth having, what is served is the fixed λ.
    whole = None if gate is None else StoreGate(replace(gate, skip=None), opened.store)
    knn_lm = KNNLanguageModel(opened.model, opened.knn_lm.tokenizer, opened.retriever, opened.knn_lm.mixture, whole)
    columns = np.empty((5, sum(len(document.ids) - 1 for document in held)))
    for batch in score(knn_lm, (document.ids for document in held), opened.store.manifest.windowing):
        skipped = torch.zeros(len(batch.rows), dtype=torch.bool)
        if gate is not None:
            skipped = gate.skips(lm_features(LMSummary.of(batch.read.log_probs)))
        gated = torch.where(skipped, batch.lm_log_probs, batch.log_probs)
        knn = torch.where(batch.neighbors.found.any(1), batch.knn_log_probs, torch.nan)
        parts = (batch.lm_log_probs, knn, gated, torch.where(skipped, 0.0, batch.weight), skipped)
        for column, part in zip(columns, parts, strict=True):
            column[batch.rows.numpy()] = part.numpy()
    return _Scored(*columns)


def _clusters(held: Sequence[TokenizedDocument]) -> Clusters:
    counts = [len(document.ids) - 1 for document in held]
    return Clusters.among(np.repeat(np.arange(len(held)), counts), np.concatenate([np.arange(1, count + 1) for count in counts]))


def _change(log_probs: Array, beside: Array, clusters: Clusters) -> tuple[float, Interval]:
    """Relative change of perplexity, and its interval of 95 %."""
    loss = beside - log_probs
    (interval,) = intervals_of_means(loss, clusters)
    return math.expm1(loss.mean()), Interval(math.expm1(interval.low), math.expm1(interval.high))


def show(found: Sequence[Measured]) -> None:
    """One row a pair."""
    columns = ["datastore", "text", "tokens", "base", "fixed λ", "gate", "fixed / base", "gate / fixed", "gate / base", "skipped"]
    rows: list[list[float | str]] = [
        [
            one.store, Path(one.text).parent.name + "/" + Path(one.text).stem, one.tokens, one.base, one.fixed, one.gated,
            _percent(one.fixed_against_base), _percent(one.against_fixed), _percent(one.against_base), f"{one.skipped:.1%}",
        ]
        for one in found
    ]  # fmt: skip
    print_table("perplexities, and their change with intervals of 95 %", columns, rows)


def _percent(change: tuple[float, Interval]) -> str:
    value, interval = change
    return f"{value:+.1%} [{interval.low:+.1%}, {interval.high:+.1%}]"


def _line(one: Measured) -> str:
    return f"{one.store} on {one.text}: {one.base:.2f} -> {one.fixed:.2f} fixed, {one.gated:.2f} with the gate"


if __name__ == "__main__":
    main()
