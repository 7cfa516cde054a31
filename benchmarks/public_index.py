"""The index that public kNN-LM scripts make by default against ours over the same keys, and over the same threads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reports import print_facts
from benchmarks.rounds import interleave
from knnlm.datastore.manifest import ShardFacts
from knnlm.datastore.reader import ShardedRows
from knnlm.index import import_faiss
from knnlm_index_builder.build_index import build_index
from knnlm_index_builder.plan_index import plan_index

ENTRIES, CELLS, PARTS = 131_072, 1024, 64
ADDED_AT_A_TIME = 1_000_000
OURS, CLASS, FACTORY = f"ours, IVF{CELLS},PQ{PARTS}x8np", f"public, IndexIVFPQ of {CELLS} cells", f"public, IVF{CELLS},PQ{PARTS} by string"


def run(keys: ShardedRows, dimension: int, folder: Path, rounds: int) -> None:
    """Seconds of training and filling together, by the clock and of CPU, and their ratios; asked for: 3."""
    if dimension % PARTS or len(keys) < ENTRIES:
        return
    stored = keys.slice(0, ENTRIES).numpy()
    faiss = import_faiss()
    contestants = {
        OURS: lambda: _ours(stored, dimension, folder),
        CLASS: _public(lambda: faiss.IndexIVFPQ(faiss.IndexFlatL2(dimension), dimension, CELLS, PARTS, 8), stored, folder),
    }
    timings = interleave(contestants, min(rounds, 3), warm_up=False)
    # Polysemous training takes minutes, so it runs once.
    factory = _public(lambda: faiss.index_factory(dimension, f"IVF{CELLS},PQ{PARTS}"), stored, folder)
    timings |= interleave({FACTORY: factory}, 1, warm_up=False)
    ours = timings[OURS]
    print_facts(
        f"training and filling over {ENTRIES:,} keys of width {dimension}",
        {
            **{name: f"{timing.wall:.1f} s ({timing.cpu:.1f} CPU-s)" for name, timing in timings.items()},
            **{
                f"{name}, over ours (asked: 3)": f"{timings[name].wall / ours.wall:.1f} (CPU {timings[name].cpu / ours.cpu:.1f})"
                for name in (CLASS, FACTORY)
            },
        },
    )


def _ours(stored: np.ndarray, dimension: int, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    plan = plan_index(f"IVF{CELLS},PQ{PARTS}x8np", dimension, len(stored))
    shards = [ShardFacts("00000", 0, 0, 0, len(stored))]
    for _ in build_index(ShardedRows([stored], [0]), dimension, shards, plan, folder / "index", folder / "scratch"):
        pass


def _public(new: Callable[[], Any], stored: np.ndarray, folder: Path) -> Callable[[], None]:
    """Train on all keys (up to a million, drawn at random), add them a million at a time, write the file."""
    faiss = import_faiss()

    def make() -> None:
        index = new()
        chance = np.random.default_rng(1)
        index.train(stored[chance.permutation(len(stored))[:ADDED_AT_A_TIME]].astype(np.float32))
        for start in range(0, len(stored), ADDED_AT_A_TIME):
            rows = stored[start : start + ADDED_AT_A_TIME].astype(np.float32)
            index.add_with_ids(rows, np.arange(start, start + len(rows)))
        faiss.write_index(index, str(folder.with_name("public.faiss")))

    return make
