"""The index stage of an operation: train, fill, merge, measure. Each step leaves a file that a resumed run takes as done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnlm.arrays import map_array
from knnlm.datastore.documents import DocumentTable
from knnlm.datastore.files import FileFacts, file_facts, written_aside
from knnlm.datastore.manifest import ShardFacts
from knnlm.datastore.reader import KEYS, ShardedRows
from knnlm.index import EXACT, read_index_facts
from knnlm.inverted_lists import imbalance, list_sizes
from knnlm.model import LanguageModel
from knnlm.windows import Windowing
from knnlm_index_builder.encode import ShardReceipt
from knnlm_index_builder.fill_index import fill_part, fill_whole
from knnlm_index_builder.ingest import IngestedCorpus
from knnlm_index_builder.key_file import PIECE_ROWS
from knnlm_index_builder.merge_index import filter_part, is_mergeable, merge_parts, trained_of, write_exact
from knnlm_index_builder.plan_index import require_buildable, training_points
from knnlm_index_builder.progress import Meter, Progress
from knnlm_index_builder.sampling import sample_entries, sample_keys, sample_windows
from knnlm_index_builder.settings import Resources
from knnlm_index_builder.site import Site, next_name
from knnlm_index_builder.train_index import choose_factory, gather_sample, train, training_sample

SAMPLE_KEYS, SAMPLE_ENTRIES = "sample-keys.npy", "sample-entries.npy"
IMBALANCE_GROWTH = 1.5


class IndexStage:
    """The index of the ``entries`` of a store, some of which an index of its may hold already.

    ``asked``: ``auto``, ``exact`` or a FAISS factory string; with ``extends`` the base's index goes on instead. What is made
    lies in the site's scratch folder until the index folder ``name`` is renamed into place; ``warnings`` are sentences for
    whoever ran the operation.
    """

    def __init__(
        self, site: Site, asked: str, dimension: int, entries: int, resources: Resources, progress: Progress, *,
        keys_stored: bool, device: str = "cpu", extends: bool = False,
    ) -> None:  # fmt: skip
        base = site.base
        self._site, self._dimension, self._entries = site, dimension, entries
        self._resources, self._progress, self._device, self._keys_stored = resources, progress, device, keys_stored
        self._old = site.store / base.index if base is not None and extends else None
        self.name = f"index/{self._next()}"
        if self._old is not None:
            self.factory = read_index_facts(self._old).factory
        else:
            gpu = device != "cpu"
            self.factory = choose_factory(entries, dimension, gpu=gpu, keys_stored=keys_stored) if asked == "auto" else asked
        self.warnings: list[str] = []
        self._scratch = site.scratch / "index"
        self._trained = self._scratch / "trained"

    @property
    def folder(self) -> Path:
        """The index folder in the store."""
        return self._site.store / self.name

    def require_possible(self) -> None:
        """Raise :class:`InvalidInput` for an index that can't be built, before the model runs for hours."""
        if self._old is None:
            require_buildable(
                self.factory, self._dimension, self._entries, device=self._device, memory=self._resources.memory,
                keys_stored=self._keys_stored,
            )  # fmt: skip

    def part(self, shard: ShardFacts) -> Path:
        """Where the codes of a shard are made."""
        return self._scratch / "parts" / f"{shard.name}.lists"

    def train_before_encoding(self, corpus: IngestedCorpus, documents: DocumentTable, windowing: Windowing, model: LanguageModel) -> Path:
        """The trained index for keys that will not be stored; they are taken from a sample of windows, encoded for this.

        The sample is kept until the operation ends: search settings are measured with it as well.
        """
        entries = self._scratch / SAMPLE_ENTRIES
        if not entries.exists():
            points = training_points(self.factory, self._entries, self._dimension, self._resources.memory)
            sample = sample_windows(documents, windowing, points, corpus.first)
            total = sum(item.window.target_count for _, item in sample)
            meter = Meter(self._progress, "sampling keys", total)
            keys = sample_keys(sample, corpus, model, documents, self._resources.batch(model), meter.advance)
            _save(self._scratch / SAMPLE_KEYS, keys.numpy())
            _save(entries, np.fromiter(sample_entries(sample), np.int64, total))
        self._train(lambda: np.array(map_array(self._scratch / SAMPLE_KEYS, "r")))
        return self._trained

    def sampled(self) -> tuple[Tensor, Tensor]:
        """Entries [m] and keys [m, dimension] of that sample."""
        return tuple(torch.from_numpy(map_array(self._scratch / name, "c")) for name in (SAMPLE_ENTRIES, SAMPLE_KEYS))  # type: ignore[return-value]

    def build(self, shards: Sequence[ShardReceipt]) -> None:
        """Make the index folder from the keys, or the codes, of new ``shards`` and what the base's index holds."""
        if self.folder.exists():
            return
        if self.factory == EXACT:
            write_exact(self.folder, self._dimension, self._entries)
            return
        base = self._site.base
        earlier = base.shards if base is not None and self._old is not None else []
        new = [shard.facts for shard in shards]
        keys = stored_keys(self._site.store, [*earlier, *new]) if self._keys_stored else None
        if keys is not None:
            points = training_points(self.factory, self._entries, self._dimension, self._resources.memory)
            self._train(lambda: gather_sample(keys, training_sample(len(keys), points), self._dimension))
        if is_mergeable(self._trained):
            if keys is not None:
                self._fill_parts(new)
            self._merge([*([self._old] if self._old else []), *(self.part(facts) for facts in new)])
        else:
            self._fill_whole(new)

    def rebuild_without_keys(self, kept: np.ndarray[Any, np.dtype[np.bool_]], old: Path) -> None:
        """Make the index folder from the codes of the ``kept`` entries of the index in ``old``, numbered anew."""
        if self.folder.exists():
            return
        if not self._trained.exists():
            trained_of(old, self._trained)
        self._progress.update("filling the index", 0, self._entries)
        part = self._scratch / "kept.lists"
        filter_part(old, kept, part)
        self._merge([part])

    def files(self) -> dict[str, FileFacts]:
        """The index's files as a manifest lists them."""
        return {f"{self.name}/{path.name}": file_facts(path) for path in sorted(self.folder.iterdir())}

    def _next(self) -> str:
        return next_name(self._site.base.index if self._site.base else None)

    def _train(self, sample: Callable[[], np.ndarray[Any, np.dtype[np.float32]]]) -> None:
        if self._trained.exists():
            return
        if self._old is not None:
            trained_of(self._old, self._trained)
            return
        rows = sample()
        self._progress.update("training the index", 0, len(rows))
        train(self.factory, self._dimension, rows, self._entries, self._trained, self._device)
        self._progress.update("training the index", len(rows), len(rows))

    def _fill_parts(self, shards: Sequence[ShardFacts]) -> None:
        meter = Meter(self._progress, "filling the index", sum(facts.entries for facts in shards))
        for facts in shards:
            part = self.part(facts)
            if part.exists():
                meter.advance(facts.entries)
            else:
                fill_part(self._trained, pieces_of(self._site.store, [facts]), part, self._device, meter.advance)

    def _merge(self, parts: Sequence[Path]) -> None:
        self._progress.update("merging the index", 0, self._entries)
        merge_parts(self._trained, parts, self.folder)
        self._progress.update("merging the index", self._entries, self._entries)
        if self._old is not None:
            self._warn_of_imbalance(self._old)

    def _fill_whole(self, shards: Sequence[ShardFacts]) -> None:
        meter = Meter(self._progress, "filling the index", sum(facts.entries for facts in shards))
        fill_whole(self._old or self._trained, pieces_of(self._site.store, shards), self.folder, meter.advance)

    def _warn_of_imbalance(self, old: Path) -> None:
        before, after = imbalance(list_sizes(old)), imbalance(list_sizes(self.folder))
        if after > IMBALANCE_GROWTH * before:
            self.warnings.append(
                f"the index's cells were trained on other text: their imbalance grew from {before:.2f} to {after:.2f}, so searches take "
                f"longer and may find less; train it anew with: knnlm compact {self._site.store} --index {self.factory}"
            )


def stored_keys(store: Path, shards: Sequence[ShardFacts]) -> ShardedRows:
    """Keys of shards that lie in ``store``, memory-mapped."""
    arrays = [map_array(store / "shards" / shard.name / KEYS, "c") for shard in shards]
    return ShardedRows(arrays, [shard.entry_start for shard in shards])


def pieces_of(store: Path, shards: Sequence[ShardFacts]) -> Iterator[tuple[int, Tensor]]:
    """Keys of shards in pieces, with the number of each piece's first entry."""
    return stored_keys(store, shards).chunks(PIECE_ROWS)


def _save(path: Path, array: np.ndarray[Any, Any]) -> None:
    with written_aside(path) as file:
        np.save(file, array)
