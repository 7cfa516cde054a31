"""``knnlm compare --report``: one HTML file with everything that a comparison found. It loads nothing and runs no script.

All text of documents is escaped, and what would not be seen (control characters, changes of writing direction) is made
visible: a report may be about anything.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from knnlm import __version__, console
from knnlm.errors import MissingDependency
from knnlm.evaluation import html_report_plots as plots
from knnlm.evaluation.compare_stores import OpenComparison
from knnlm.evaluation.compared_stores import ComparedStore, ComparedStores
from knnlm.evaluation.comparison import Comparison
from knnlm.evaluation.comparison_json import content_of
from knnlm.evaluation.exclusion import Exclusion
from knnlm.evaluation.passages import Passage, ShownToken, most_telling, show_passages
from knnlm.evaluation.plotting import require_matplotlib, svg
from knnlm.evaluation.report import COLUMNS, GROUP_COLUMNS, beside_one_another, change, group_row, perplexity_rows, what_changed
from knnlm.evaluation.visible_text import visible

FULL_STRENGTH = 3.0
MOST_ALPHA = 0.55
SOFTWARE = ("torch", "transformers", "tokenizers", "numpy", "faiss-cpu", "faiss-gpu")


@dataclass(frozen=True)
class ReportedStore:
    """One datastore's part of a report, which needs nothing that is open: its figures, ``passages`` and ``fingerprints``."""

    compared: ComparedStore
    passages: tuple[Passage, ...]
    fingerprints: Mapping[str, str]


def require_report() -> None:
    """Raise :class:`MissingDependency` naming the extra where a report can't be made."""
    require_matplotlib()
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            'jinja2 is not installed, which reports are made with; install knnlm with its extra: "knnlm[report]".'
        ) from error


def reported(found: OpenComparison, passages: int) -> ReportedStore:
    """A comparison's part of a report, with that many passages; the datastore must be open."""
    manifest = found.opened.store.manifest
    fingerprints = {
        "datastore": manifest.fingerprint,
        "model weights": manifest.model.fingerprint.weights,
        "tokenizer": manifest.model.fingerprint.tokenizer,
    }
    return ReportedStore(found.compared, tuple(passages_of(found, passages)), fingerprints)


def passages_of(found: OpenComparison, count: int) -> list[Passage]:
    """The ``count`` most changed passages; what the comparison left out is left out."""
    opened, comparison = found.opened, found.compared.comparison
    excluded = comparison.leakage.excluded
    asked = [document.id for document in excluded if document.test_document is None]
    exclusion = Exclusion.choose(opened.store, found.text, asked, automatic=len(asked) < len(excluded))
    searching = exclusion.apply(opened.knn_lm, opened.store)
    return show_passages(searching, opened.store, found.text, comparison.per_token, comparison.mixture, count)


def write_report(path: Path, compared: ComparedStores, parts: Sequence[ReportedStore], command: str) -> None:
    """Write the report; ``command`` is the line that made it. ``parts``: one for each datastore, in order."""
    path.write_text(render(compared, parts, command), encoding="utf-8", errors="backslashreplace")


def render(compared: ComparedStores, parts: Sequence[ReportedStore], command: str, made: datetime | None = None) -> str:
    """The page. ``made``: the time it says (None: now)."""
    require_report()
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=_finalized)
    template = environment.from_string(resources.files(__package__).joinpath("report_template.html").read_text(encoding="utf-8"))
    return template.render(
        summary_columns=["datastore", "", *COLUMNS, "change", "95 %"],
        summary_rows=[row for store in compared.stores for row in _summary_rows(store)],
        beside=beside_one_another(compared),
        group_columns=["", *GROUP_COLUMNS],
        stores=[_store(part, number) for number, part in enumerate(parts)],
        command=command,
        versions=versions(),
        made=f"{made or datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        figures=_data(content_of(compared)),
    )


def versions() -> list[tuple[str, str]]:
    """Of what a figure may depend on, as far as it is installed."""
    found = [("knnlm", __version__), ("Python", platform.python_version())]
    for name in SOFTWARE:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return found


def _finalized(value: Any) -> Any:
    """What a template puts into the page; marked-up text is ours and stays."""
    return visible(value) if type(value) is str else value


def _data(content: Mapping[str, Any]) -> Any:
    """JSON for a script element: nothing in it can end the element."""
    from markupsafe import Markup

    text = json.dumps(console.finite(content), ensure_ascii=True)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _summary_rows(store: ComparedStore) -> list[list[str]]:
    """:func:`perplexity_rows` with the change against the base LM."""
    comparison = store.comparison
    changes = [("", ""), _changed(comparison.change, comparison.interval)]
    changes += [_changed(baseline.change, baseline.interval) for baseline in comparison.baselines.values()]
    rows = perplexity_rows(comparison)
    return [[store.name if not place else "", *row, *changed] for place, (row, changed) in enumerate(zip(rows, changes, strict=True))]


def _changed(value: float, interval: Any) -> tuple[str, str]:
    return f"{value:+z.2%}", f"{interval.low:+z.2%} {interval.high:+z.2%}"


