"""λ by a gate: features from their definition, rows that are not searched, and one result whether a row is mixed or scored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from knnlm.datastore.reader import ShardedRows
from knnlm.distribution import neighbor_token_log_probs
from knnlm.errors import InvalidInput
from knnlm.evaluation import scoring
from knnlm.following import context_of, contexts_of, followed_lengths
from knnlm.gate import LM_FEATURES, Gate, LMSummary, SkipRule, gate_features, lm_features
from knnlm.gated import GatedRows, RowWeights, StoreGate
from knnlm.index import ExactIndex
from knnlm.knn_lm import KNNLanguageModel, Mixed, mix_neighbors
from knnlm.mixture import Mixture
from knnlm.neighbors import Neighbors
from knnlm.retrieval import Retriever
from knnlm.windows import Windowing
from tests import reference
from tests.engine.harness import CountingIndex
from tests.gates import constant_gate, followed, network, random_gate, slow_features

DIMENSION, VOCABULARY = 4, 11
SEEDS = st.integers(0, 10_000)


class Documents:
    """As much of a datastore as a gate asks for: documents whose entries are numbered through."""

    def __init__(self, documents: list[list[int]]) -> None:
        self.left = [document[:end] for document in documents for end in range(1, len(document))]
        self.values = [document[end] for document in documents for end in range(1, len(document))]

    def left_contexts(self, entries: torch.Tensor, length: int) -> torch.Tensor:
        rows = [([-1] * length + self.left[entry])[-length:] for entry in entries.tolist()]
        return torch.tensor(rows, dtype=torch.int64).view(len(rows), length)


@dataclass
class Setting:
    """A datastore in memory, rows that ask it, and a model with a gate that answers them."""

    documents: Documents
    keys: np.ndarray
    index: CountingIndex
    knn_lm: KNNLanguageModel
    lm: torch.Tensor
    queries: torch.Tensor
    contexts: torch.Tensor
    targets: torch.Tensor

    def mix(self, rows: list[int], mixture: Mixture | None = None) -> Mixed:
        return self.knn_lm.mix_all(self.lm[rows], self.queries[rows], mixture, self.contexts[rows])

    def score(self, rows: list[int], mixture: Mixture | None = None) -> scoring.ScoredBatch:
        batch = scoring.ReadBatch(torch.tensor(rows), self.targets[rows], self.lm[rows], self.queries[rows], self.contexts[rows])
        with mock.patch.object(scoring, "read", return_value=iter([batch])):
            (scored,) = scoring.score(self.knn_lm, [], Windowing(8, 4), mixture)
        return scored


def setting(seed: int, gate: Gate | None, rows: int = 6, *, k: int = 5, temperature: float = 2.0, entries_of: int = 7) -> Setting:
    chance = np.random.default_rng(seed)
    documents = Documents([chance.integers(0, 4, entries_of).tolist() for _ in range(3)])
    # Few places, so that keys are equal and distances tie.
    keys = chance.integers(-1, 2, (len(documents.values), DIMENSION)).astype(np.float32)
    stored = ShardedRows([keys], [0])
    index = CountingIndex(ExactIndex(stored))
    retriever = Retriever(index, stored, ShardedRows([np.array(documents.values, np.int32)], [0]))
    store_gate = None if gate is None else StoreGate(gate, cast(Any, documents))
    model = SimpleNamespace(context=64, vocabulary_size=VOCABULARY)
    knn_lm = KNNLanguageModel(cast(Any, model), cast(Any, None), retriever, Mixture(k, temperature, 0.4), store_gate)
    lm = torch.from_numpy(2 * chance.normal(size=(rows, VOCABULARY))).float().log_softmax(-1)
    queries = torch.from_numpy(chance.normal(size=(rows, DIMENSION)).astype(np.float32))
    # Ends of documents among them, so that some rows follow one.
    texts = [documents.left[int(chance.integers(len(documents.left)))][-int(chance.integers(1, 6)) :] for _ in range(rows)]
    contexts = torch.tensor([context_of(text) for text in texts])
    return Setting(documents, keys, index, knn_lm, lm, queries, contexts, torch.from_numpy(chance.integers(0, VOCABULARY, rows)))


def expected_row(found: Setting, row: int) -> tuple[reference.Floats, float, bool]:
    """log p over the vocabulary, λ, and whether neighbours are searched, from the definition."""
    gate, mixture = found.knn_lm.gate, found.knn_lm.mixture
    assert gate is not None
    lm = found.lm[row].double().numpy()
    seen = np.array([-(np.exp(lm) * lm).sum(), lm.max()])
    if gate.gate.skip is not None and slow_network(gate.gate.skip.network, seen) < gate.gate.skip.threshold:
        return lm, 0.0, False
    distances, ids = reference.neighbors(found.queries[row].double().numpy(), found.keys.astype(np.float64), mixture.k)
    tokens = [found.documents.values[entry] for entry in ids]
    context = [token for token in found.contexts[row].tolist() if token >= 0]
    length = followed(context, [found.documents.left[entry] for entry in ids])
    features = slow_features(lm, distances.tolist(), tokens, mixture.temperature, length)
    weight = slow_network(cast(Any, gate.gate.form), np.array(features))
    weight = 0.0 if weight < gate.gate.floor else weight
    knn = reference.knn_probabilities(distances, np.array(tokens), mixture.temperature, VOCABULARY)
    return reference.mixture(lm, knn, weight), weight, True


def slow_network(form: Any, values: reference.Floats) -> float:
    values = (values - np.array(form.means)) / np.array(form.scales)
    for place, (matrix, biases) in enumerate(form.layers):
        values = np.array(matrix) @ values + np.array(biases)
        values = np.tanh(values) if place < len(form.layers) - 1 else values
    return float(1 / (1 + np.exp(-values[0])))


@given(SEEDS)
def test_mixing_equals_the_definition(seed: int) -> None:
    found = setting(seed, random_gate(seed))
    mixed = found.mix(list(range(6)))
    for row in range(6):
        log_probs, weight, searched = expected_row(found, row)
        assert bool(mixed.searched[row]) == searched
        assert float(mixed.weight[row]) == pytest.approx(weight, abs=2e-6)
        np.testing.assert_allclose(mixed.log_probs[row].double().exp().numpy(), np.exp(log_probs), rtol=1e-4, atol=1e-7)
        assert mixed.neighbors.found[row].any() == searched
        if weight == 0:
            assert torch.equal(mixed.log_probs[row].view(torch.int32), found.lm[row].view(torch.int32))
    assert found.index.queries == int(mixed.searched.sum())


def test_the_random_gates_skip_mix_and_give_0() -> None:
    """So the properties here are about something."""
    weights = torch.cat([setting(seed, random_gate(seed)).mix(list(range(6))).weight for seed in range(40)])
    searched = torch.cat([setting(seed, random_gate(seed)).mix(list(range(6))).searched for seed in range(40)])
    assert 0.1 < searched.double().mean() < 0.9
    assert (searched & (weights == 0)).any()
    assert len(weights[weights > 0].unique()) > 20


@given(SEEDS, st.integers(1, 40), st.sampled_from([1e-3, 0.7, 1e4]))
def test_features_are_those_of_the_definition(seed: int, k: int, temperature: float) -> None:
    found = setting(seed, None, 4, k=k)
    neighbors = found.knn_lm.retriever.retrieve(found.queries, k)
    lengths = followed_lengths(found.contexts, neighbors, cast(Any, found.documents))
    votes = neighbor_token_log_probs(neighbors, temperature)
    features = gate_features(LMSummary.of(found.lm), neighbors, votes, found.lm.gather(1, neighbors.tokens), lengths)
    for row in range(4):
        here = neighbors.row(row)
        left = [found.documents.left[entry] for entry in here.ids[0].tolist()]
        length = followed([token for token in found.contexts[row].tolist() if token >= 0], left)
        assert int(lengths[row]) == length
        lm = found.lm[row].double().numpy()
        expected = slow_features(lm, here.distances[0].double().tolist(), here.tokens[0].tolist(), temperature, length)
        np.testing.assert_allclose(features[row].numpy(), expected, rtol=1e-4, atol=2e-4)


@given(SEEDS, st.integers(1, 12))
def test_scoring_is_the_gather_of_mixing(seed: int, k: int) -> None:
    for gate in (random_gate(seed), None):
        found = setting(seed, gate, k=k)
        rows = list(range(6))
        mixed, scored = found.mix(rows), found.score(rows)
        targets = found.targets[:, None]
        assert torch.equal(scored.lm_log_probs, mixed.lm_log_probs.gather(1, targets)[:, 0])
        assert torch.equal(scored.weight, mixed.weight)
        assert torch.equal(scored.searched, mixed.searched)
        assert torch.equal(scored.neighbors.ids, mixed.neighbors.ids)
        torch.testing.assert_close(scored.knn_log_probs, mixed.knn_log_probs.gather(1, targets)[:, 0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(scored.log_probs, mixed.log_probs.gather(1, targets)[:, 0], rtol=1e-6, atol=1e-6)


@given(SEEDS)
def test_a_row_of_a_batch_is_bitwise_the_row_alone(seed: int) -> None:
    found = setting(seed, random_gate(seed))
    mixed, scored = found.mix([4, 0, 2, 5, 1, 3]), found.score([4, 0, 2, 5, 1, 3])
    for place, row in enumerate([4, 0, 2, 5, 1, 3]):
        alone, scored_alone = found.mix([row]), found.score([row])
        assert torch.equal(alone.weight[0], mixed.weight[place])
        assert torch.equal(alone.log_probs[0].view(torch.int32), mixed.log_probs[place].view(torch.int32))
        assert torch.equal(scored_alone.log_probs[0].view(torch.int32), scored.log_probs[place].view(torch.int32))


@given(SEEDS)
def test_rows_without_a_gate_are_what_they_are_without_any(seed: int) -> None:
    """In one batch: rows with two gates, rows with none at another k and temperature, and a row at weight 0."""
    found, other = setting(seed, random_gate(seed)), random_gate(seed + 7)
    gate = found.knn_lm.gate
    assert gate is not None
    asked = torch.tensor([0.4, 0.4, 0.4, 0.9, 0.0, 1.0], dtype=torch.float64)
    k, temperature = torch.tensor([5, 5, 5, 2, 5, 9]), torch.tensor([2.0, 2.0, 2.0, 0.3, 1.0, 40.0], dtype=torch.float64)
    parts = [
        GatedRows(gate, torch.tensor([0, 2]), found.contexts[[0, 2]]),
        GatedRows(StoreGate(other, gate.store), torch.tensor([1]), found.contexts[[1]]),
    ]
    weights = RowWeights(asked, found.lm, parts)
    neighbors = found.knn_lm.retriever.retrieve(found.queries, torch.where(weights.searched, k, 0))
    together = mix_neighbors(found.lm, neighbors, temperature=temperature, weights=weights)
    for row in (0, 2):
        torch.testing.assert_close(together.log_probs[row], found.mix([row]).log_probs[0], rtol=0, atol=1e-6)
    for row in (3, 4, 5):
        mixture = Mixture(int(k[row]), float(temperature[row]), float(asked[row]))
        alone = found.mix([row], mixture)
        torch.testing.assert_close(together.log_probs[row], alone.log_probs[0], rtol=0, atol=1e-6)
        assert float(together.weight[row]) == float(alone.weight[0]) == float(asked[row])
    assert weights.searched[3:].tolist() == [True, False, True]


def test_a_mixture_that_is_given_sets_the_gate_aside() -> None:
    found = setting(3, random_gate(3))
    mixture = found.knn_lm.mixture
    plain = setting(3, None)
    assert torch.equal(found.mix([0, 1, 2], mixture).log_probs, plain.mix([0, 1, 2]).log_probs)
    assert found.mix([0, 1, 2], mixture).weight.tolist() == [0.4] * 3
    assert found.score([0, 1], mixture).weight.tolist() == [0.4] * 2


@pytest.mark.parametrize("rows", [1, 6])
def test_a_gate_that_skips_all_makes_no_search(rows: int) -> None:
    never = Gate(random_gate(0).form, 0.0, SkipRule(network(len(LM_FEATURES), 0), 2.0))
    found = setting(1, never, rows)
    every = list(range(rows))
    mixed, scored = found.mix(every), found.score(every)
    assert found.index.queries == 0
    assert torch.equal(mixed.log_probs.view(torch.int32), found.lm.view(torch.int32))
    assert torch.equal(scored.log_probs, scored.lm_log_probs)
    assert (scored.knn_log_probs == -math.inf).all()
    assert mixed.weight.tolist() == scored.weight.tolist() == [0.0] * rows
    assert not mixed.searched.any()
    assert mixed.knn_share(0, 1) == 0.0


def test_neighbours_at_weight_0_have_no_share_even_of_what_the_lm_rules_out() -> None:
    neighbors = Neighbors(torch.zeros(1, 1), torch.tensor([[2]]), torch.tensor([[0]]))
    lm = torch.tensor([[0.0, -2000.0, -2000.0]])
    gate = GatedRows(StoreGate(constant_gate(0.0), cast(Any, Documents([[1, 2]]))), torch.tensor([0]), torch.tensor([context_of([1])]))
    weights = RowWeights(torch.ones(1, dtype=torch.float64), lm, [gate])
    mixed = mix_neighbors(lm, neighbors, temperature=1.0, weights=weights)
    assert mixed.searched.tolist() == [True]
    assert torch.equal(mixed.log_probs, lm)
    assert mixed.knn_share(0, 2) == 0.0
    assert mixed.knn_log_prob(0, 2) == 0.0


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_a_row_that_finds_nobody_is_the_lm(weight: float) -> None:
    found = setting(5, constant_gate(weight))
    nobody = Neighbors.empty(6, 3)
    _, weights = found.knn_lm.settings(found.lm, None, found.contexts)
    mixed = mix_neighbors(found.lm, nobody, temperature=2.0, weights=weights)
    assert torch.equal(mixed.log_probs.view(torch.int32), found.lm.view(torch.int32))
    assert mixed.weight.tolist() == [0.0] * 6
    assert mixed.searched.all()


EDGES = st.sampled_from([1e-3, 0.04, 1.0, 50.0, 1e4])


@given(SEEDS, st.sampled_from([0.0, 1e-12, 0.25, 1.0]), EDGES, st.sampled_from([1, 2, 40]), st.booleans(), st.booleans())
def test_edges_of_mixture_and_store(seed: int, weight: float, temperature: float, k: int, one_token: bool, duplicates: bool) -> None:
    """λ 0 and 1, T from 1e-3 to 1e4, one neighbour, all of one token, equal keys: a distribution, and scored as mixed."""
    for gated in (False, True):
        found = setting(seed, constant_gate(weight) if gated else None)
        documents = [[1, 3, 3, 3, 3]] * 2 if one_token else [[1, 2, 3, 4, 5, 6]] * 2
        values = Documents(documents).values
        keys = np.zeros((len(values), DIMENSION), np.float32) if duplicates else found.keys[: len(values)]
        stored = ShardedRows([keys], [0])
        found.knn_lm.retriever = Retriever(ExactIndex(stored), stored, ShardedRows([np.array(values, np.int32)], [0]))
        mixture = None if gated else Mixture(k, temperature, weight)
        if gated:
            found.knn_lm.mixture = Mixture(k, temperature, weight)
        rows = list(range(6))
        mixed, scored = found.mix(rows, mixture), found.score(rows, mixture)
        assert not mixed.log_probs.isnan().any()
        np.testing.assert_allclose(mixed.log_probs.double().exp().sum(1).numpy(), 1, atol=2e-6)
        torch.testing.assert_close(scored.log_probs, mixed.log_probs.gather(1, found.targets[:, None])[:, 0], rtol=1e-6, atol=1e-6)
        if weight == 0:
            assert torch.equal(mixed.log_probs.view(torch.int32), found.lm.view(torch.int32))
        if weight == 1:
            assert torch.equal(mixed.log_probs, mixed.knn_log_probs)
        for row in rows:
            distances, ids = reference.neighbors(found.queries[row].double().numpy(), keys.astype(np.float64), k)
            knn = reference.knn_probabilities(distances, np.array(values)[ids], temperature, VOCABULARY)
            expected = reference.mixture(found.lm[row].double().numpy(), knn, weight)
            # A float32 distance is known to a few parts in 1e7; over a small temperature that is a difference of log-probabilities.
            error = 1e-5 + 4e-6 * float(distances[-1]) / temperature
            probable = expected > -20
            np.testing.assert_allclose(mixed.log_probs[row].double().numpy()[probable], expected[probable], rtol=0, atol=error)


@pytest.mark.parametrize("token", [VOCABULARY, 10**6, -1])
def test_tokens_outside_the_vocabulary_are_refused(token: int) -> None:
    found = setting(0, random_gate(0))
    with pytest.raises(InvalidInput, match="token ids"):
        found.knn_lm.next_token([1, token])


class Widths(TorchDispatchMode):
    """Remembers how many values the largest tensor had that was made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, torch.Tensor):
                self.largest = max(self.largest, made.untyped_storage().nbytes())
        return out


