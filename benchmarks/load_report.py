"""What is printed about a server under load: latencies, how requests ended, what the server held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.reports import print_table
from benchmarks.server_process import Holdings
from benchmarks.streams import OK
from benchmarks.traffic import Ended, Kind
from benchmarks.verdicts import rejected
from knnlm.console import size

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Phase:
    """A load and what was seen: ``rate`` of arrivals a second (None: as fast as clients were answered); ``holdings`` of
    the server after it (None: it had ended), and what it still had to do."""

    name: str
    rate: float | None
    seconds: float
    ends: Sequence[Ended]
    holdings: Holdings | None
    left: dict[str, float]


def print_latencies(phases: Sequence[Phase]) -> None:
    """Percentiles of the time to the first token and between tokens, of whole requests that were answered."""
    rows = []
    for phase in phases:
        whole = [end.answer for end in phase.ends if end.wanted.kind is Kind.WHOLE and end.answer.code == OK]
        tokens = sum(len(end.answer.ids) for end in phase.ends)
        rows.append(
            [
                phase.name,
                "" if phase.rate is None else f"{phase.rate:.2f}",
                f"{len(phase.ends) / phase.seconds:.2f}",
                f"{tokens / phase.seconds:,.0f}",
                str(sum(map(rejected, phase.ends))),
                _percentiles([answer.first for answer in whole]),
                _percentiles([gap for answer in whole for gap in answer.gaps]),
            ]
        )
    names = "/".join(f"p{percentile}" for percentile in PERCENTILES)
    columns = ["phase", "arrivals/s", "ended/s", "tokens/s", "rejected", f"first token, ms: {names}", f"between tokens, ms: {names}"]
    print_table("whole requests under load", columns, rows)


def print_ends(phases: Sequence[Phase]) -> None:
    """How many requests of each kind ended with each status."""
    rows = []
    for phase in phases:
        counts = Counter((end.wanted.kind.value, end.answer.code, end.answer.reason) for end in phase.ends)
        rows += [[phase.name, kind, f"{code} {reason}".strip(), str(count)] for (kind, code, reason), count in sorted(counts.items())]
    print_table("how requests ended", ["phase", "kind", "status", "requests"], rows)


def print_holdings(phases: Sequence[Phase]) -> None:
    """What the server held after each phase, when nobody asked for anything."""
    rows = [
        [phase.name, size(held.resident), size(held.anonymous), str(held.files), str(held.threads), str(phase.left or "nothing")]
        for phase in phases
        if (held := phase.holdings) is not None
    ]
    print_table("what the server held after each", ["phase", "resident", "anonymous", "open files", "threads", "left to do"], rows)


def _percentiles(seconds: Sequence[float]) -> str:
    if not seconds:
        return "none"
    return " / ".join(f"{value * 1000:,.0f}" for value in np.percentile(seconds, PERCENTILES))
