"""The n-gram equals a dictionary of counts, adds up to 1, and crosses no document."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.datastore.reader import Datastore
from knnlm.datastore.removal import remove_documents
from knnlm.errors import InvalidInput
from knnlm.evaluation.baselines import ngram
from knnlm.evaluation.baselines.ngram import FALLBACK_DISCOUNTS, NGramModel
from knnlm.model import HFLanguageModel
from tests.stores import build, token_folder

VOCABULARY = 7
Gram = tuple[int, ...]

DOCUMENT = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30)
DOCUMENTS = st.lists(DOCUMENT, max_size=5)
HELD = st.lists(DOCUMENT, min_size=1, max_size=3)


class SlowNGram:
    """Chen & Goodman's formulas over dictionaries."""

    def __init__(self, documents: Sequence[Sequence[int]], order: int, vocabulary: int = VOCABULARY) -> None:
        self.order, self.vocabulary, border = order, vocabulary, vocabulary
        stands: list[Counter[Gram]] = [Counter() for _ in range(order + 1)]
        before: list[dict[Gram, set[int]]] = [defaultdict(set) for _ in range(order + 1)]
        for document in documents:
            text = (border, *document)
            for n in range(1, order + 1):
                for start in range(len(text) - n + 1):
                    gram = text[start : start + n]
                    stands[n][gram] += 1
                    if start:
                        before[n][gram].add(text[start - 1])
        self.counts: list[dict[Gram, int]] = [{} for _ in range(order + 1)]
        for n in range(1, order + 1):
            for gram, count in stands[n].items():
                if gram != (border,):
                    self.counts[n][gram] = count if n == order or gram[0] == border else len(before[n][gram])
        self.discounts = [self.discounts_of(list(counts.values())) for counts in self.counts]

    @staticmethod
    def discounts_of(counts: list[int]) -> tuple[float, ...]:
        n1, n2, n3, n4 = (counts.count(a) for a in (1, 2, 3, 4))
        if n1 and n2 and n3:
            y = n1 / (n1 + 2 * n2)
            found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
            if all(0 <= d <= a + 1 for a, d in enumerate(found)):
                return found
        return FALLBACK_DISCOUNTS

    def probability(self, context: Gram, token: int) -> float:
        context = context[-(self.order - 1) :]
        lower = self.probability(context[1:], token) if context else 1 / self.vocabulary
        counts, discounts = self.counts[len(context) + 1], self.discounts[len(context) + 1]
        following = {gram[-1]: count for gram, count in counts.items() if gram[:-1] == context}
        if not following:
            return lower
        discounted = {next_: count - discounts[min(count, 3) - 1] for next_, count in following.items()}
        rest = sum(following.values()) - sum(discounted.values())
        return (discounted.get(token, 0.0) + rest * lower) / sum(following.values())

    def log_probs(self, documents: Sequence[Sequence[int]]) -> list[float]:
        return [
            float(np.log(self.probability((self.vocabulary, *document[:place]), document[place])))
            for document in documents
            for place in range(1, len(document))
        ]


def arrays(documents: Sequence[Sequence[int]]) -> list[np.ndarray]:
    return [np.array(document, np.int32) for document in documents]


@given(DOCUMENTS, HELD, st.integers(2, 5))
def test_it_equals_counting_in_dictionaries(documents: list[list[int]], held: list[list[int]], order: int) -> None:
    found = NGramModel.train(arrays(documents), VOCABULARY, order).log_probs(arrays(held))
    np.testing.assert_allclose(found, SlowNGram(documents, order).log_probs(held), rtol=1e-5, atol=1e-6)


def test_discounts_are_estimated_where_the_text_is_long_enough() -> None:
    """Also to the reference, and with discounts that are not those of tiny texts."""
    chance = np.random.default_rng(3)
    documents = [(chance.zipf(1.6, 400) % VOCABULARY).tolist() for _ in range(3)]
    slow = SlowNGram(documents, 4)
    assert slow.discounts[4] != FALLBACK_DISCOUNTS
    found = NGramModel.train(arrays(documents), VOCABULARY, 4).log_probs(arrays(documents[:1]))
    np.testing.assert_allclose(found, slow.log_probs(documents[:1]), rtol=1e-5, atol=1e-6)


