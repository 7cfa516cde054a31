"""Peak memory of real builds at 1x and 10x text: while they encode, and while they train and fill the index within a limit."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.processes import ENDING, Watched, command, watch
from benchmarks.reports import print_table, say
from benchmarks.session import Session
from knnlm.byte_sizes import parse_bytes
from knnlm.console import size
from knnlm.datastore.manifest import Manifest
from knnlm_index_builder.build_index import FILLING, MERGING, TRAINING
from knnlm_index_builder.plan_index import plan_index
from knnlm_index_builder.settings import BuildSettings
from tests.tiny import HIDDEN, save, tiny_corpus, tiny_gpt2, tiny_tokenizer

DOCUMENTS = 4_000
TIMES = (1, 10)
INDEX, ALLOWED = "IVF6144,SQ8", "256MiB"
READING, ENCODING, TUNING = "reading bytes", "encoding", "choosing search settings"
PART = BuildSettings().shard_tokens
STAGES = (READING, ENCODING, TRAINING, FILLING, MERGING, TUNING, ENDING)


def run(session: Session) -> None:
    """A table of peaks by stage, and how they grow with the text."""
    folder = session.folder / "memory"
    model = save(tiny_gpt2(), tiny_tokenizer(), folder / "model")
    watched, entries = list[Watched](), list[int]()
    for times in TIMES:
        say(f"building {times}x text")
        text, store = folder / f"{times}x.jsonl", folder / f"store-{times}x"
        _write(text, times * DOCUMENTS)
        watched.append(watch(command("build", text, "--model", model, "--store", store, "--index", INDEX, "--memory", ALLOWED)))
        entries.append(Manifest.read(store).counts.entries)
    _print(watched, entries)


def _write(path: Path, documents: int) -> None:
    """Documents that repeat the same thousand stories under ids of their own."""
    stories = tiny_corpus(1000)
    with path.open("w") as file:
        for number in range(documents):
            file.write(json.dumps({"id": f"story-{number:07}", "text": stories[number % len(stories)]}) + "\n")


def _print(watched: list[Watched], entries: list[int]) -> None:
    def row(name: str, sizes: list[int]) -> list[float | str]:
        return [name, *map(size, sizes), f"{sizes[1] / sizes[0] - 1:+.1%}"]

    print_table(
        f"memory of knnlm build --index {INDEX} --memory {ALLOWED}; anonymous unless said",
        ["peak", *(f"{times}x, {count:,} entries" for times, count in zip(TIMES, entries, strict=True)), "growth"],
        [
            *(row(stage, [item.peak(stage) for item in watched]) for stage in STAGES),
            row("reading and encoding (asked: < 10 %)", [item.peak(READING, ENCODING) for item in watched]),
            row("whole build", [item.peak() for item in watched]),
            row("whole build, with pages of mapped files", [item.peak_resident for item in watched]),
        ],
    )
    allowed = parse_bytes("memory", ALLOWED)
    for item, count in zip(watched, entries, strict=True):
        plan, free = (plan_index(INDEX, HIDDEN, count, memory=most, part_entries=PART) for most in (allowed, None))
        taken = item.peak(TRAINING, FILLING, MERGING) - item.last(ENCODING)
        say(
            f"{count:,} entries, {item.seconds:.0f} s: training, filling and merging took {size(taken)} more than was held before; allowed "
            f"{size(allowed)}, foreseen {size(max(plan.training_bytes, plan.filling_bytes))}; trained on {plan.training_points:,} keys "
            f"(without the limit {free.training_points:,}, {size(free.training_bytes)})"
        )