def test_scoring_makes_nothing_as_wide_as_the_vocabulary() -> None:
    """Beside what the LM itself says, memory grows with neighbours and not with the vocabulary."""
    vocabulary, rows = 40_000, 16
    for gate in (None, constant_gate(0.5)):
        found = setting(0, gate, rows, k=8)
        found.lm = torch.randn(rows, vocabulary).log_softmax(-1)
        neighbors = found.knn_lm.retriever.retrieve(found.queries, 8)
        _, weights = found.knn_lm.settings(found.lm, None, found.contexts)
        with Widths() as made:
            scoring.mix_targets(found.lm, found.targets, neighbors, temperature=2.0, weights=weights)
        # gather and indexing look at the LM's own log-probabilities but copy none.
        assert made.largest < 4 * vocabulary
        with Widths() as dense:
            mix_neighbors(found.lm, neighbors, temperature=2.0, weights=weights)
        assert dense.largest >= 4 * vocabulary * rows


def test_rows_without_a_gate_are_summed_up_by_nobody() -> None:
    found = setting(0, None)
    with mock.patch.object(LMSummary, "of", side_effect=AssertionError("nobody asks")):
        found.mix([0, 1, 2])
        found.score([0, 1, 2])


def test_contexts_are_the_last_tokens_at_each_column() -> None:
    tokens = torch.arange(40).view(2, 20) + 1
    contexts = contexts_of(tokens)
    assert contexts.shape == (2, 20, 16)
    for row in range(2):
        for column in range(20):
            assert contexts[row, column].tolist() == context_of(tokens[row, : column + 1].tolist())
    assert context_of([]) == [-1] * 16
    assert context_of([7, 8]) == [-1] * 14 + [7, 8]


def test_lm_features_sum_up_each_row_by_itself() -> None:
    """Bit for bit, with more tokens than one thread sums up."""
    lm = torch.randn(5, 50_257, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    lm[0, 0], lm[0, 1:] = 0.0, -math.inf
    features = lm_features(LMSummary.of(lm))
    for row in range(5):
        assert torch.equal(lm_features(LMSummary.of(lm[[row]]))[0], features[row])
    assert features[0].tolist() == [0.0, 0.0]
