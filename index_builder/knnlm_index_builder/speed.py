"""How fast this machine is: the model over windows of the corpus, FAISS over random numbers. A few seconds each at most."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from knnlm.datastore.documents import DocumentTable
from knnlm.index import import_faiss
from knnlm.model import LanguageModel
from knnlm.windows import PlacedWindow, Windowing, length_batches
from knnlm_index_builder.encode import encode, plan_shards, shard_windows
from knnlm_index_builder.ingest import DOCUMENTS, IngestedCorpus
from knnlm_index_builder.train_index import SEED, steady_faiss

SECONDS, ROUNDS, MOST_BATCHES, MOST_SHARDS = 4.0, 3, 60, 6
QUERIES, MOST_CELLS = 4096, 4096


def encoding_rate(
    model: LanguageModel, folder: Path, windowing: Windowing, key_dtype: str, *, batch_tokens: int, shard_tokens: int, threads: int
) -> float:
    """Entries that one process with so many ``threads`` encodes in a second; ``folder`` holds a tokenised sample of the corpus.

    Batches are drawn from shards of the sample, cut as a build would cut them, and go through what a build does with
    them. The median of three rounds over different batches. Raises :class:`KeyOverflow` and :class:`NonFiniteKey`.
    """
    documents, corpus = DocumentTable([folder / DOCUMENTS]), IngestedCorpus(folder, 0, pretokenized=True)
    batches = _batches(documents, windowing, shard_tokens, batch_tokens)
    drawn = np.random.default_rng(SEED).permutation(len(batches))[:MOST_BATCHES].tolist()
    rounds: list[list[tuple[int, float]]] = [[] for _ in range(ROUNDS)]

    def seconds(number: int) -> float:
        started = time.perf_counter()
        for _ in encode(iter(batches[number]), corpus, model, documents, key_dtype, batch_tokens):
            pass
        return time.perf_counter() - started

    with _torch_threads(threads):
        first = seconds(drawn[0])
        left = SECONDS
        for turn, number in enumerate(drawn):
            # A first pass is slower than all others, but where it took long already, it has to do.
            took = first if first > SECONDS else seconds(number)
            rounds[turn % ROUNDS].append((sum(item.window.target_count for item in batches[number]), took))
            left -= took
            if left < 0:
                break
    return statistics.median(sum(n for n, _ in times) / sum(s for _, s in times) for times in rounds if times)


def _batches(documents: DocumentTable, windowing: Windowing, shard_tokens: int, batch_tokens: int) -> list[list[PlacedWindow]]:
    shards = plan_shards(documents, windowing, shard_tokens)
    chosen = shards[:: -(-len(shards) // MOST_SHARDS)]
    return [batch for facts in chosen for batch in length_batches(shard_windows(facts, documents, windowing), batch_tokens)]


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def comparison_rate(width: int, cells: int) -> float:
    """Multiplications and additions a second when FAISS compares vectors of ``width`` with ``cells`` centroids.

    Measured on random numbers, on the CPU, as cells are trained and filled; the median of three rounds.
    """
    faiss = import_faiss()
    chance = np.random.default_rng(SEED)
    cells = max(1, min(cells, MOST_CELLS))
    index = faiss.IndexFlatL2(width)
    index.add(chance.standard_normal((cells, width), dtype=np.float32))
    queries = chance.standard_normal((QUERIES, width), dtype=np.float32)
    times = []
    with steady_faiss():
        index.search(queries, 1)
        for _ in range(ROUNDS):
            started = time.perf_counter()
            index.search(queries, 1)
            times.append(time.perf_counter() - started)
    return 2.0 * QUERIES * cells * width / statistics.median(times)
