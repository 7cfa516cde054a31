"""Encoding (``build_shard``) against a bare forward pass of the base model, without LM head, over the same windows."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch

from benchmarks.inputs import Inputs
from benchmarks.rounds import interleave
from knnlm.corpus import Corpus
from knnlm.datastore.documents import DocumentTable
from knnlm.windows import Windowing, length_batches
from knnlm_index_builder.encode import ShardDescriptor, build_shard, plan_shards, shard_windows
from knnlm_index_builder.ingest import DOCUMENTS, IngestedCorpus, ingest

TOKENS = 32_768
BATCH_TOKENS = 2048


def run(inputs: Inputs, folder: Path, rounds: int) -> dict[str, float]:
    """Ratio of entries per second, wall and CPU; at least 0.8 is asked for."""
    model = inputs.model
    receipt = ingest(Corpus([inputs.corpus]), model.tokenizer(), model.vocabulary_size, folder / "ingested", lambda done: None)
    documents = DocumentTable([folder / "ingested" / DOCUMENTS])
    stream = IngestedCorpus.open(folder / "ingested", pretokenized=False)
    windowing = Windowing.for_context(model.context)
    facts = plan_shards(documents, windowing, min(TOKENS, receipt.tokens))[0]
    batches = [
        torch.from_numpy(np.stack([stream.tokens[w.origin + w.window.start :][: w.window.input_length] for w in batch]).astype(np.int64))
        for batch in length_batches(shard_windows(facts, documents, windowing), BATCH_TOKENS)
    ]
    base = model._model.base_model

    def bare() -> None:
        with torch.inference_mode():
            for tokens in batches:
                base(input_ids=tokens, use_cache=False)

    def build() -> None:
        shutil.rmtree(folder / "shard", ignore_errors=True)
        build_shard(
            ShardDescriptor(facts, windowing, "float16"), stream, documents, model, folder / "shard",
            batch_tokens=BATCH_TOKENS, dtype=model.dtype, progress=lambda done: None,
        )  # fmt: skip

    timings = interleave({"bare forward": bare, "build": build}, rounds)
    bare_time, build_time = timings["bare forward"], timings["build"]
    return {
        "entries": facts.entries,
        "bare forward, entries/s": facts.entries / bare_time.wall,
        "build, entries/s": facts.entries / build_time.wall,
        "ratio, wall (asked: 0.8)": bare_time.wall / build_time.wall,
        "ratio, CPU": bare_time.cpu / build_time.cpu,
    }