def _store(part: ReportedStore, number: int) -> dict[str, Any]:
    """What the template shows of one datastore."""
    store, comparison = part.compared, part.compared.comparison
    leakage, setup = comparison.leakage, asdict(part.compared.setup)
    settings = [(name.replace("_", " "), "none" if value is None else f"{value}") for name, value in setup.items()]
    shared = f"Much of this text stands in the datastore ({leakage.share(13):.0%} of its 13-token sequences)"
    return {
        "name": store.name,
        "warning": f"{shared}; the figures say little about new text." if leakage.is_much else "",
        "changed": what_changed(comparison),
        "plots": _plots(comparison, number),
        "breakdowns": [
            {
                "by": breakdown.by,
                "title": breakdown.title,
                "plot": _svg(plots.breakdown_plot(breakdown), f"Change of perplexity by {breakdown.title}", f"s{number}-{breakdown.by}"),
                "rows": [group_row(group) for group in breakdown.groups],
            }
            for breakdown in comparison.breakdowns
        ],
        **_quality(comparison),
        **_leakage(comparison),
        "passages": [_passage(passage) for passage in part.passages],
        "settings": [*settings, *((f"fingerprint of {name}", value) for name, value in part.fingerprints.items())],
    }


def _plots(comparison: Comparison, number: int) -> dict[str, Any]:
    figures = {
        "change": (plots.change_plot(comparison.difference.histogram), "Histogram of the change of log-probability"),
        "reliability": (plots.reliability_plot(comparison.base_reliability, comparison.knn_reliability), "Reliability diagram"),
        "weight": (plots.weight_plot(comparison.per_token), "Histogram of λ"),
        "cost": (plots.cost_plot(comparison), "Shares of forward passes, searches and mixing in the time"),
    }
    return {name: _svg(figure, title, f"s{number}-{name}") for name, (figure, title) in figures.items()}


def _svg(figure: Any, title: str, prefix: str) -> Any:
    from markupsafe import Markup

    return Markup(svg(figure, title, prefix))


def _quality(comparison: Comparison) -> dict[str, Any]:
    cost = comparison.cost
    named = (("base LM", comparison.base_reliability), ("kNN-LM", comparison.knn_reliability))
    baselines = [
        [
            baseline.name,
            f"{baseline.perplexity.value:.2f}",
            f"{baseline.perplexity.standard_error:.2f}",
            change(baseline.change, baseline.interval),
            change(baseline.knn_change, baseline.knn_interval),
        ]
        for baseline in comparison.baselines.values()
    ]
    return {
        "reliability": [[name, f"{r.error:.4f}", f"{r.accuracy:.1%}", f"{r.confidence:.1%}"] for name, r in named],
        "weight": f"mean weight {comparison.mean_weight:.3f}; {comparison.skipped:.1%} of searches skipped",
        "cost": [
            ["base LM", f"{comparison.base.tokens_per_second:,.0f} tokens/s"],
            ["kNN-LM", f"{comparison.knn.tokens_per_second:,.0f} tokens/s"],
            ["forward, search, mixing", f"{cost.forward:.1%}, {cost.search:.1%}, {cost.mixing:.1%} of {cost.seconds:.1f} s"],
            ["datastore", f"{console.size(cost.store_bytes)}, {cost.bytes_per_token:,.0f} bytes per token"],
        ],
        "baselines": baselines,
    }


def _leakage(comparison: Comparison) -> dict[str, Any]:
    leakage = comparison.leakage
    return {
        "overlaps": [
            [f"{overlap.length} tokens", f"{overlap.sequences:,}", f"{overlap.found:,}", f"{overlap.share:.2%}"]
            for overlap in leakage.overlaps
        ],
        "apart": [group_row(group) for group in (leakage.contaminated, leakage.clean) if group is not None],
        "documents": [[d.id, d.source, f"{d.sequences:,}", f"{d.found:,}", f"{d.share:.1%}"] for d in leakage.documents],
        "overlapping": f"{leakage.overlapping:,}",
        "excluded": [
            [d.id, d.source, f"{d.entries:,}", "asked for" if d.test_document is None else f"same tokens as {d.test_document}"]
            for d in leakage.excluded
        ],
    }


def _passage(passage: Passage) -> dict[str, Any]:
    listed = {id(token) for token in most_telling(passage)}
    tokens = [_token(token, place, id(token) in listed) for place, token in enumerate(passage.tokens)]
    return {"document": passage.document, "position": passage.position, "gain": passage.gain, "tokens": tokens}


def _token(token: ShownToken, place: int, listed: bool) -> dict[str, Any]:
    strength = min(1.0, abs(token.gain) / FULL_STRENGTH) * MOST_ALPHA
    log_probs = f"log-probability {token.lm_logprob:.2f} by the base LM, {token.logprob:.2f} by the mixture"
    return {
        "text": token.text,
        "shown": repr(token.text),
        "place": place,
        "listed": listed,
        "kind": "up" if token.gain > 0 else "down" if token.gain < 0 else "",
        "strength": f"{strength:.2f}",
        "title": f"{token.gain:+.2f} nats: {log_probs}; λ {token.weight:.2f}",
        "change": f"{token.gain:+.2f}",
        "weight": f"{token.weight:.2f}",
        "neighbors": [
            {
                "token": neighbor.token,
                "same": neighbor.same,
                "weight": f"{neighbor.weight:.0%}",
                "distance": f"{neighbor.distance:.4g}",
                "where": neighbor.document if neighbor.line is None else f"{neighbor.document}:{neighbor.line}",
                "left_context": neighbor.left_context,
            }
            for neighbor in token.neighbors
        ],
    }
