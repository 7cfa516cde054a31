"""The index stage of an operation: which index, from which keys or codes, and what is to be said about it."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnlm.arrays import map_array, write_array
from knnlm.datastore.documents import DocumentTable
from knnlm.datastore.files import FileFacts, file_facts, written_aside
from knnlm.datastore.manifest import ShardFacts
from knnlm.datastore.reader import KEYS, ShardedRows
from knnlm.index import IndexFacts, read_index_facts
from knnlm.inverted_lists import imbalance, list_sizes
from knnlm.model import LanguageModel
from knnlm.search_positions import POSITIONS
from knnlm.windows import Windowing
from knnlm_index_builder.build_index import FILLING, MERGING, TRAINING, IndexBuild, build_index, extend_index
from knnlm_index_builder.encode import ShardReceipt
from knnlm_index_builder.ingest import IngestedCorpus
from knnlm_index_builder.merge_index import filter_part, merge_parts
from knnlm_index_builder.plan_index import IndexPlan, plan_index
from knnlm_index_builder.progress import Meter, Progress
from knnlm_index_builder.sampling import sample_entries, sample_keys, sample_windows
from knnlm_index_builder.settings import Resources
from knnlm_index_builder.site import Site, next_name
from knnlm_index_builder.train_index import choose_factory

IMBALANCE_GROWTH = 1.5


def auto_again(facts: IndexFacts, entries: int) -> str | None:
    """What ``auto`` chooses for ``entries``, if the index with these ``facts`` is what it chose before, on a CPU or a GPU;
    None for another index."""
    trained = facts.entries if facts.trained_entries is None else facts.trained_entries
    for gpu, keys_stored in itertools.product((False, True), (True, False)):
        if facts.factory == choose_factory(trained, facts.dimension, gpu=gpu, keys_stored=keys_stored):
            return choose_factory(entries, facts.dimension, gpu=gpu, keys_stored=keys_stored)
    return None


class IndexStage:
    """The index of the ``entries`` of a store, some of which an index that is there may hold already.

    ``asked``: ``auto``, ``exact`` or a FAISS factory string; with ``extends`` (an append) the base's index goes on instead.
    ``part_entries``: entries of the largest shard. What is made lies in the site's scratch folder until the index folder
    ``name`` is renamed into place; ``warnings`` are sentences for whoever ran the operation.
    """

    def __init__(
        self, site: Site, asked: str, dimension: int, entries: int, resources: Resources, progress: Progress, *,
        keys_stored: bool, part_entries: int, device: str = "cpu", extends: bool = False,
    ) -> None:  # fmt: skip
        base = site.base
        self._site, self._dimension, self._entries = site, dimension, entries
        self._resources, self._progress, self._device = resources, progress, device
        self._asked, self._keys_stored, self._part_entries = asked, keys_stored, part_entries
        self._old = site.store / base.index if base is not None and extends else None
        self.name = f"index/{next_name(base.index if base else None)}"
        if self._old is not None:
            self.factory = read_index_facts(self._old).factory
        else:
            gpu = device != "cpu"
            self.factory = choose_factory(entries, dimension, gpu=gpu, keys_stored=keys_stored) if asked == "auto" else asked
        self.warnings: list[str] = []
        self._build = IndexBuild(site.scratch / "index")

    @property
    def folder(self) -> Path:
        """The index folder in the store."""
        return self._site.store / self.name

    def plan(self) -> IndexPlan:
        """What it will take. Raises :class:`InvalidInput` for an index that can't be built."""
        return plan_index(
            self.factory, self._dimension, self._entries, device=self._device, memory=self._resources.memory,
            keys_stored=self._keys_stored, part_entries=self._part_entries,
        )  # fmt: skip

    def require_possible(self) -> None:
        """Raise :class:`InvalidInput` for an index that can't be built, before the model runs for hours."""
        if self._old is None:
            self.plan()

    def part(self, shard: ShardFacts) -> Path:
        """Where the codes of a shard are made."""
        return self._build.part(shard.name)

    def train_before_encoding(self, corpus: IngestedCorpus, documents: DocumentTable, windowing: Windowing, model: LanguageModel) -> Path:
        """The trained index for keys that will not be stored; they are taken from a sample of windows, encoded for this.

        The sample is kept until the operation ends: search settings are measured with it as well.
        """
        # An append trains nothing, and needs only what search settings are measured with.
        points = self.plan().training_points if self._old is None else POSITIONS
        entries, keys = self._sample_files()
        if not entries.exists():
            sample = sample_windows(documents, windowing, points, corpus.first)
            total = sum(item.window.target_count for _, item in sample)
            meter = Meter(self._progress, "sampling keys", total)
            found = sample_keys(sample, corpus, model, documents, self._resources.batch(model), meter.advance)
            _save(keys, found.numpy()[:points])
            _save(entries, np.fromiter(sample_entries(sample), np.int64, total)[:points])
        if self._old is not None:
            if not self._build.trained.exists():
                self._build.train_as(self._old)
        elif not self._build.is_trained_for(self.plan(), self._dimension, self._entries):
            self._progress.update(TRAINING, 0, points)
            self._build.train(self.plan(), self._dimension, self._entries, np.load(keys), self._device)
        return self._build.trained

    @property
    def has_sample(self) -> bool:
        """Whether :meth:`train_before_encoding` took a sample."""
        return self._sample_files()[0].exists()

    def sampled(self) -> tuple[Tensor, Tensor]:
        """Entries [m] and keys [m, dimension] of that sample."""
        entries, keys = (torch.from_numpy(map_array(path, "c")) for path in self._sample_files())
        return entries, keys

    def build(self, shards: Sequence[ShardReceipt]) -> None:
        """Make the index folder from the keys, or the codes, of new ``shards`` and what the base's index holds."""
        new = [shard.facts for shard in shards]
        if not self._keys_stored:
            self._merge([*([self._old] if self._old else []), *(self.part(facts) for facts in new)])
        else:
            for stage, done, total in self._steps(new):
                self._progress.update(stage, done, total)
        if self._old is not None:
            self._warn_of_size(read_index_facts(self._old))
            self._warn_of_imbalance(self._old)

    def rebuild_without_keys(self, kept: np.ndarray[Any, np.dtype[np.bool_]], old: Path) -> None:
        """Make the index folder from the codes of the ``kept`` entries of the index in ``old``, numbered anew."""
        if self.folder.exists():
            return
        if not self._build.trained.exists():
            self._build.train_as(old)
        self._progress.update(FILLING, 0, self._entries)
        part = self._build.part("kept")
        filter_part(old, kept, part)
        self._merge([part])

    def files(self) -> dict[str, FileFacts]:
        """The index's files as a manifest lists them."""
        return {f"{self.name}/{path.name}": file_facts(path) for path in sorted(self.folder.iterdir())}

    def _steps(self, new: Sequence[ShardFacts]) -> Iterator[tuple[str, int, int]]:
        store, base, scratch = self._site.store, self._site.base, self._build.scratch
        if self._old is not None and base is not None:
            keys = stored_keys(store, [*base.shards, *new])
            return extend_index(self._old, keys, new, self.folder, scratch, self._device)
        return build_index(stored_keys(store, new), self._dimension, new, self.plan(), self.folder, scratch, self._device)

    def _merge(self, parts: Sequence[Path]) -> None:
        if not self.folder.exists():
            self._progress.update(MERGING, 0, self._entries)
            merge_parts(self._build.trained, parts, self.folder)
            self._progress.update(MERGING, self._entries, self._entries)

    def _sample_files(self) -> tuple[Path, Path]:
        folder = self._site.scratch / "sample"
        return folder / "entries.npy", folder / "keys.npy"

    def _warn_of_size(self, old: IndexFacts) -> None:
        """Where ``auto`` would choose another kind of index by now, not only more cells, and there are keys to make it of."""
        better = auto_again(old, self._entries)
        if self._asked != "auto" or not self._keys_stored or better is None or _kind(better) == _kind(old.factory):
            return
        self.warnings.append(
            f"the index {old.factory} was chosen for fewer entries than the {self._entries:,} that there are now, for which {better} is "
            f"better; change over to it with: {self._command('auto')}"
        )

    def _warn_of_imbalance(self, old: Path) -> None:
        if not read_index_facts(old).nlist:
            return
        before, after = imbalance(list_sizes(old)), imbalance(list_sizes(self.folder))
        if after > IMBALANCE_GROWTH * before:
            anew = f"train it anew with: {self._command(self.factory)}"
            self.warnings.append(
                f"the index's cells were trained on other text: their imbalance grew from {before:.2f} to {after:.2f}, so searches take "
                f"longer and may find less; {anew if self._keys_stored else 'no keys are kept, so only a build of all text trains it anew'}"
            )

    def _command(self, index: str) -> str:
        return shlex.join(["knnlm", "compact", str(self._site.store), "--index", index])


def _kind(factory: str) -> str:
    return re.sub(r"IVF\d+", "IVF", factory)


def stored_keys(store: Path, shards: Sequence[ShardFacts]) -> ShardedRows:
    """Keys of shards that lie in ``store``, memory-mapped."""
    arrays = [map_array(store / "shards" / shard.name / KEYS, "c") for shard in shards]
    return ShardedRows(arrays, [shard.entry_start for shard in shards])


def _save(path: Path, array: np.ndarray[Any, Any]) -> None:
    with written_aside(path) as file:
        write_array(file, array)