@given(DOCUMENTS, DOCUMENT, st.integers(2, 4))
def test_probabilities_add_up_to_1(documents: list[list[int]], context: list[int], order: int) -> None:
    model = NGramModel.train(arrays(documents), VOCABULARY, order)
    each = [model.log_probs(arrays([[*context, token]]))[-1] for token in range(VOCABULARY)]
    assert np.exp(np.array(each, np.float64)).sum() == pytest.approx(1, abs=1e-6)


@given(DOCUMENTS, HELD, st.integers(1, 9))
def test_portions_change_nothing(documents: list[list[int]], held: list[list[int]], portion: int) -> None:
    model = NGramModel.train(arrays(documents), VOCABULARY)
    whole = model.log_probs(arrays(held))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngram, "TOKENS_AT_ONCE", portion)
        assert np.array_equal(model.log_probs(arrays(held)), whole)


def test_no_ngram_crosses_documents() -> None:
    """2 follows 1 across a border alone, where it does not count."""
    apart = NGramModel.train(arrays([[0, 1], [2, 3]]), VOCABULARY)
    swapped = NGramModel.train(arrays([[2, 3], [0, 1]]), VOCABULARY)
    held = arrays([[0, 1, 2, 3]])
    assert np.array_equal(apart.log_probs(held), swapped.log_probs(held))
    assert apart.log_probs(held)[1] < apart.log_probs(held)[0]


def test_a_text_without_any_token_leaves_the_uniform_distribution() -> None:
    model = NGramModel.train([], VOCABULARY)
    np.testing.assert_allclose(model.log_probs(arrays([[0, 3, 6]])), np.log(1 / VOCABULARY), rtol=1e-6)
    assert model.log_probs([]).shape == model.log_probs(arrays([[1]])).shape == (0,)


def test_a_large_vocabulary_fits_the_keys() -> None:
    most = 300_000 - 1
    documents = [[most, most - 1, 0, most, most, 7] * 9, [most, 0, most - 1]]
    found = NGramModel.train(arrays(documents), most + 1).log_probs(arrays(documents))
    np.testing.assert_allclose(found, SlowNGram(documents, 4, most + 1).log_probs(documents), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def store(gpt2: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ngram")
    build(token_folder(folder / "corpus", STORED), folder / "store", gpt2, index="Flat", shard_tokens=16, max_length=16)
    return folder / "store"


STORED = [[*range(place, place + 20), *range(5)] for place in (0, 3, 40)]


def same_as(model: NGramModel, documents: Sequence[Sequence[int]]) -> bool:
    expected = NGramModel.train(arrays(documents), 300)
    return model.tokens == sum(map(len, documents)) and np.array_equal(model.log_probs(arrays(STORED)), expected.log_probs(arrays(STORED)))


def test_of_a_store_it_counts_the_documents_that_are_left(store: Path) -> None:
    opened = Datastore.open(store)
    assert same_as(NGramModel.of_store(opened), STORED)
    assert same_as(NGramModel.of_store(opened, without=[0]), STORED[1:])
    removed = remove_documents(store, [opened.documents[1].id])
    assert removed is not None
    opened.refresh()
    assert same_as(NGramModel.of_store(opened), STORED[::2])
    assert same_as(NGramModel.of_store(opened, without=[0, 1]), STORED[2:])


def test_what_can_not_be_is_refused_in_a_sentence(store: Path) -> None:
    with pytest.raises(InvalidInput, match="order: is 1, but an n-gram needs at least 2"):
        NGramModel.train([], VOCABULARY, 1)
    with pytest.raises(InvalidInput, match=r"at most 10 are counted; leave it out\."):
        NGramModel.of_store(Datastore.open(store), most_tokens=10)
