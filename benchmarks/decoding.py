"""Eight concurrent streams through gRPC against HF ``generate`` on a padded batch; and what retrieval adds to a step."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks.inputs import Inputs
from knnlm.opening import OpenedKNNLM
from knnlm_server.client import GenerationClient

STREAMS = 8
NEW_TOKENS = 64
PROMPT_TOKENS = (8, 14, 20, 26, 32, 38, 44, 50)


def run(inputs: Inputs, opened: OpenedKNNLM, rounds: int) -> dict[str, float]:
    """Ratio of tokens per second at weight 0 (asked: 0.8), and added time per step over search and re-ranking (1.2)."""
    text = next(path for path in sorted(inputs.held_out.rglob("*")) if path.is_file() and path.stat().st_size > 4000).read_text()
    tokens = opened.knn_lm.tokenizer.encode(text)
    prompts = [tokens[i * 60 : i * 60 + length] for i, length in enumerate(PROMPT_TOKENS)]
    with _server(opened) as (process, address), GenerationClient(address) as client:
        client.wait_until_ready(120)
        contestants: dict[str, Callable[[], float]] = {
            "generate": lambda: _timed(lambda: _hf_generate(opened, prompts)),
            "weight 0": lambda: _timed(lambda: _streams(client, prompts, retrieval=False)),
            "kNN": lambda: _timed(lambda: _streams(client, prompts, retrieval=True)),
            "retrieval": lambda: _retrieval_alone(opened),
        }
        walls: dict[str, list[float]] = {name: [] for name in contestants}
        for turn in range(rounds + 1):
            for name, contestant in contestants.items():
                seconds = contestant()
                if turn:
                    walls[name].append(seconds)
        process.terminate()
    medians = {name: statistics.median(values) for name, values in walls.items()}
    step = {name: value / NEW_TOKENS * 1000 for name, value in medians.items()}
    count = STREAMS * NEW_TOKENS
    return {
        "streams": STREAMS,
        "HF generate, padded batch, tokens/s": count / medians["generate"],
        "gRPC, weight 0, tokens/s": count / medians["weight 0"],
        "ratio (asked: 0.8)": medians["generate"] / medians["weight 0"],
        "gRPC, kNN on, tokens/s": count / medians["kNN"],
        "added by kNN, ms a step": step["kNN"] - step["weight 0"],
        "search and re-ranking alone, ms a step": step["retrieval"],
        "added over alone (asked: at most 1.2)": (step["kNN"] - step["weight 0"]) / step["retrieval"],
    }


def _timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


class _server:
    def __init__(self, opened: OpenedKNNLM) -> None:
        command = [sys.executable, "-m", "knnlm", "serve", str(opened.store.path), "--port", "0", "--max-concurrent", str(STREAMS)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> tuple[subprocess.Popen[str], str]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return self._process, line.removeprefix("listening on ").strip()

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


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
    retriever, k = opened.knn_lm.retriever, opened.knn_lm.mixture.k
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, opened.model.vocabulary_size, (STREAMS, 1), generator=generator)
    seconds = 0.0
    for _ in range(NEW_TOKENS):
        rows = torch.randint(0, len(opened.store), (STREAMS,), generator=generator)
        queries = opened.store.keys.gather(rows).float()
        opened.model.forward(tokens)
        seconds += _timed(lambda queries=queries: retriever.retrieve(queries, k))  # type: ignore[misc]
    return seconds
