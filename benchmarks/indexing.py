"""Indexes over the keys of a real store: what each takes to make and to search, and how far it is from exact search."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.public_index import run as run_public
from benchmarks.reports import print_table, say
from benchmarks.rounds import Timing, interleave, timed
from benchmarks.session import Session
from knnlm.datastore.manifest import ShardFacts
from knnlm.datastore.reader import Datastore, ShardedRows
from knnlm.index import EXACT, ExactIndex, NeighborIndex, open_index
from knnlm.mixture import Mixture
from knnlm.neighbors import Neighbors
from knnlm.retrieval import Retriever
from knnlm.search_measurement import Searched, total_variation
from knnlm.search_positions import Positions, sample_entries, stored_positions, text_positions
from knnlm.search_settings import SearchSettings, SearchTuning
from knnlm.search_tuning import tune
from knnlm_index_builder.build_index import build_index
from knnlm_index_builder.plan_index import plan_index

KS = (64, 1024)
CODES = ("SQ8", "RaBitQ", "PQ64x8np", "PQ32x8np")
HELD_OUT_TOKENS, HELD_OUT_POSITIONS = 16_384, 256
ALONE, TOGETHER = 32, 32
PART_ENTRIES = 262_144


@dataclass(frozen=True)
class Stored:
    """The first entries of a store, and positions at which searches of them are measured: ``tuned_at`` as a build chooses
    its settings, ``tested_at`` of held-out text."""

    keys: ShardedRows
    values: ShardedRows
    dimension: int
    vocabulary_size: int
    tuned_at: Positions
    tested_at: Positions


@dataclass(frozen=True)
class Made:
    """An index with what it took."""

    factory: str
    index: NeighborIndex
    training: Timing
    filling: Timing
    bytes: int
    tuning: SearchTuning


def run(session: Session) -> None:
    """One table of making, one of searching; then the public default against ours."""
    stored = _stored(session)
    folder = session.folder / "indexing"
    cells = round(2 * math.sqrt(len(stored.keys)))
    factories = ["Flat", *(f"IVF{cells},{code}" for code in CODES if _fits(code, stored.dimension)), EXACT]
    made = [_make(factory, stored, folder / str(number)) for number, factory in enumerate(factories)]
    entries = len(stored.keys)
    print_table(
        f"indexing: {entries:,} keys of width {stored.dimension}; s by the clock (CPU-s)",
        ["index", "training", "filling", "bytes/entry"],
        [[item.factory, _seconds(item.training), _seconds(item.filling), item.bytes / entries] for item in made],
    )
    for k in KS:
        _search(made, stored, k, session.options.rounds)
    run_public(stored.keys, stored.dimension, folder / "public", session.options.rounds)


def _fits(code: str, dimension: int) -> bool:
    return not code.startswith("PQ") or dimension % int(code[2:].split("x")[0]) == 0


def _stored(session: Session) -> Stored:
    opened = session.opened
    store, windowing = opened.store, opened.store.manifest.windowing
    entries = min(len(store), session.options.entries or len(store))
    keys, values = _first(store, entries)
    rows = sample_entries(entries, None)
    at = torch.from_numpy(rows)
    tuned_at = stored_positions(rows, keys.gather(at), values.gather(at), store.documents, windowing, entries)
    tuned_at.left_out.clamp_(max=entries)
    held_out = [document.ids for document in session.inputs.held_out(HELD_OUT_TOKENS)]
    tested_at = text_positions(opened.model, held_out, windowing, HELD_OUT_POSITIONS)
    return Stored(keys, values, store.manifest.key.dimension, opened.model.vocabulary_size, tuned_at, tested_at)


def _first(store: Datastore, entries: int) -> tuple[ShardedRows, ShardedRows]:
    """Keys and values of the first ``entries``."""
    assert store.keys is not None
    shards = [shard for shard in store.manifest.shards if shard.entry_start < entries]
    starts, ends = [shard.entry_start for shard in shards], [min(shard.entry_start + shard.entries, entries) for shard in shards]
    keys, values = (
        ShardedRows([rows.slice(start, end).numpy() for start, end in zip(starts, ends, strict=True)], starts)
        for rows in (store.keys, store.values)
    )
    return keys, values


def _make(factory: str, stored: Stored, folder: Path) -> Made:
    """Train, fill and merge as a build does, and choose search settings."""
    entries = len(stored.keys)
    say(f"making {factory}")
    plan = plan_index(factory, stored.dimension, entries)
    starts = range(0, entries, PART_ENTRIES)
    shards = [ShardFacts(f"{n:05d}", 0, 0, start, min(PART_ENTRIES, entries - start)) for n, start in enumerate(starts)]
    steps = build_index(stored.keys, stored.dimension, shards, plan, folder / "index", folder / "scratch")
    # The first two steps are the beginning and the end of training.
    training = timed(lambda: [next(steps, None), next(steps, None)])
    filling = timed(lambda: list(steps))
    index = open_index(folder / "index", stored.keys, entries)
    size = sum(path.stat().st_size for path in (folder / "index").iterdir())
    searched = Searched(index, stored.keys, stored.values, None, size, stored.vocabulary_size)
    return Made(factory, index, training, filling, size, tune(searched, stored.tuned_at, KS))


def _search(made: list[Made], stored: Stored, k: int, rounds: int) -> None:
    """Distributions and times at the settings that were chosen for ``k``."""
    queries = stored.tested_at.queries
    retrievers = {item.factory: Retriever(item.index, stored.keys, stored.values, SearchSettings.tuned(item.tuning)) for item in made}
    alone = {name: partial(_one_by_one, retriever, queries[:ALONE], k) for name, retriever in retrievers.items()}
    together = {name: partial(retriever.retrieve, queries[:TOGETHER], k) for name, retriever in retrievers.items()}
    alone_times, together_times = interleave(alone, rounds), interleave(together, rounds)
    reference = Retriever(ExactIndex(stored.keys), stored.keys, stored.values).retrieve(queries, k)
    rows = []
    for item in made:
        setting = retrievers[item.factory].settings.for_k(k)
        chosen = f"{setting.probes}, {setting.overfetch:g}" if item.tuning.settings else "-"
        coded = Retriever(item.index, None, stored.values, SearchSettings.fixed(item.index.nlist, len(stored.keys), setting.probes, 1.0))
        raw, ranked = (_variation(retriever.retrieve(queries, k), reference) for retriever in (coded, retrievers[item.factory]))
        one, many = alone_times[item.factory], together_times[item.factory]
        rows.append([item.factory, chosen, f"{raw} -> {ranked}", _per_query(one, ALONE), _per_query(many, TOGETHER)])
    print_table(
        f"k={k}: {len(queries)} positions of held-out text; ms a query by the clock (CPU-ms)",
        ["index", "probes, over-fetch", "TV ± s.e., raw -> re-ranked", "alone", f"in {TOGETHER}"],
        rows,
    )


def _variation(found: Neighbors, reference: Neighbors) -> str:
    """Mean total variation with its standard error."""
    variation = total_variation(found, reference, Mixture().temperature)
    return f"{variation.mean():.4f} ± {variation.std() / math.sqrt(len(variation)):.4f}"


def _one_by_one(retriever: Retriever, queries: torch.Tensor, k: int) -> None:
    for query in queries.split(1):
        retriever.retrieve(query, k)


def _seconds(timing: Timing) -> str:
    return f"{timing.wall:.1f} ({timing.cpu:.1f})"


def _per_query(timing: Timing, queries: int) -> str:
    return f"{1000 * timing.wall / queries:.2f} ({1000 * timing.cpu / queries:.2f})"
