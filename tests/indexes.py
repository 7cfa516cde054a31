"""Indexes of a few made-up keys, built as a build would."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import faiss
import numpy as np
import torch

from knnlm.datastore.manifest import ShardFacts
from knnlm.datastore.reader import ShardedRows
from knnlm_index_builder.build_index import build_index
from knnlm_index_builder.fill_index import fill_part
from knnlm_index_builder.plan_index import plan_index
from knnlm_index_builder.train_index import train

# Filled in parts that are merged, and filled whole.
MERGEABLE = [
    "IVF12,Flat", "IVF12,SQ8", "IVF12,SQfp16", "IVF12,PQ8x8np", "IVF12,RaBitQ", "PCAR8,IVF12,SQ8", "OPQ8_8,IVF12,PQ8x8np",
    "IVF12_HNSW8,RaBitQ", "PCA8,IVF12_HNSW8,SQ8", "IVF900,SQ8", "IMI2x2,PQ8x8np", "IVF12,RQ2x8",
]  # fmt: skip
WHOLE = ["Flat", "SQ8", "PQ8x8np", "HNSW8", "PCAR8,Flat", "IVF12,PQ8x4fs", "LSH", "RaBitQ"]

DIMENSION = 16
ENTRIES = 1500


def clustered(entries: int = ENTRIES, dimension: int = DIMENSION, seed: int = 0) -> np.ndarray:
    """Keys in clusters, some of them several times."""
    chance = np.random.default_rng(seed)
    centres = 3 * chance.normal(size=(20, dimension))
    keys = (centres[chance.integers(0, 20, entries)] + chance.normal(size=(entries, dimension))).astype(np.float32)
    keys[entries // 2 : entries // 2 + 20] = keys[:20]
    return keys


def cuts_of(entries: int) -> list[int]:
    """Where the shards of that many entries begin and the last one ends."""
    return [0, entries // 3, entries] if entries > 2 else [0, entries]


def rows_of(keys: np.ndarray) -> ShardedRows:
    """Keys as the shards of a datastore hold them."""
    cuts = cuts_of(len(keys))
    return ShardedRows([keys[start:end].copy() for start, end in itertools.pairwise(cuts)], cuts[:-1])


def shards_of(entries: int) -> list[ShardFacts]:
    """The shards of :func:`rows_of`."""
    cuts = cuts_of(entries)
    return [ShardFacts(f"{n:05}", s, e - s, s, e - s) for n, (s, e) in enumerate(itertools.pairwise(cuts))]


def built(keys: ShardedRows, factory: str, folder: Path, dimension: int = DIMENSION, device: str = "cpu") -> Path:
    """Build an index within ``folder``; returns its own folder."""
    plan = plan_index(factory, dimension, len(keys))
    made, scratch = folder / "index", folder / "scratch"
    for stage, done, total in build_index(keys, dimension, shards_of(len(keys)), plan, made, scratch, device):
        assert stage
        assert 0 <= done <= total
    assert not scratch.exists()
    return made


def trained(factory: str, folder: Path, sample: np.ndarray | None = None) -> Path:
    """An index that was trained on ``sample`` (None: :func:`clustered`); returns its folder."""
    sample = clustered() if sample is None else sample
    train(factory, sample.shape[1], sample, len(sample), folder)
    return folder


def part(index: Path, keys: np.ndarray, start: int, end: int, path: Path) -> Path:
    """A part with the entries [start, end) of ``keys``; returns its file."""
    fill_part(index, [(start, torch.from_numpy(keys[start:end]))], path)
    return path


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def faiss_threads(count: int) -> Iterator[None]:
    """FAISS with that many threads."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    yield
    faiss.omp_set_num_threads(before)
