"""Building an index step by step, so that a killed build goes on from the last finished part.

Knows where the unfinished pieces of one index lie; what they are is the work of ``train_index``, ``fill_index`` and
``merge_index``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from knnlm.datastore.manifest import ShardFacts
from knnlm.datastore.reader import ShardedRows
from knnlm.index import EXACT, read_index_facts
from knnlm_index_builder.fill_index import fill_part, fill_whole
from knnlm_index_builder.find_cells import Floats
from knnlm_index_builder.merge_index import is_mergeable, merge_parts, trained_of, write_exact
from knnlm_index_builder.plan_index import IndexPlan
from knnlm_index_builder.train_index import gather_sample, train, training_sample

TRAINING, FILLING, MERGING = "training the index", "filling the index", "merging the index"


class IndexBuild:
    """The pieces of an index that is being built in ``scratch``: a trained index and parts, each whole or absent.

    Any process may ask for any of them. A scratch folder belongs to one plan; :meth:`train` empties one that does not.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.trained = scratch / "trained"

    def part(self, name: str) -> Path:
        """The file of the part ``name``; there once it is finished."""
        return self.scratch / "parts" / f"{name}.lists"

    def train(self, plan: IndexPlan, dimension: int, entries: int, sample: Floats, device: str = "cpu") -> None:
        """Train on ``sample``, drawn out of ``entries``; see :func:`~knnlm_index_builder.train_index.train`."""
        train(plan.factory, dimension, sample, entries, self._emptied(), device)

    def train_as(self, folder: Path) -> None:
        """Take over the training of the index in ``folder``."""
        trained_of(folder, self._emptied())

    def is_trained_for(self, plan: IndexPlan, dimension: int, entries: int) -> bool:
        """Whether an earlier call trained an index as in ``plan``, on however many keys the memory was enough for then."""
        if not self.trained.exists():
            return False
        facts = read_index_facts(self.trained)
        return (facts.factory, facts.dimension, facts.trained_entries) == (plan.factory, dimension, entries)

    def _emptied(self) -> Path:
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.part("").parent.mkdir(parents=True)
        return self.trained


def build_index(
    keys: ShardedRows, dimension: int, shards: Sequence[ShardFacts], plan: IndexPlan, folder: Path, scratch: Path, device: str = "cpu"
) -> Iterator[tuple[str, int, int]]:
    """Train, fill and write the index of ``plan`` into ``folder``; yields (stage, done, total entries) as it goes.

    ``keys`` [entries, dimension] of all ``shards``. Killed anywhere, the same call goes on from the last finished part in
    ``scratch`` and ends in the same bytes; ``scratch`` is gone at the end. Raises :class:`IndexingError` if FAISS fails.
    """
    if not folder.exists() and plan.factory == EXACT:
        write_exact(folder, dimension, len(keys))
    elif not folder.exists():
        build = IndexBuild(scratch)
        if not build.is_trained_for(plan, dimension, len(keys)):
            yield TRAINING, 0, plan.training_points
            sample = training_sample(len(keys), plan.training_points)
            build.train(plan, dimension, len(keys), gather_sample(keys, sample, dimension), device)
        yield TRAINING, plan.training_points, plan.training_points
        yield from _fill(build, build.trained, keys, shards, folder, device)
    shutil.rmtree(scratch, ignore_errors=True)


def extend_index(
    base: Path, keys: ShardedRows, shards: Sequence[ShardFacts], folder: Path, scratch: Path, device: str = "cpu"
) -> Iterator[tuple[str, int, int]]:
    """Write an index of what the index in ``base`` holds and of ``shards`` after it into ``folder``, without training.

    ``keys`` [entries, dimension] are numbered as the shards are, those of ``base`` included. Otherwise as
    :func:`build_index`; the result is what one build with the same trained index would have given.
    """
    facts = read_index_facts(base)
    if not folder.exists() and facts.factory == EXACT:
        write_exact(folder, facts.dimension, facts.entries + sum(shard.entries for shard in shards))
    elif not folder.exists():
        build = IndexBuild(scratch)
        if not build.trained.exists():
            build.train_as(base)
        yield from _fill(build, base, keys, shards, folder, device)
    shutil.rmtree(scratch, ignore_errors=True)


def _fill(
    build: IndexBuild, base: Path, keys: ShardedRows, shards: Sequence[ShardFacts], folder: Path, device: str
) -> Iterator[tuple[str, int, int]]:
    """Fill what ``base`` does not hold yet and put it all together in ``folder``."""
    step = read_index_facts(build.trained).fill_rows
    done, total = 0, sum(shard.entries for shard in shards)
    if not is_mergeable(build.trained):
        fill_whole(base, (piece for shard in shards for piece in _pieces(keys, shard, step)), folder)
        yield FILLING, total, total
        return
    for shard in shards:
        if not build.part(shard.name).exists():
            fill_part(build.trained, _pieces(keys, shard, step), build.part(shard.name), device)
        done += shard.entries
        yield FILLING, done, total
    earlier = [] if base == build.trained else [base]
    merge_parts(build.trained, [*earlier, *(build.part(shard.name) for shard in shards)], folder)
    yield MERGING, total, total


def _pieces(keys: ShardedRows, shard: ShardFacts, rows: int) -> Iterable[tuple[int, Tensor]]:
    end = shard.entry_start + shard.entries
    for start in range(shard.entry_start, end, rows):
        yield start, keys.slice(start, min(start + rows, end))
