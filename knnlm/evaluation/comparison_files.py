"""A comparison in files: CSV for plots of one's own, Markdown to paste, and every token's figures as NumPy arrays."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from knnlm.evaluation.compared_stores import ComparedStore, ComparedStores
from knnlm.evaluation.comparison import Comparison, Group, PerToken
from knnlm.evaluation.report import (
    COLUMNS,
    GROUP_COLUMNS,
    audited,
    beside_one_another,
    group_row,
    grouped,
    perplexity_rows,
    quality_and_cost,
    settings_of,
    what_changed,
)

CSV_COLUMNS = [
    "datastore", "table", "group", "low", "high", "tokens", "base_perplexity", "perplexity", "change", "change_low", "change_high",
    "better", "weight",
]  # fmt: skip


def write_per_token(path: Path, per_token: PerToken) -> None:
    """Write the per-token arrays as an uncompressed ``.npz`` under exactly the name given."""
    with path.open("wb") as file:
        np.savez(file, **per_token.arrays())  # type: ignore[arg-type]


def write_csv(path: Path, compared: ComparedStores) -> None:
    """One row for each datastore and each group of its tokens; docs/comparing.md says what the columns are."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for store in compared.stores:
            writer.writerows([store.name, *row] for row in _csv_rows(store.comparison))


def _csv_rows(comparison: Comparison) -> list[list[Any]]:
    base, interval = comparison.base.value, comparison.interval
    figures = [comparison.tokens, base, comparison.knn.value, comparison.change, interval.low, interval.high]
    rows: list[list[Any]] = [["all", "all", None, None, *figures, comparison.better, comparison.mean_weight]]
    for baseline in comparison.baselines.values():
        change = [baseline.change, baseline.interval.low, baseline.interval.high]
        rows.append(["baseline", baseline.name, None, None, comparison.tokens, base, baseline.perplexity.value, *change, None, None])
    for breakdown in comparison.breakdowns:
        rows += [[breakdown.by, *_csv_group(group)] for group in breakdown.groups]
    apart = (comparison.leakage.contaminated, comparison.leakage.clean)
    return rows + [["leakage", *_csv_group(group)] for group in apart if group is not None]


def _csv_group(group: Group) -> list[Any]:
    figures = [group.base, group.knn, group.change, group.interval.low, group.interval.high, group.better, group.weight]
    return [group.name, group.low, group.high, group.tokens, *figures]


def write_markdown(path: Path, compared: ComparedStores) -> None:
    """The tables and sentences of the terminal as Markdown."""
    rows = [[_code(store.name), *row] for store in compared.stores for row in perplexity_rows(store.comparison)]
    parts = ["# Base LM against kNN-LM", _table(["datastore", "", *COLUMNS], rows), _list(beside_one_another(compared))]
    parts += [part for store in compared.stores for part in _store_parts(store)]
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def _store_parts(store: ComparedStore) -> list[str]:
    comparison = store.comparison
    said = [*what_changed(comparison), *quality_and_cost(comparison), *audited(comparison.leakage), settings_of(store)]
    tables = [
        f"### Perplexity by {title}\n\n" + _table(["", *GROUP_COLUMNS], [group_row(group) for group in groups])
        for title, groups in grouped(comparison)
    ]
    return [f"## {_code(store.name)}", f"Model {_code(store.setup.model)}, {store.setup.entries:,} entries.", _list(said), *tables]


def _table(columns: list[str], rows: list[list[str]]) -> str:
    align = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in (columns, align, *rows))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _code(text: str) -> str:
    return "`" + text.replace("`", "'") + "`"


def _list(sentences: list[str]) -> str:
    return "\n".join(f"- {_cell(sentence)}" for sentence in sentences)
