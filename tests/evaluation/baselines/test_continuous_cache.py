"""The continuous cache equals a loop over the document's earlier tokens, whatever the batches were."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knnlm.corpus import Document
from knnlm.errors import InvalidInput
from knnlm.evaluation.baselines import continuous_cache
from knnlm.evaluation.baselines.continuous_cache import CacheSettings, QueryTape, cache_log_probs
from knnlm.evaluation.scoring import ReadBatch, read
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel
from knnlm.tokenized import TokenizedDocument
from knnlm.windows import Windowing

DIMENSION = 3
Floats = np.ndarray


def tokenized(documents: Sequence[Sequence[int]]) -> list[TokenizedDocument]:
    return [
        TokenizedDocument(Document(str(number), "test", None, np.array(ids, np.int32), {}), np.array(ids, np.int32), None)
        for number, ids in enumerate(documents)
    ]


def slow(queries: Floats, documents: Sequence[Sequence[int]], settings: CacheSettings) -> list[float]:
    found, row = [], 0
    for ids in documents:
        for place in range(1, len(ids)):
            weights = {
                earlier: math.exp(settings.flatness * float(queries[row + place - 1] @ queries[row + earlier - 1]))
                for earlier in range(max(1, place - settings.size), place)
            }
            same = sum(weight for earlier, weight in weights.items() if ids[earlier] == ids[place])
            found.append((math.log(same / sum(weights.values())) if same else -math.inf) if weights else math.nan)
        row += max(len(ids) - 1, 0)
    return found


def batch(rows: Sequence[int], queries: Floats) -> ReadBatch:
    """As scoring reads it, with the rows' own queries."""
    nothing = torch.zeros(len(rows), dtype=torch.int64)
    return ReadBatch(torch.tensor(rows), nothing, nothing, torch.from_numpy(queries[list(rows)]), nothing)


DOCUMENTS = st.lists(st.lists(st.integers(0, 3), max_size=14), min_size=1, max_size=4)


@given(DOCUMENTS, st.integers(1, 9), st.floats(0.01, 3), st.integers(1, 6), st.randoms(use_true_random=False))
def test_it_equals_a_loop(documents: list[list[int]], size: int, flatness: float, block: int, chance: object) -> None:
    count = sum(max(len(ids) - 1, 0) for ids in documents)
    queries = np.random.default_rng(count).normal(size=(count, DIMENSION)).astype(np.float32)
    rows = list(range(count))
    chance.shuffle(rows)  # type: ignore[attr-defined]
    settings = CacheSettings(size, flatness)
    with QueryTape() as tape, pytest.MonkeyPatch.context() as patch:
        patch.setattr(continuous_cache, "ROWS_AT_ONCE", block)
        for start in range(0, count, 3):
            tape.record(batch(rows[start : start + 3], queries))
        found = cache_log_probs(tape, tokenized(documents), settings)
    np.testing.assert_allclose(found, slow(queries, documents, settings), rtol=1e-4, atol=1e-5)


def test_probabilities_add_up_to_1() -> None:
    """Over the tokens that could come next."""
    queries = np.random.default_rng(0).normal(size=(20, DIMENSION)).astype(np.float32)
    context = [place % 5 for place in range(20)]
    with QueryTape() as tape:
        tape.record(batch(range(20), queries))
        each = [cache_log_probs(tape, tokenized([[*context, token]]), CacheSettings(7, 1.0))[-1] for token in range(6)]
    assert np.exp(np.array(each, np.float64)).sum() == pytest.approx(1, abs=1e-6)
    assert each[5] == -np.inf


def test_the_queries_are_those_of_scoring(gpt2: HFLanguageModel) -> None:
    """Windows come by length, so their rows do not come in order."""
    documents = [list(range(5, 32)), [1, 2], list(range(40, 71))]
    read_batches = list(read(gpt2, [np.array(ids) for ids in documents], Windowing(16, 6), batch_tokens=40))
    rows = np.concatenate([part.rows.numpy() for part in read_batches])
    assert (np.diff(rows) < 0).any()
    with QueryTape() as tape:
        for part in read_batches:
            tape.record(part)
        expected = np.concatenate([part.queries.numpy() for part in read_batches])[np.argsort(rows)]
        assert np.array_equal(tape.rows(0, len(rows)).numpy(), expected)
        assert np.array_equal(tape.rows(3, 9).numpy(), expected[3:9])


def test_settings_follow_the_mixture_and_are_checked() -> None:
    assert CacheSettings.of(Mixture(temperature=40.0)).flatness == 0.05
    for settings, message in (((0, 1.0), "cache size: is 0"), ((1, 0.0), "flatness: is 0.0"), ((1, math.nan), "flatness: is nan")):
        with pytest.raises(InvalidInput, match=message):
            CacheSettings(*settings)
