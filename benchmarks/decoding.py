"""Eight concurrent streams through gRPC against HF ``generate`` on a padded batch; and what retrieval adds to a step."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from benchmarks.reports import print_facts
from benchmarks.rounds import timed
from benchmarks.session import Session
from knnlm.opening import OpenedKNNLM
from knnlm_server.client import GenerationClient

STREAMS = 8
NEW_TOKENS = 64
PROMPT_TOKENS = (8, 14, 20, 26, 32, 38, 44, 50)
PROMPT_DISTANCE = 60


def run(session: Session) -> None:
    """Ratio of tokens per second at weight 0, and added time per step over search and re-ranking."""
    opened, inputs = session.opened, session.inputs
    tokens = np.concatenate([document.ids for document in inputs.held_out(len(PROMPT_TOKENS) * PROMPT_DISTANCE)]).tolist()
    prompts = [tokens[i * PROMPT_DISTANCE :][:length] for i, length in enumerate(PROMPT_TOKENS)]
    with _server(opened) as address, GenerationClient(address) as client:
        client.wait_until_ready(120)
        medians = _medians(opened, client, prompts, session.options.rounds)
    step = {name: value / NEW_TOKENS * 1000 for name, value in medians.items()}
    count = STREAMS * NEW_TOKENS
    print_facts(
        f"decoding: {STREAMS} streams",
        {
            "HF generate, padded batch, tokens/s": count / medians["generate"],
            "gRPC, weight 0, tokens/s": count / medians["weight 0"],
            "ratio (asked: 0.8)": medians["generate"] / medians["weight 0"],
            "gRPC, kNN on, tokens/s": count / medians["kNN"],
            "added by kNN, ms a step": step["kNN"] - step["weight 0"],
            "search and re-ranking alone, ms a step": step["retrieval"],
            "added over alone (asked: at most 1.2)": (step["kNN"] - step["weight 0"]) / step["retrieval"],
        },
    )


def _medians(opened: OpenedKNNLM, client: GenerationClient, prompts: list[list[int]], rounds: int) -> dict[str, float]:
    """Seconds of each contestant, interleaved, the first turn not counted."""
    contestants: dict[str, Callable[[], float]] = {
        "generate": lambda: timed(lambda: _hf_generate(opened, prompts)).wall,
        "weight 0": lambda: timed(lambda: _streams(client, prompts, retrieval=False)).wall,
        "kNN": lambda: timed(lambda: _streams(client, prompts, retrieval=True)).wall,
        "retrieval": lambda: _retrieval_alone(opened),
    }
    walls: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, contestant in contestants.items():
            seconds = contestant()
            if turn:
                walls[name].append(seconds)
    return {name: statistics.median(values) for name, values in walls.items()}


@contextmanager
def _server(opened: OpenedKNNLM) -> Iterator[str]:
    """The address of a server of this store in a process of its own."""
    command = [sys.executable, "-m", "knnlm", "serve", str(opened.store.path), "--port", "0", "--max-concurrent", str(STREAMS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().removeprefix("listening on ").strip()
        finally:
            process.terminate()


def _streams(client: GenerationClient, prompts: list[list[int]], *, retrieval: bool) -> None:
    def one(prompt: list[int]) -> int:
        return sum(1 for _ in client.stream(prompt, max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, retrieval=retrieval))

    with ThreadPoolExecutor(STREAMS) as pool:
        assert list(pool.map(one, prompts)) == [NEW_TOKENS + 1] * STREAMS


def _hf_generate(opened: OpenedKNNLM, prompts: list[list[int]]) -> None:
    widest = max(map(len, prompts))
    ids = torch.tensor([[0] * (widest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (widest - len(p)) + [1] * len(p) for p in prompts])
    model = opened.model._model
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    assert out.shape[1] == widest + NEW_TOKENS


def _retrieval_alone(opened: OpenedKNNLM) -> float:
    """Seconds of as many searches with re-ranking as the streams make steps, on keys of the store.

    Each comes after a forward pass that is not counted, as in a step: caches and threads are as cold as there.
    """
    retriever, k, keys = opened.retriever, opened.knn_lm.mixture.k, opened.store.keys
    assert keys is not None
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, opened.model.vocabulary_size, (STREAMS, 1), generator=generator)
    seconds = 0.0
    for _ in range(NEW_TOKENS):
        rows = torch.randint(0, len(opened.store), (STREAMS,), generator=generator)
        queries = keys.gather(rows).float()
        opened.model.forward(tokens)
        seconds += timed(partial(retriever.retrieve, queries, k)).wall
    return seconds
