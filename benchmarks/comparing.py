"""``compare`` against its parts in bare form: forward with head, one FAISS search, re-ranking in plain torch."""

from __future__ import annotations

import math

import numpy as np
import torch

from benchmarks.inputs import Inputs
from benchmarks.rounds import interleave
from knnlm.evaluation.compare import compare
from knnlm.index import FaissIndex
from knnlm.opening import OpenedKNNLM
from knnlm.windows import PlacedWindow, length_batches, windows

TOKENS = 8_192
BATCH_TOKENS = 2048


def run(inputs: Inputs, opened: OpenedKNNLM, rounds: int) -> dict[str, float]:
    """Ratio of scored tokens per second, wall and CPU; at least 0.7 is asked for."""
    knn_lm, store = opened.knn_lm, opened.store
    held, total = [], 0
    for document in opened.read(opened.corpus(inputs.held_out)):
        held.append(document)
        total += len(document.ids) - 1
        if total >= TOKENS:
            break
    placed = [PlacedWindow(w, number, 0) for number, d in enumerate(held) for w in windows(len(d.ids), store.manifest.windowing)]
    batches = []
    for batch in length_batches(placed, BATCH_TOKENS):
        stacked = np.stack([held[w.origin].ids[w.window.start : w.window.end - 1] for w in batch]).astype(np.int64)
        columns = [np.arange(w.window.input_length - w.window.target_count, w.window.input_length) for w in batch]
        batches.append((torch.from_numpy(stacked), max(map(len, columns)), columns))
    k = knn_lm.mixture.k
    setting = knn_lm.retriever.settings.for_k(k)
    count = math.ceil(setting.overfetch * k)
    index = knn_lm.retriever.index
    assert isinstance(index, FaissIndex)
    keys = torch.cat([piece for _, piece in store.keys.chunks(1 << 20)])
    raw, parameters, model = index._index, index._parameters(setting.probes, None), opened.model

    def bare() -> None:
        for tokens, widest, columns in batches:
            out = model.forward(tokens, columns=torch.arange(tokens.shape[1] - widest, tokens.shape[1]))
            assert out.logits is not None
            out.logits.log_softmax(-1)
            queries = torch.cat([row[torch.from_numpy(c)] for row, c in zip(out.keys, columns, strict=True)])
            _, ids = raw.search(queries.numpy(), count, params=parameters)
            for part, found in zip(queries.split(64), torch.from_numpy(ids).split(64), strict=True):
                candidates = keys[found.clamp(min=0).flatten()].float().view(len(part), count, -1)
                (candidates - part[:, None]).square().sum(2).topk(k, largest=False)

    timings = interleave({"bare": bare, "compare": lambda: compare(knn_lm, store, held)}, rounds)
    return {
        "scored tokens": total,
        "k": k,
        "bare forward + search + re-ranking, tokens/s": total / timings["bare"].wall,
        "compare, tokens/s": total / timings["compare"].wall,
        "ratio, wall (asked: 0.7)": timings["bare"].wall / timings["compare"].wall,
        "ratio, CPU": timings["bare"].cpu / timings["compare"].cpu,
    }
