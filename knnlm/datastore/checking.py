"""Whether a datastore is whole: every file against its checksum, then what the files say against one another.

Arrays are read in pieces, so memory does not grow with the store. Each problem is one sentence that names the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from knnlm.datastore.files import read_json_with_checksum
from knnlm.datastore.leftovers import leftovers
from knnlm.datastore.locking import being_written
from knnlm.datastore.manifest import BUILD_FOLDER, MANIFEST, RECEIPT, Manifest, ShardFacts
from knnlm.datastore.profile import Profile
from knnlm.datastore.reader import KEYS, SPANS, TOKENS, VALUES, Datastore, damaged_files, removed_serials
from knnlm.datastore.search_file import read_search
from knnlm.errors import StoreDamaged
from knnlm.index import open_index, read_index_facts
from knnlm.index_check import index_problems

PIECE_NUMBERS = 1 << 22

Progress = Callable[[str, int, int], None]
Ints = np.ndarray[Any, np.dtype[Any]]


def store_problems(root: Path, manifest: Manifest, progress: Progress) -> Iterator[str]:
    """A sentence for each problem of the datastore at ``root``, whose manifest was read.

    What the files hold is looked at only where all are as they were written and fit together, since nothing that is
    found elsewhere would mean anything. ``progress`` is told the stage, how much of it is done, and of how much.
    """
    size = sum(facts.bytes for facts in manifest.files.values())
    damage = [*damaged_files(root, manifest, lambda done: progress("reading files (bytes)", done, size)), *_profile_problems(root)]
    yield from damage
    yield from left_overs(root, manifest)
    if damage:
        return
    try:
        store = Datastore.open(root)
    except StoreDamaged as problem:
        yield str(problem)
        return
    structure = [*_shard_problems(store), *_document_problems(store), *_tombstone_problems(store)]
    yield from structure
    yield from _receipt_problems(store)
    yield from _search_problems(store)
    yield from _index_problems(store)
    if not structure:
        yield from _content_problems(store, progress)


def left_overs(root: Path, manifest: Manifest) -> Iterator[str]:
    """A sentence for each file that is no part of the datastore; none while another process is writing it."""
    others, unfinished = leftovers(root, manifest), (root / BUILD_FOLDER).exists()
    if not (others or unfinished) or being_written(root):
        return
    if unfinished:
        what = f"{root / BUILD_FOLDER} is left over from an interrupted command"
        yield f"{what}; run that again, or delete this folder and run: knnlm compact {root}"
        return  # the others may be its shards
    for path in others:
        yield (
            f"{path} is no part of the datastore: it is left over from an interrupted command, and removed text may be in it; "
            f"run: knnlm compact {root}"
        )


def _index_problems(store: Datastore) -> Iterator[str]:
    """A sentence for each problem of the index: it opens, is of the manifest's width, and holds every entry once."""
    folder = store.path / store.manifest.index
    try:
        facts = read_index_facts(folder)
        open_index(folder, store.keys, len(store))
    except StoreDamaged as problem:
        yield str(problem)
        return
    yield from index_problems(folder, len(store))
    if facts.dimension != store.manifest.key.dimension:
        yield f"{folder} holds keys of width {facts.dimension}, but the manifest says {store.manifest.key.dimension}."


def _profile_problems(root: Path) -> Iterator[str]:
    """The profile may change after the build, so the manifest does not list it; it has a checksum of its own."""
    try:
        Profile.read(root)
    except StoreDamaged as damage:
        yield str(damage)


def _shard_problems(store: Datastore) -> Iterator[str]:
    manifest, path = store.manifest, store.path / MANIFEST
    tokens = entries = 0
    for shard in manifest.shards:
        if (shard.token_start, shard.entry_start) != (tokens, entries):
            yield (
                f"{path}: shard {shard.name} begins at token {shard.token_start} and entry {shard.entry_start}, "
                f"but the shards before it end at {tokens} and {entries}."
            )
        starts = store.documents.token_starts
        documents = int(((starts >= shard.token_start) & (starts < shard.token_start + shard.tokens)).sum())
        if shard.entries != shard.tokens - documents:
            said = f"{shard.tokens} tokens, of which {documents} begin a document"
            yield f"{path}: shard {shard.name} has {shard.entries} entries, but {said}."
        tokens, entries = tokens + shard.tokens, entries + shard.entries
    if (tokens, entries) != (manifest.counts.tokens, manifest.counts.entries):
        yield (
            f"{path}: the shards hold {tokens} tokens and {entries} entries, but the counts are "
            f"{manifest.counts.tokens} and {manifest.counts.entries}."
        )


def _document_problems(store: Datastore) -> Iterator[str]:
    table, where = store.documents, ", ".join(str(store.path / name) for name in store.manifest.documents)
    ends = np.concatenate([[0], np.cumsum(table.token_counts)])
    for row in np.flatnonzero((table.token_starts != ends[:-1]) | (table.token_counts < 1))[:1]:
        yield (
            f"{where}: document {table[row].id!r} is {table.token_counts[row]} tokens from {table.token_starts[row]} on, "
            f"but the documents before it end at {ends[row]}."
        )
    serials, following = table.serials, store.manifest.next_serial
    if len(serials) and ((np.diff(serials) <= 0).any() or serials[0] < 0 or serials[-1] >= following):
        yield f"{where}: the serials of the documents do not ascend from 0 to less than {following}, the next one in the manifest."
    live = np.ones(len(table), dtype=bool)
    live[store.tombstones.documents] = False
    for name in table.repeated_ids(live)[:1]:
        yield f"{where}: several documents that are not removed have the id {name!r}."


