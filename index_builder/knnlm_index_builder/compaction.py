"""Compaction: a store without its removed documents, physically; or with its index trained and filled anew.

New shards, a new document table and a new index are written beside the old ones, then the manifest is swapped, then the
old files are deleted. Keys are those that were stored, so no model is needed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import knnlm
from knnlm.arrays import write_array
from knnlm.datastore.audit import log_operation
from knnlm.datastore.documents import DocumentTable
from knnlm.datastore.files import file_facts, made_aside, new_file
from knnlm.datastore.manifest import Counts, Manifest, RemovedFacts, ShardFacts
from knnlm.datastore.reader import SPANS, TOKENS, VALUES, Datastore, ShardedRows, check_files
from knnlm.errors import InvalidInput, StoreError
from knnlm.index import read_index_facts
from knnlm_index_builder.encode import ShardReceipt, plan_shards, read_receipt, write_receipt
from knnlm_index_builder.index_stage import IndexStage, auto_again
from knnlm_index_builder.ingest import DOCUMENTS
from knnlm_index_builder.key_file import PIECE_ROWS, KeyFile
from knnlm_index_builder.machine import require_free
from knnlm_index_builder.progress import Meter, Progress
from knnlm_index_builder.search_stage import choose_search
from knnlm_index_builder.settings import Resources
from knnlm_index_builder.site import SETTINGS, Site, held, next_name, now, shard_files

IntArray = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class CompactionResult:
    """``manifest`` of the store; what is gone for good; ``warnings`` for whoever ran it."""

    manifest: Manifest
    documents: int
    entries: int
    bytes_freed: int
    warnings: tuple[str, ...] = ()


def compact(store: Path, progress: Progress, resources: Resources, index: str | None = None) -> CompactionResult:
    """Rewrite the store at ``store`` without what was removed.

    ``index``: train and fill this index (``auto``, ``exact``, or a FAISS factory string) anew, even if nothing was removed.
    Killed anywhere, the same call goes on. Raises :class:`StoreError` for a store whose every document is removed, or
    that holds an unfinished build or append.
    """
    with held(store):
        opened = Datastore.open(store)
        base = opened.manifest
        site = Site(store, base)
        plan = _plan(base, index)
        begun = site.begun()
        if begun is not None and begun["operation"] == "compact" and begun != plan:
            # It was of the store before a further removal, or of another index, and it is made of the store alone.
            site.clean_up(base)
        if base.removed is None and (index is None or _is_done(site, index)):
            if site.begun() is None:
                site.clean_up(base)
            return CompactionResult(base, 0, 0, 0)
        if not base.live_entries:
            raise StoreError(f"Every entry of {store} is removed; there is nothing to keep, so delete the folder instead.")
        compaction = _Compaction(opened, site, progress, resources, index)
        site.claim(plan)
        return compaction.run()


def _is_done(site: Site, index: str) -> bool:
    """Whether an earlier call was killed when it had made this index, and nothing was changed since."""
    plan = site.committed()
    return plan is not None and (plan["operation"], plan["index"]) == ("compact", index)


def _plan(base: Manifest, index: str | None) -> dict[str, Any]:
    removed = asdict(base.removed) if base.removed else None
    return {"operation": "compact", "documents": base.documents, "removed": removed, "index": index}


class _Compaction:
    """One run; what can't be done is refused while it is made, before anything is written."""

    def __init__(self, opened: Datastore, site: Site, progress: Progress, resources: Resources, asked: str | None) -> None:
        self._opened, self._base, self._site = opened, opened.manifest, site
        self._progress, self._resources = progress, resources
        self._kept = np.delete(np.arange(len(opened.documents)), opened.tombstones.documents)
        self._built: dict[str, Any] = json.loads((site.store / SETTINGS).read_bytes())
        self._index = self._index_stage(asked)
        if site.begun() is None:
            needed = opened.size_bytes() * self._base.live_entries // self._base.counts.entries
            require_free(site.store, needed, "the compacted store")

    def run(self) -> CompactionResult:
        """Rewrite, index, measure, commit."""
        base, store, index = self._base, self._site.store, self._index
        table = self._site.scratch / DOCUMENTS
        self._opened.documents.write_rows(self._kept, table)
        documents = DocumentTable([table])
        first = 1 + max(int(shard.name) for shard in base.shards)
        planned = plan_shards(documents, base.windowing, self._built["shard_tokens"], names=first)
        counts = Counts(len(documents), int(documents.token_counts.sum()), sum(facts.entries for facts in planned))
        receipts = self._rewrite(documents, planned, counts.entries)
        if base.key.stored:
            index.build(receipts)
        else:
            index.rebuild_without_keys(self._kept_entries(), store / base.index)
        segment = f"documents/{next_name(base.documents[-1])}.arrow"
        self._site.place(table, segment)
        files = {SETTINGS: base.files[SETTINGS], segment: file_facts(store / segment), **shard_files(receipts, store), **index.files()}
        gone = base.removed or RemovedFacts("", 0, 0)
        audit = log_operation(store, base, "compact", documents=gone.documents, entries=gone.entries, index=index.factory)
        manifest = replace(
            base, knnlm_version=knnlm.__version__, created=now(), counts=counts, shards=[receipt.facts for receipt in receipts],
            documents=[segment], index=index.name, search=None, removed=None, audit=audit, files=files,
        )  # fmt: skip
        manifest = choose_search(self._site, manifest, index, self._progress)
        check_files(store, manifest, verify=False)
        self._site.commit(manifest)
        freed = self._opened.size_bytes() - sum(file.bytes for file in manifest.files.values())
        return CompactionResult(manifest, gone.documents, gone.entries, freed, tuple(index.warnings))

    def _index_stage(self, asked: str | None) -> IndexStage:
        """The index asked for now, else one as there is; codes without keys stay as they are."""
        base = self._base
        if asked is not None and not base.key.stored:
            raise InvalidInput("index", "can't be trained anew, since the datastore keeps no keys; leave it out, or build all text again.")
        stage = IndexStage(
            self._site, asked or self._present_kind(), base.key.dimension, base.live_entries, self._resources, self._progress,
            keys_stored=base.key.stored, part_entries=self._built["shard_tokens"],
        )  # fmt: skip
        if base.key.stored:
            stage.require_possible()
        return stage

    def _present_kind(self) -> str:
        """The factory of the index as it is; where ``auto`` chose it, what that chooses for the entries that are left."""
        facts = read_index_facts(self._site.store / self._base.index)
        as_asked = facts.factory == self._built["index"] or not self._base.key.stored
        return facts.factory if as_asked else auto_again(facts, self._base.live_entries) or facts.factory

    def _rewrite(self, documents: DocumentTable, planned: list[ShardFacts], entries: int) -> list[ShardReceipt]:
        """The shards that a build of the remaining documents would make, from the rows that are stored."""
        meter = Meter(self._progress, "rewriting", entries)
        receipts = []
        for facts in planned:
            folder = self._site.store / "shards" / facts.name
            receipts.append(read_receipt(folder) or self._shard(documents, facts, folder))
            meter.advance(facts.entries)
        return receipts

    def _shard(self, documents: DocumentTable, facts: ShardFacts, folder: Path) -> ShardReceipt:
        opened, key = self._opened, self._base.key
        token_rows, entry_rows = self._old_rows(documents, facts)
        with made_aside(folder) as aside:
            _save(aside / TOKENS, opened.tokens, token_rows)
            _save(aside / VALUES, opened.values, entry_rows)
            if opened.spans is not None:
                _save(aside / SPANS, opened.spans, token_rows)
            if opened.keys is not None:
                with KeyFile.create(aside, key.dtype, facts.entries, key.dimension) as keys:
                    rows = torch.from_numpy(entry_rows)
                    for start, part in zip(range(0, facts.entries, PIECE_ROWS), rows.split(PIECE_ROWS), strict=True):
                        keys.write(start, opened.keys.gather(part).float())
            return write_receipt(aside, facts, key.dtype, batch_tokens=0, dtype=self._base.model.dtype, device="stored")

    def _old_rows(self, documents: DocumentTable, facts: ShardFacts) -> tuple[IntArray, IntArray]:
        """Where the tokens and the entries of a new shard stand in the old store."""
        tokens = np.arange(facts.token_start, facts.token_start + facts.tokens)
        number = np.searchsorted(documents.token_starts, tokens, side="right") - 1
        within = tokens - documents.token_starts[number]
        old = self._kept[number]
        rows = self._opened.documents.token_starts[old] + within
        return rows, (rows - old - 1)[within > 0]

    def _kept_entries(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        kept = np.ones(self._base.counts.entries, dtype=bool)
        for start, stop in self._opened.documents.entry_ranges(self._opened.tombstones.documents):
            kept[start:stop] = False
        return kept


def _save(path: Path, stored: ShardedRows, rows: IntArray) -> None:
    with new_file(path) as file:
        write_array(file, stored.gather(torch.from_numpy(rows)).numpy())
