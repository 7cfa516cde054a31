"""How a comparison is shown on a terminal: tables, and sentences around them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from knnlm import console
from knnlm.evaluation.compared_stores import ComparedStore, ComparedStores
from knnlm.evaluation.comparison import Comparison, Excluded, Group, Interval, Leakage, Perplexity
from knnlm.evaluation.visible_text import visible

NAMED = 5


def show(compared: ComparedStores) -> None:
    """Print one table of all datastores, then what is known of each."""
    several = len(compared.stores) > 1
    console.out.print(stores_table(compared))
    for sentence in beside_one_another(compared):
        _say(sentence)
    for store in compared.stores:
        if several:
            _say(f"\n{store.name}", style="bold")
        for sentence in what_changed(store.comparison):
            _say(sentence)
        console.out.print(groups_table(store.comparison))
        for sentence in (*quality_and_cost(store.comparison), *audited(store.comparison.leakage), settings_of(store)):
            _say(sentence)
    for store in compared.stores:
        _shout(store, several=several)


def _say(sentence: str, style: str = "") -> None:
    """Ids and paths stand in it: brackets are no markup, and no control character reaches the terminal."""
    console.out.print(visible(sentence), style=style, markup=False, soft_wrap=True)


def perplexity_table(comparison: Comparison) -> Table:
    """Base LM and kNN-LM side by side, baselines below."""
    return console.table("", ["", *COLUMNS], perplexity_rows(comparison))


COLUMNS = ["perplexity", "± s.e.", "bits/byte", "tokens/s"]


def stores_table(compared: ComparedStores) -> Table:
    """:func:`perplexity_table` of each datastore, under its name where there are several."""
    if len(compared.stores) == 1:
        return perplexity_table(compared.stores[0].comparison)
    rows = [[visible(store.name), *row] for store in compared.stores for row in perplexity_rows(store.comparison)]
    return console.table("", ["datastore", "", *COLUMNS], rows)


def perplexity_rows(comparison: Comparison) -> list[list[str]]:
    """Name and figures of base LM, kNN-LM and each baseline."""
    named = {"base LM": comparison.base, "kNN-LM": comparison.knn}
    named |= {f"base LM + {baseline.name}": baseline.perplexity for baseline in comparison.baselines.values()}
    return [[name, *_figures(result)] for name, result in named.items()]


def _figures(result: Perplexity) -> list[str]:
    bits = "" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
    rate = "" if np.isnan(result.tokens_per_second) else f"{result.tokens_per_second:,.0f}"
    return [f"{result.value:.2f}", f"{result.standard_error:.2f}", bits, rate]


def beside_one_another(compared: ComparedStores) -> list[str]:
    """Which datastores compare with one another, in sentences; none for a single one."""
    names = [store.name for store in compared.stores]
    said = [
        f"{names[pair.second]} against {names[pair.first]}: perplexity {change(pair.change, pair.interval)}, "
        f"better on {pair.better:.1%} of tokens, worse on {pair.worse:.1%}"
        for pair in compared.pairs
    ]
    if not compared.one_tokenizer:
        said.append("the tokenizers differ, so perplexities of these datastores do not compare; bits per byte do")
    elif len(compared.pairs) < len(names) - 1:
        said.append(
            "not all of these datastores score the same tokens (special tokens or the cuts of documents differ); those are not paired"
        )
    return said


def what_changed(comparison: Comparison) -> list[str]:
    """Change of perplexity, and over what it was measured."""
    said = [
        f"perplexity {change(comparison.change, comparison.interval)} (± {comparison.change_standard_error:.1%}), "
        f"better on {comparison.better:.1%} of tokens, worse on {comparison.worse:.1%}"
    ]
    for baseline in comparison.baselines.values():
        said.append(
            f"base LM + {baseline.name}: perplexity {change(baseline.change, baseline.interval)}; "
            f"kNN-LM against it {change(baseline.knn_change, baseline.knn_interval)}"
        )
    said += [f"baseline {name} left out: {reason}" for name, reason in comparison.baselines_left_out.items()]
    said.append(
        f"{comparison.tokens:,} tokens of {console.counted(comparison.documents, 'document')}; "
        f"standard errors and intervals over {comparison.cluster_count:,} {comparison.clusters}"
    )
    impossible = int(np.isneginf(comparison.per_token.logprob).sum())
    if impossible:
        said.append(f"{impossible:,} tokens have probability 0: with weight 1, what no neighbour has is impossible")
    return said


def change(value: float, interval: Interval) -> str:
    """A relative change with its interval: ``-29.6% [-31.0%, -28.1%]``."""
    return f"{value:+z.1%} " + ("[no interval]" if np.isnan(interval.low) else f"[{interval.low:+z.1%}, {interval.high:+z.1%}]")


GROUP_COLUMNS = ["tokens", "base LM", "kNN-LM", "change", "95 %", "better"]


def groups_table(comparison: Comparison) -> Table:
    """Every breakdown, and contaminated tokens beside clean ones where there are both."""
    rows: list[list[str]] = []
    for title, groups in grouped(comparison):
        rows += [[title, *[""] * len(GROUP_COLUMNS)], *(group_row(group, indent="  ") for group in groups)]
    return console.table("", ["perplexity by", *GROUP_COLUMNS], rows)


def grouped(comparison: Comparison) -> list[tuple[str, Sequence[Group]]]:
    """Titles and groups of all breakdowns, and of the audit where it found both kinds of tokens."""
    apart = [group for group in (comparison.leakage.contaminated, comparison.leakage.clean) if group is not None]
    audit = [("in a 13-token sequence of the datastore", apart)] if len(apart) == 2 else []
    return [*((breakdown.title, breakdown.groups) for breakdown in comparison.breakdowns), *audit]


def group_row(group: Group, *, indent: str = "") -> list[str]:
    """Name and figures of one group."""
    interval = "" if np.isnan(group.interval.low) else f"{group.interval.low:+z.1%} {group.interval.high:+z.1%}"
    figures = [f"{group.tokens:,}", f"{group.base:.2f}", f"{group.knn:.2f}", f"{group.change:+z.1%}", interval]
    return [indent + group.name, *figures, f"{group.better:.1%}"]


def quality_and_cost(comparison: Comparison) -> list[str]:
    """Calibration, λ, and what it took."""
    base, knn, cost = comparison.base_reliability, comparison.knn_reliability, comparison.cost
    return [
        f"expected calibration error: base LM {base.error:.4f}, kNN-LM {knn.error:.4f}; "
        f"most probable token right: {base.accuracy:.1%}, {knn.accuracy:.1%}",
        f"mean weight {comparison.mean_weight:.3f}; {comparison.skipped:.1%} of searches skipped",
        f"time: {cost.forward:.0%} forward, {cost.search:.0%} search, {cost.mixing:.0%} mixing; "
        f"datastore {console.size(cost.store_bytes)}, {cost.bytes_per_token:,.0f} bytes per token",
    ]


def audited(leakage: Leakage) -> list[str]:
    """What of the text stands in the datastore, and what was left out for it."""
    shares = ", ".join(f"{overlap.share:.2%} of {overlap.length}-token" for overlap in leakage.overlaps)
    said = [f"in the datastore: {shares} sequences of the text"]
    if leakage.documents:
        named = ", ".join(f"{document.id} ({document.share:.1%} of it)" for document in leakage.documents[:NAMED])
        others = leakage.overlapping - min(NAMED, len(leakage.documents))
        more = f" and {others:,} more" if others else ""
        said.append(f"documents of the datastore that share 13-token sequences with the text: {named}{more}")
    return said + excluded(leakage.excluded)


def excluded(documents: Sequence[Excluded]) -> list[str]:
    """Which documents of the datastore were left out, and why."""
    reasons = {"as asked": [d for d in documents if d.test_document is None]}
    reasons["because the text has the same"] = [d for d in documents if d.test_document is not None]
    return [
        f"{console.counted(len(those), 'document')} of the datastore left out {reason}: "
        f"{', '.join(d.id for d in those[:NAMED])}{', …' if len(those) > NAMED else ''}"
        for reason, those in reasons.items()
        if those
    ]


def settings_of(store: ComparedStore) -> str:
    """Mixture, windows and index in one line."""
    setup = store.setup
    weight = f"weight={setup.weight:g}" if setup.gate is None else f"weight by a gate ({setup.gate})"
    return (
        f"k={setup.k}, kNN temperature={setup.knn_temperature:g}, {weight} ({setup.mixture_from}); "
        f"windows of {setup.max_length} tokens, stride {setup.stride}; {setup.index}"
    )


def _shout(store: ComparedStore, *, several: bool) -> None:
    leakage = store.comparison.leakage
    if not leakage.is_much:
        return
    where = f"the datastore {visible(store.name)}" if several else "the datastore"
    console.messages.print(
        Panel(
            Text(
                f"warning: much of this text stands in {where} ({leakage.share(13):.0%} of its 13-token sequences); "
                "the figures say little about new text. Test on other text, or leave documents out with --exclude-document."
            ),
            style="bold red",
        )
    )