def _tombstone_problems(store: Datastore) -> Iterator[str]:
    removed, table = store.manifest.removed, store.documents
    if removed is None:
        return
    path, rows = store.path / removed.file, store.tombstones.documents
    unknown = np.setdiff1d(removed_serials(store.path, store.manifest), table.serials)
    if len(unknown):
        yield f"{path}: {len(unknown)} of the removed serials, {unknown[0]} the first, are those of no document."
    entries = int(table.token_counts[rows].sum()) - len(rows)
    if (len(rows), entries) != (removed.documents, removed.entries):
        said = f"{removed.documents} with {removed.entries}"
        yield f"{path} removes {len(rows)} documents with {entries} entries, but the manifest says {said}."


def _receipt_problems(store: Datastore) -> Iterator[str]:
    files = store.manifest.files
    for shard in store.manifest.shards:
        folder = f"shards/{shard.name}/"
        if folder + RECEIPT not in files:
            continue
        said = read_json_with_checksum(store.path / folder / RECEIPT)
        listed = {name.removeprefix(folder): asdict(facts) for name, facts in files.items() if name.startswith(folder)}
        del listed[RECEIPT]
        if said.get("facts") != asdict(shard) or said.get("files") != listed:
            yield f"{store.path / folder / RECEIPT} says other ranges or files of its shard than the manifest."


def _search_problems(store: Datastore) -> Iterator[str]:
    search = store.manifest.search
    if search is None:
        return
    if search not in store.manifest.files:
        yield f"{store.path / MANIFEST}: {search}, the file of search settings, is not among the files."
        return
    try:
        read_search(store.path, store.manifest)
    except StoreDamaged as problem:
        yield str(problem)


def _content_problems(store: Datastore, progress: Progress) -> Iterator[str]:
    """The first problem of each array of each shard."""
    entries, checks = len(store), (_bad_token, _bad_value, _bad_span, _bad_key)
    for shard in store.manifest.shards:
        for check in checks:
            problem = next(check(store, shard), None)
            if problem is not None:
                yield problem
        progress("checking entries", shard.entry_start + shard.entries, entries)


def _bad_token(store: Datastore, shard: ShardFacts) -> Iterator[str]:
    size = store.manifest.model.vocabulary_size
    for start, stop in _pieces(shard.token_start, shard.tokens, 1):
        ids: Ints = store.tokens.slice(start, stop).numpy()
        for place in np.flatnonzero((ids < 0) | (ids >= size))[:1]:
            yield f"{_file(store, shard, TOKENS)}: token {start + place} is {ids[place]}, but the model's are 0 to {size - 1}."


def _bad_value(store: Datastore, shard: ShardFacts) -> Iterator[str]:
    """The value of an entry is the token of its place; first tokens of documents are none."""
    starts = store.documents.token_starts
    for start, stop in _pieces(shard.token_start, shard.tokens, 1):
        before, within = np.searchsorted(starts, [start, stop])
        expected = np.delete(store.tokens.slice(start, stop).numpy(), starts[before:within] - start)
        if not len(expected):
            continue
        entry = start - int(before)
        found: Ints = store.values.slice(entry, entry + len(expected)).numpy()
        for place in np.flatnonzero(found != expected)[:1]:
            yield (
                f"{_file(store, shard, VALUES)}: the value of entry {entry + place} is {found[place]}, "
                f"but its token in {TOKENS} is {expected[place]}."
            )


def _bad_span(store: Datastore, shard: ShardFacts) -> Iterator[str]:
    if store.spans is None:
        return
    table, characters = store.documents, store.documents.character_counts()
    for start, stop in _pieces(shard.token_start, shard.tokens, 2):
        spans = store.spans.slice(start, stop).numpy().astype(np.int64)
        document = np.searchsorted(table.token_starts, np.arange(start, stop), side="right") - 1
        bad = (spans[:, 0] > spans[:, 1]) | (spans[:, 1] > characters[document])
        for place in np.flatnonzero(bad)[:1]:
            first, last = spans[place].tolist()
            length = characters[document[place]]
            yield f"{_file(store, shard, SPANS)}: token {start + place} is characters {first} to {last} of a document of {length}."


def _bad_key(store: Datastore, shard: ShardFacts) -> Iterator[str]:
    if store.keys is None:
        return
    for start, stop in _pieces(shard.entry_start, shard.entries, store.manifest.key.dimension):
        bad = (~torch.isfinite(store.keys.slice(start, stop)).all(1)).nonzero()
        if len(bad):
            yield f"{_file(store, shard, KEYS)}: the key of entry {start + int(bad[0])} is not finite."


def _pieces(start: int, count: int, width: int) -> Iterator[tuple[int, int]]:
    """Rows [start, start + count) of ``width`` numbers in ranges that fit into memory."""
    rows = max(1, PIECE_NUMBERS // width)
    for first in range(start, start + count, rows):
        yield first, min(first + rows, start + count)


def _file(store: Datastore, shard: ShardFacts, name: str) -> Path:
    return store.path / "shards" / shard.name / name
