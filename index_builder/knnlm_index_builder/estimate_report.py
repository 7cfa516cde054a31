"""What ``knnlm build --estimate`` prints: a table and a verdict, or JSON."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from knnlm import console
from knnlm.console import size
from knnlm.corpus import Corpus
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.reader import check_files
from knnlm.inputs.left_out import say_left_out
from knnlm.model import LanguageModel
from knnlm_index_builder.estimate import Estimate, estimate_build
from knnlm_index_builder.pipeline import require_same_kind, settings_of
from knnlm_index_builder.settings import BuildSettings, Resources

Rows = list[tuple[str, str]]


def run_estimate(
    corpus: Corpus, store: Path, model: LanguageModel, settings: BuildSettings, resources: Resources,
    *, workers: int, append: bool, as_json: bool,
) -> int:  # fmt: skip
    """Estimate and print; see :func:`show_estimate`. For an append the settings are those of ``store``."""
    base = Manifest.read(store) if append else None
    if base is not None:
        check_files(store, base, verify=False)
        require_same_kind(corpus, store, base)
        settings = settings_of(store, base)
    with console.progress() as reporter:
        estimate = estimate_build(corpus, store, model, settings, reporter, resources, workers=workers, base=base)
    say_left_out(corpus)
    return show_estimate(estimate, as_json=as_json)


def show_estimate(estimate: Estimate, *, as_json: bool) -> int:
    """Print it; the exit status is 0 if it fits, else 1."""
    if as_json:
        console.print_json(as_facts(estimate))
    else:
        rows = [*_content_rows(estimate), *_disk_rows(estimate), *_memory_rows(estimate), *_time_rows(estimate)]
        console.out.print(console.table("estimate", ("what", "how much"), rows, right=False))
        for problem in estimate.problems:
            console.out.print(f"does not fit: {problem}", soft_wrap=True, markup=False)
        if estimate.fits:
            console.out.print("fits")
    return 0 if estimate.fits else 1


def as_facts(estimate: Estimate) -> dict[str, Any]:
    """The estimate as JSON; docs/building.md says what the fields mean."""
    said = asdict(estimate)
    said["corpus"]["entries"] = estimate.corpus.entries
    said["seconds"]["total"] = estimate.seconds.total
    return {"fits": estimate.fits, **said}


def _content_rows(estimate: Estimate) -> Rows:
    corpus, index = estimate.corpus, estimate.index
    counted = "counted" if corpus.exact else f"told from a sample of {console.counted(corpus.sampled_documents, 'document')}"
    about = "" if corpus.exact else "about "
    rows = [
        ("documents", f"{about}{corpus.documents:,} ({counted})" + (f", {corpus.empty:,} without a token" if corpus.empty else "")),
        ("tokens", f"{about}{corpus.tokens:,}"),
        ("entries", f"{about}{corpus.entries:,}, in {console.counted(estimate.shards, 'shard')}"),
    ]
    if estimate.entries != corpus.entries:
        rows.append(("entries of the store", f"{about}{estimate.entries:,}"))
    trained = f", trained on {index.training_points:,} keys" if index.training_points else ""
    rows.append(("index", f"{index.factory}, {index.entry_bytes} bytes an entry{trained}"))
    return rows


def _disk_rows(estimate: Estimate) -> Rows:
    disk = estimate.disk
    keys = "not stored" if estimate.keys == "none" else f"{size(disk.keys)} ({estimate.keys}, width {estimate.dimension})"
    return [
        ("disk: keys", keys),
        ("disk: tokens and documents", size(disk.tokens + disk.documents)),
        ("disk: index", size(disk.index)),
        ("disk: the store grows by", size(disk.store)),
        ("disk: needed meanwhile", f"{size(disk.peak)} of {size(disk.free)} that are free"),
    ]


def _memory_rows(estimate: Estimate) -> Rows:
    memory = estimate.memory
    index = f"at most {size(max(memory.training, memory.filling))} beside the model; {size(memory.allowed)} allowed"
    rows = [
        ("memory: encoding", f"{size(memory.encoding)} ({size(memory.process)} a process)"),
        ("memory: training and filling", index),
        ("memory: at the peak", f"{size(memory.peak)} of {size(memory.total)}"),
    ]
    if memory.device_peak is not None and memory.device_total is not None:
        rows.append(("memory: GPU", f"{size(memory.device_peak)} of {size(memory.device_total)}"))
    return rows


def _time_rows(estimate: Estimate) -> Rows:
    seconds = estimate.seconds
    return [
        ("time: reading", _duration(seconds.reading)),
        ("time: encoding", f"{_duration(seconds.encoding)} at {seconds.encoding_rate:,.0f} entries/s, measured now"),
        ("time: training, filling", f"{_duration(seconds.training)}, {_duration(seconds.filling)}"),
        ("time: choosing search settings", _duration(seconds.choosing_search)),
        ("time in all", f"about {_duration(seconds.total)}"),
    ]


def _duration(seconds: float) -> str:
    """A time for people: ``42 s``, ``13 min``, ``7.5 h``, ``3.2 days``."""
    for unit, length, most in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds < most * length:
            return f"{seconds / length:.1f} {unit}" if unit == "h" else f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86_400:.1f} days"
