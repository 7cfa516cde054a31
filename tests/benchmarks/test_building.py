"""What is timed side by side does the same work: the same keys come out of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import building
from benchmarks.encoded import Part, first_part
from benchmarks.inputs import Inputs, first_documents
from benchmarks.rounds import interleave
from knnlm.model import HFLanguageModel
from knnlm.tokenized import tokenize
from tests.stores import text_folder
from tests.tiny import tiny_corpus


@pytest.fixture(scope="module")
def inputs(gpt2: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    corpus = text_folder(tmp_path_factory.mktemp("benchmarks") / "corpus", tiny_corpus(6))
    return Inputs(gpt2, gpt2.name, corpus, corpus, None)


@pytest.fixture(scope="module")
def part(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Part:
    return first_part(inputs, 300, tmp_path_factory.mktemp("part") / "read")


def test_public_scripts_save_the_keys_of_a_build(part: Part, gpt2: HFLanguageModel, tmp_path: Path) -> None:
    keys, values = part.encode(gpt2, "shard")
    building._public(gpt2, part, tmp_path / "public.npy")()
    saved = np.fromfile(tmp_path / "public.npy", np.float16).reshape(part.entries, gpt2.key_dimension)
    # Batch by batch there, in the order of the text here.
    rows = [item.row + n for placed, _ in part.batches() for item in placed for n in range(item.window.target_count)]
    assert sorted(rows) == list(range(len(values)))
    assert len(set(map(len, (placed for placed, _ in part.batches())))) > 1
    np.testing.assert_allclose(saved.astype(np.float32), keys.gather(torch.tensor(rows)).float().numpy(), atol=2e-3, rtol=2e-3)


def test_a_shard_is_made_anew(part: Part, gpt2: HFLanguageModel) -> None:
    first, second = (part.encode(gpt2, "again")[0].slice(0, part.entries) for _ in range(2))
    assert first.equal(second)
    assert first.data_ptr() != second.data_ptr()


def test_held_out_text_ends_with_the_document_that_fills_it(inputs: Inputs, gpt2: HFLanguageModel) -> None:
    documents = list(tokenize(inputs.corpus(), gpt2.tokenizer(), gpt2.vocabulary_size))
    enough = len(documents[0].ids) - 1 + len(documents[1].ids) - 1
    assert [len(first_documents(documents, tokens)) for tokens in (1, enough - 1, enough, enough + 1, 10**6)] == [1, 2, 2, 3, 6]


def test_contestants_take_turns_and_the_first_does_not_count() -> None:
    turns: list[str] = []
    timings = interleave({name: lambda name=name: turns.append(name) for name in "ab"}, 2)  # type: ignore[misc]
    assert turns == ["a", "b"] * 3
    assert list(timings) == ["a", "b"]
