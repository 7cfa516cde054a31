"""``compare`` against its parts in bare form: forward with head, one FAISS search, re-ranking in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.reports import print_facts
from benchmarks.rounds import interleave
from benchmarks.session import Session
from knnlm.evaluation.compare import compare
from knnlm.index import FaissIndex
from knnlm.mixture import Mixture
from knnlm.opening import OpenedKNNLM
from knnlm.tokenized import TokenizedDocument
from knnlm.windows import PlacedWindow, length_batches, windows

TOKENS = 8_192
BATCH_TOKENS = 2048
MANY_NEIGHBORS = 1024

Batch = tuple[Tensor, list[np.ndarray[tuple[int], np.dtype[np.int64]]]]


def run(session: Session) -> None:
    """Ratio of scored tokens per second, wall and CPU, with the mixture's k and with a thousand neighbours."""
    mixture = session.opened.knn_lm.mixture
    for k, asked in {mixture.k: 0.7, MANY_NEIGHBORS: 0.9}.items():
        _compared(session, replace(mixture, k=k), asked)


def _compared(session: Session, mixture: Mixture, asked: float) -> None:
    opened, inputs = session.opened, session.inputs
    held = inputs.held_out(TOKENS)
    total = sum(len(document.ids) - 1 for document in held)
    contestants = {"bare": _bare(opened, held, mixture.k), "compare": lambda: compare(opened.knn_lm, opened.store, held, mixture=mixture)}
    timings = interleave(contestants, session.options.rounds)
    bare, whole = timings["bare"], timings["compare"]
    print_facts(
        f"comparing: {len(opened.store):,} entries, {opened.retriever.index.description}",
        {
            "scored tokens": total,
            "k": mixture.k,
            "bare forward + search + re-ranking, tokens/s": total / bare.wall,
            "compare, tokens/s": total / whole.wall,
            f"ratio, wall (asked: {asked})": bare.wall / whole.wall,
            "ratio, CPU": bare.cpu / whole.cpu,
        },
    )


def _batches(opened: OpenedKNNLM, held: list[TokenizedDocument]) -> list[Batch]:
    """Tokens [windows, length] of each forward pass, and of each window the columns that predict its targets."""
    windowing = opened.store.manifest.windowing
    placed = [PlacedWindow(w, number, 0) for number, document in enumerate(held) for w in windows(len(document.ids), windowing)]
    batches = []
    for batch in length_batches(placed, BATCH_TOKENS):
        stacked = np.stack([held[w.origin].ids[w.window.start : w.window.end - 1] for w in batch]).astype(np.int64)
        columns = [np.arange(w.window.input_length - w.window.target_count, w.window.input_length) for w in batch]
        batches.append((torch.from_numpy(stacked), columns))
    return batches


def _bare(opened: OpenedKNNLM, held: list[TokenizedDocument], k: int) -> Callable[[], None]:
    batches, retriever = _batches(opened, held), opened.retriever
    setting, index, stored = retriever.settings.for_k(k), retriever.index, opened.store.keys
    assert isinstance(index, FaissIndex)
    assert stored is not None
    count, raw, parameters = math.ceil(setting.overfetch * k), index._index, index._parameters(setting.probes, None)
    keys = torch.cat([piece for _, piece in stored.chunks(1 << 20)])

    def bare() -> None:
        for tokens, columns in batches:
            widest = max(map(len, columns))
            out = opened.model.forward(tokens, columns=torch.arange(tokens.shape[1] - widest, tokens.shape[1]))
            assert out.logits is not None
            out.logits.log_softmax(-1)
            queries = torch.cat([row[torch.from_numpy(c)] for row, c in zip(out.keys, columns, strict=True)])
            _, ids = raw.search(queries.numpy(), count, params=parameters)
            for part, found in zip(queries.split(64), torch.from_numpy(ids).split(64), strict=True):
                candidates = keys[found.clamp(min=0).flatten()].float().view(len(part), count, -1)
                (candidates - part[:, None]).square().sum(2).topk(k, largest=False)

    return bare
