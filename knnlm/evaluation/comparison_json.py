"""A comparison as JSON: docs/compare.schema.json describes it, and :data:`SCHEMA_VERSION` changes with what is there.

Numbers that are not finite stand as null. What is there for each token is in the file of ``--per-token`` instead.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from knnlm.evaluation.compared_stores import ComparedStore, ComparedStores
from knnlm.evaluation.comparison import Comparison, Leakage

SCHEMA_VERSION = 1
APART = ("per_token", "mixture", "interval", "base_reliability", "knn_reliability", "leakage", "baselines")


def content_of(compared: ComparedStores) -> dict[str, Any]:
    """Everything but the arrays of single tokens."""
    return {
        "schema_version": SCHEMA_VERSION,
        "stores": [_store(store) for store in compared.stores],
        "pairs": [asdict(pair) for pair in compared.pairs],
        "one_tokenizer": compared.one_tokenizer,
    }


def _store(store: ComparedStore) -> dict[str, Any]:
    return {
        "name": store.name,
        "settings": asdict(store.setup),
        **_comparison(store.comparison),
        "left_out": dict(store.left_out),
        "problems": dict(store.problems),
    }


def _comparison(comparison: Comparison) -> dict[str, Any]:
    plain = {name: _plain(getattr(comparison, name)) for name in comparison.__dataclass_fields__ if name not in APART}
    return {
        **plain,
        "change_interval": _plain(comparison.interval),
        "reliability": {"base": _plain(comparison.base_reliability), "knn": _plain(comparison.knn_reliability)},
        "leakage": _leakage(comparison.leakage),
        "baselines": [_without(_plain(baseline), "log_probs") for baseline in comparison.baselines.values()],
    }


def _leakage(leakage: Leakage) -> dict[str, Any]:
    """With the shares, which are computed."""
    overlaps = [{**asdict(overlap), "share": overlap.share} for overlap in leakage.overlaps]
    documents = [{**asdict(document), "share": document.share} for document in leakage.documents]
    return {**_plain(leakage), "overlaps": overlaps, "documents": documents}


def _plain(value: Any) -> Any:
    """Dataclasses, arrays and tuples as what JSON has."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _without(content: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != name}
