"""How a diagnosis is shown: a table with what to change, or JSON."""

from __future__ import annotations

from dataclasses import asdict

from knnlm import console
from knnlm.doctor import Diagnosis, Finding

COLUMNS = ("k", "probes", "over-fetch", "recall", "TV", "± s.e.", "95 %", "largest", "nats", "ms alone", "ms of 32", "target")


def show(diagnosis: Diagnosis, *, as_json: bool) -> None:
    """Print ``diagnosis``."""
    if as_json:
        console.print_json(asdict(diagnosis))
        return
    title = f"Against exact search, settings {'as measured' if diagnosis.settings_from == 'measured' else 'by rule'}"
    console.out.print(console.table(title, COLUMNS, [_row(finding, diagnosis.target) for finding in diagnosis.findings]))
    console.out.print(
        f"TV: total variation of the kNN distributions at temperature {diagnosis.temperature:g}, target {diagnosis.target:g}; "
        f"nats: change of the values' cross-entropy; ms: a query, here"
    )
    console.out.print(f"{diagnosis.queries:,} {diagnosis.source}")
    imbalance = "" if diagnosis.imbalance is None else f", imbalance of its cells {diagnosis.imbalance:.2f}"
    console.out.print(
        f"{diagnosis.index}, {diagnosis.entries:,} entries, {diagnosis.index_bytes / max(diagnosis.entries, 1):.0f} bytes each{imbalance}; "
        f"opened in {1000 * diagnosis.open_seconds:.0f} ms"
    )
    threads = diagnosis.threads
    faiss = "not installed" if threads.faiss is None else str(threads.faiss)
    console.out.print(f"threads: torch {threads.torch}, FAISS {faiss}, waiting {threads.wait_policy or 'actively'}; {threads.cores} cores")
    for found in diagnosis.gpu:
        console.out.print(f"GPU against CPU, k={found.k}: {found.same:.2%} of the same neighbours, TV {found.total_variation:.4f}")
    if diagnosis.gpu_note:
        console.out.print(diagnosis.gpu_note)
    if diagnosis.applied:
        console.out.print(f"new settings are in {diagnosis.applied}")
    for change in diagnosis.changes or ["nothing to change"]:
        console.out.print(change, soft_wrap=True)


def _row(finding: Finding, target: float) -> list[str]:
    point = finding.point
    return [
        str(point.k),
        str(point.probes),
        f"{point.overfetch:g}",
        f"{point.recall:.3f}",
        f"{point.total_variation:.4f}",
        f"{point.standard_error:.4f}",
        f"{point.total_variation_p95:.4f}",
        f"{point.total_variation_max:.4f}",
        f"{point.cross_entropy_change:+.4f}",
        f"{finding.milliseconds_alone:.2f}",
        f"{finding.milliseconds_in_batch:.2f}",
        "met" if point.total_variation <= target else "missed",
    ]
