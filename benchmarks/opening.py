"""How long it takes to open a store of ten million entries with its index, from the disk and from memory."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.processes import environment
from benchmarks.reports import print_table, say
from benchmarks.session import Session
from knnlm import console
from knnlm.datastore.reader import Datastore
from knnlm.datastore.search_file import search_settings
from knnlm.index import import_faiss, open_index
from knnlm.retrieval import Retriever
from knnlm_index_builder.pipeline import build_datastore
from knnlm_index_builder.settings import BuildSettings, Resources
from tests.fake_model import FakeModel
from tests.tiny import VOCABULARY

ENTRIES, DOCUMENT_TOKENS = 10_000_000, 101
BATCH_TOKENS = 262_144
K = 64
STORE, INDEX, SEARCH = "store", "index", "first search"
CONDITIONS = ("read from the disk", "in memory")


def run(session: Session) -> None:
    """Seconds in fresh processes, after their imports: with all files of the store out of the page cache, then in it."""
    store = session.folder / "ten-million"
    _build(store, session.options.entries or ENTRIES)
    seconds: dict[str, dict[str, list[float]]] = {condition: {STORE: [], INDEX: [], SEARCH: []} for condition in CONDITIONS}
    for _ in range(session.options.rounds):
        for condition in CONDITIONS:
            if condition == CONDITIONS[0]:
                _forget(store)
            for part, value in _opened(store).items():
                seconds[condition][part].append(value)
    opened = Datastore.open(store)
    index = open_index(store / opened.manifest.index, opened.keys, len(opened))
    medians = {name: {part: statistics.median(values) for part, values in parts.items()} for name, parts in seconds.items()}
    size, documents = console.size(opened.size_bytes()), len(opened.documents)
    print_table(
        f"opening {len(opened):,} entries of {documents:,} documents, {index.description}, {size}; s",
        ["", STORE, INDEX, "both (asked: < 1)", SEARCH],
        [[name, parts[STORE], parts[INDEX], parts[STORE] + parts[INDEX], parts[SEARCH]] for name, parts in medians.items()],
    )


def _build(store: Path, entries: int) -> None:
    """A store of random token arrays, made by the builder with narrow keys that no torch module computes."""
    documents = -(-entries // (DOCUMENT_TOKENS - 1))
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (documents, DOCUMENT_TOKENS), np.int32)
    text = store.with_name("tokens.npy")
    np.save(text, tokens)
    say(f"making up {documents * (DOCUMENT_TOKENS - 1):,} entries")
    with console.progress() as reporter:
        build_datastore([text], store, FakeModel(), BuildSettings(), reporter, Resources(batch_tokens=BATCH_TOKENS))


def _forget(store: Path) -> None:
    """Have the kernel drop what it keeps in memory of the store's files."""
    os.sync()
    for path in store.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _opened(store: Path) -> dict[str, float]:
    """What :func:`main` measures in a process of its own."""
    line = [sys.executable, "-m", "benchmarks.opening", str(store)]
    result: dict[str, float] = json.loads(subprocess.run(line, check=True, capture_output=True, text=True, env=environment()).stdout)
    return result


def main() -> None:
    """Open the store that the command line names, as every command does that searches; print seconds as JSON."""
    import_faiss()
    path = Path(sys.argv[1])
    moments = [time.perf_counter()]
    store = Datastore.open(path)
    moments.append(time.perf_counter())
    index = open_index(path / store.manifest.index, store.keys, len(store))
    retriever = Retriever(index, store.keys, store.values, search_settings(store, index), store.allowed)
    moments.append(time.perf_counter())
    query = torch.randn(1, store.manifest.key.dimension, generator=torch.Generator().manual_seed(0))
    assert bool(retriever.retrieve(query, K).found.any())
    moments.append(time.perf_counter())
    sys.stdout.write(json.dumps(dict(zip((STORE, INDEX, SEARCH), np.diff(moments).tolist(), strict=True))))


if __name__ == "__main__":
    main()
