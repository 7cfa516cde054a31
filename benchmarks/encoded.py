"""A part of a corpus as one shard: read, cut and encoded by the product's own stages, without the rest of a build."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.inputs import Inputs
from knnlm.arrays import map_array
from knnlm.datastore.documents import DocumentTable
from knnlm.datastore.reader import KEYS, VALUES, ShardedRows
from knnlm.model import HFLanguageModel
from knnlm.windows import PlacedWindow, Windowing, length_batches
from knnlm_index_builder.encode import ShardDescriptor, build_shard, plan_shards, shard_windows
from knnlm_index_builder.ingest import DOCUMENTS, IngestedCorpus, ingest

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Part:
    """The beginning of a corpus, to be encoded as one shard."""

    descriptor: ShardDescriptor

    @property
    def entries(self) -> int:
        """Entries that the shard has."""
        return self.descriptor.facts.entries

    def batches(self) -> list[tuple[list[PlacedWindow], Tensor]]:
        """The windows of each forward pass and the tokens [windows, length] that it reads, as a build has them."""
        what = self.descriptor
        placed = shard_windows(what.facts, DocumentTable(what.documents), what.windowing)
        return [(batch, _tokens(batch, what.corpus)) for batch in length_batches(placed, what.batch_tokens)]

    def encode(self, model: HFLanguageModel, name: str) -> tuple[ShardedRows, ShardedRows]:
        """Make the shard ``name``, anew if it is there; its keys [entries, dimension] and values [entries]."""
        folder = self.descriptor.folder.with_name(name)
        shutil.rmtree(folder, ignore_errors=True)
        build_shard(replace(self.descriptor, folder=folder), model, lambda done: None)
        keys, values = (ShardedRows([map_array(folder / file, "c")], [0]) for file in (KEYS, VALUES))
        return keys, values


def _tokens(batch: list[PlacedWindow], corpus: IngestedCorpus) -> Tensor:
    starts = [item.origin + item.window.start for item in batch]
    return torch.from_numpy(np.stack([corpus.tokens(start, start + batch[0].window.input_length) for start in starts]).astype(np.int64))


def first_part(inputs: Inputs, tokens: int, folder: Path) -> Part:
    """The first ``tokens`` of the corpus (or all of it), read into ``folder``."""
    model, corpus = inputs.model, inputs.corpus()
    receipt = ingest(corpus, model.tokenizer(), model.vocabulary_size, folder, lambda stage, done, total: None)
    documents = (folder / DOCUMENTS,)
    windowing = Windowing.for_context(model.context)
    facts = plan_shards(DocumentTable(documents), windowing, min(tokens, receipt.tokens))[0]
    stream = IngestedCorpus(folder, 0, corpus.pretokenized)
    return Part(ShardDescriptor(facts, stream, documents, folder / "shard", windowing, "float16", BATCH_TOKENS))
