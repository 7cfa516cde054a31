"""A process of its own: by how many float32 copies of a batch's logits resident memory rises in a score and in steps.

Prints the larger one for scoring and for steps, of a model with a vocabulary so large that nothing else counts.
``python -m tests.engine.logit_peak FOLDER DTYPE``
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from knnlm.model import HFLanguageModel
from knnlm.opening import open_store
from knnlm.sampling import SamplingParams
from knnlm_server.datastores import Datastores
from knnlm_server.engine import DecodingEngine
from knnlm_server.scorings import SCORE_BATCH_TOKENS
from knnlm_server.sequence import DetailParams, GenerationRequest, Limits, RetrievalParams, ScoreRequest, StoppingParams
from tests.stores import build, token_folder
from tests.tiny import VOCABULARY, save, tiny_tokenizer

LOGITS = 16_000
MIXED = RetrievalParams(0.5, 16, 10.0)
CHANCE = random.Random(0)


def tokens(count: int) -> list[int]:
    return [CHANCE.randrange(VOCABULARY) for _ in range(count)]


def engine_of(folder: Path, dtype: str) -> DecodingEngine:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=LOGITS, n_embd=16, n_layer=1, n_head=1, n_positions=1024, bos_token_id=0, eos_token_id=0)
    path = save(GPT2LMHeadModel(config), tiny_tokenizer(), folder / "model")
    build(token_folder(folder / "corpus", [tokens(200)]), folder / "store", HFLanguageModel.load(path, dtype=dtype))
    opened = open_store(folder / "store", model=str(path), dtype=dtype)
    datastores = Datastores(opened.model, opened.knn_lm.tokenizer)
    datastores.serve("default", opened.searchable)
    return DecodingEngine(opened.model, opened.knn_lm.tokenizer, datastores, Limits(context=1024, max_concurrent=32), prefix_bytes=0)


def score(engine: DecodingEngine, length: int) -> None:
    engine.add_score(ScoreRequest("s", tuple(tokens(length)), MIXED))
    while not engine.idle:
        engine.step()


def generate(engine: DecodingEngine, rows: int) -> None:
    """Prompts of as many lengths as rows, which all end in one step."""
    sampling = SamplingParams(top_p=0.9, repetition_penalty=1.2)
    for row in range(rows):
        stopping = StoppingParams(max_new_tokens=3, ignore_eos=True)
        engine.add(GenerationRequest(f"g{row}", tuple(tokens(row + 1)), sampling, stopping, MIXED, DetailParams(True, 5, 5, True)))
    while not engine.idle:
        engine.step()


def status(key: str) -> int:
    """Bytes of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def copies(work: Callable[[], None]) -> float:
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    work()
    return (status("VmHWM") - before) / (4 * SCORE_BATCH_TOKENS * LOGITS)


def main(folder: str, dtype: str) -> None:
    engine = engine_of(Path(folder), dtype)
    score(engine, 20)
    generate(engine, 2)
    print(max(copies(lambda n=n: score(engine, n)) for n in (1024, 3000)), copies(lambda: generate(engine, 32)))  # type: ignore[misc]


if __name__ == "__main__":
    main(*sys.argv[1:])
