"""The kNN language model end to end on tiny models, against a slow one in NumPy that shares no code with it."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from knnlm.datastore.reader import ShardedRows
from knnlm.entry_mask import EntryMask
from knnlm.errors import InvalidInput
from knnlm.index import Candidates, ExactIndex
from knnlm.knn_lm import KNNLanguageModel
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel
from knnlm.retrieval import Retriever
from knnlm.windows import Windowing, windows
from tests import reference
from tests.tiny import VOCABULARY, tiny_corpus

WINDOWING = Windowing(24, 10)
FEED_FORWARD = {"gpt2": "transformer.h.1.mlp", "llama": "model.layers.1.mlp"}


class CountingIndex(ExactIndex):
    """Exact search that remembers how many queries it was asked."""

    searched = 0

    def search(self, queries: torch.Tensor, k: int, count: int, *, probes: int = 0, allowed: EntryMask | None = None) -> Candidates:
        self.searched += len(queries)
        return super().search(queries, k, count, probes=probes, allowed=allowed)


def entries_of(model: HFLanguageModel, documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values as the product makes them: a window at a time."""
    keys, values = [], []
    for tokens in documents:
        for window in windows(len(tokens), WINDOWING):
            out = model.forward(torch.tensor([tokens[window.start : window.end - 1]]), logits=False)
            keys.append(out.keys[0, -window.target_count :].numpy())
            values.extend(tokens[window.first_target : window.end])
    return np.concatenate(keys), np.array(values, dtype=np.int32)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def family(request: pytest.FixtureRequest, tiny_gpt2_path: Path, tiny_llama_path: Path) -> tuple[str, Path]:
    return request.param, {"gpt2": tiny_gpt2_path, "llama": tiny_llama_path}[request.param]


class Setting:
    """A product model with an in-memory datastore, and the reference's idea of the same."""

    def __init__(self, name: str, path: Path) -> None:
        self.model = HFLanguageModel.load(path)
        self.tokenizer = self.model.tokenizer()
        self.texts = tiny_corpus(5, seed=3)
        self.documents = [self.tokenizer.encode(text)[:70] for text in self.texts]
        self.keys, self.values = entries_of(self.model, self.documents)
        rows = ShardedRows([self.keys], [0])
        self.index = CountingIndex(rows)
        self.knn_lm = KNNLanguageModel(self.model, self.tokenizer, Retriever(self.index, rows, ShardedRows([self.values], [0])))
        self.feed_forward = FEED_FORWARD[name]
        self.hf_model = AutoModelForCausalLM.from_pretrained(path, dtype="float64").eval()
        self.expected = reference.score(self.hf_model, self.feed_forward, self.documents, WINDOWING.max_length, WINDOWING.stride)


@cache
def _setting(name: str, path: Path) -> Setting:
    return Setting(name, path)


@pytest.fixture
def setting(family: tuple[str, Path]) -> Setting:
    return _setting(*family)


def test_entries_equal_one_forward_pass_per_token(setting: Setting) -> None:
    assert setting.values.tolist() == setting.expected.values.tolist()
    assert len(setting.values) == sum(len(tokens) - 1 for tokens in setting.documents)
    np.testing.assert_allclose(setting.keys, setting.expected.keys, atol=1e-5 * np.abs(setting.expected.keys).max())


@pytest.mark.parametrize(
    "mixture", [Mixture(8, 10.0, 0.25), Mixture(1, 1.0, 0.5), Mixture(64, 200.0, 1.0), Mixture(4096, 3.0, 0.9), Mixture(3, 0.5, 0.0)]
)
def test_next_token_equals_the_reference(setting: Setting, mixture: Mixture) -> None:
    for text in (*[text[:40] for text in tiny_corpus(3, seed=8)], setting.texts[0][:50], "😀 unseen words"):
        tokens = setting.tokenizer.encode(text)
        query, lm = reference.key_and_log_probs(setting.hf_model, setting.feed_forward, tokens)
        expected = reference.knn_lm_log_probs(
            query, lm, setting.expected.keys, setting.expected.values, k=mixture.k, temperature=mixture.temperature, weight=mixture.weight
        )
        found = setting.knn_lm.next_token(text, mixture)
        assert found.log_probs.shape == (1, VOCABULARY)
        assert found.log_probs.exp().sum().item() == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(found.log_probs[0].double().exp().numpy(), np.exp(expected), rtol=5e-4, atol=1e-7)
        if mixture.weight:
            assert found.neighbors.ids[0, 0] == reference.neighbors(query, setting.expected.keys, 1)[1][0]


def test_text_from_the_store_is_predicted_by_its_own_entry(setting: Setting) -> None:
    tokens = setting.documents[0][:20]
    found = setting.knn_lm.next_token(tokens[:9], Mixture(4, 0.01, 1.0))
    assert found.neighbors.ids[0, 0] == 8
    assert int(found.log_probs.argmax()) == tokens[9]


def test_token_ids_and_text_are_the_same_prompt(setting: Setting) -> None:
    text = "The sailor sold"
    one, other = (setting.knn_lm.next_token(prompt) for prompt in (text, setting.tokenizer.encode(text)))
    assert torch.equal(one.log_probs, other.log_probs)


def batch(setting: Setting, rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    out = setting.model.forward(torch.tensor([setting.documents[1][:rows]]))
    assert out.logits is not None
    return out.logits[0].log_softmax(-1), out.keys[0]


def test_each_row_has_its_own_settings(setting: Setting) -> None:
    lm, queries = batch(setting)
    k, temperature = torch.tensor([1, 5, 64, 2, 9, 9]), torch.tensor([1.0, 2, 30, 4, 5, 0.1], dtype=torch.float64)
    weight = torch.tensor([0.1, 0.0, 1.0, 0.5, 0.25, 0.9], dtype=torch.float64)
    mixed = setting.knn_lm.mix(lm, queries, k=k, temperature=temperature, weight=weight)
    assert mixed.weight.tolist() == weight.tolist()
    for row in range(len(lm)):
        expected = reference.knn_lm_log_probs(
            queries[row].double().numpy(), lm[row].double().numpy(), setting.keys.astype(np.float64), setting.values,
            k=int(k[row]), temperature=float(temperature[row]), weight=float(weight[row]),
        )  # fmt: skip
        np.testing.assert_allclose(mixed.log_probs[row].double().exp().numpy(), np.exp(expected), rtol=1e-4, atol=1e-8)
        alone = setting.knn_lm.mix(lm[[row]], queries[[row]], k=k[[row]], temperature=temperature[[row]], weight=weight[[row]])
        assert torch.equal(alone.log_probs[0], mixed.log_probs[row])
        assert torch.equal(alone.neighbors.ids[0], mixed.neighbors.row(row).ids[0])


def test_rows_with_weight_0_are_not_searched_and_are_the_lm_bit_for_bit(setting: Setting) -> None:
    lm, queries = batch(setting, 3)
    before = setting.index.searched
    everything_off = setting.knn_lm.mix_all(lm, queries, Mixture(weight=0.0))
    assert setting.index.searched == before
    assert torch.equal(everything_off.log_probs.view(torch.int32), lm.view(torch.int32))
    assert (everything_off.knn_log_probs == -math.inf).all()
    weight = torch.tensor([0.0, 0.5, 0.0], dtype=torch.float64)
    mixed = setting.knn_lm.mix(lm, queries, k=torch.full((3,), 4), temperature=torch.ones(3, dtype=torch.float64), weight=weight)
    assert setting.index.searched == before + 1
    assert torch.equal(mixed.log_probs[[0, 2]].view(torch.int32), lm[[0, 2]].view(torch.int32))
    assert not mixed.neighbors.found[[0, 2]].any()
    assert not torch.equal(mixed.log_probs[1], lm[1])


def test_rows_that_find_nothing_are_the_lm_and_say_weight_0(setting: Setting) -> None:
    class Nothing(ExactIndex):
        def search(self, queries: torch.Tensor, k: int, count: int, *, probes: int = 0, allowed: EntryMask | None = None) -> Candidates:
            return Candidates(torch.full((len(queries), count), math.inf), torch.full((len(queries), count), -1))

    rows = ShardedRows([setting.keys], [0])
    lm, queries = batch(setting, 2)
    knn_lm = KNNLanguageModel(setting.model, setting.tokenizer, Retriever(Nothing(rows), rows, ShardedRows([setting.values], [0])))
    mixed = knn_lm.mix_all(lm, queries, Mixture(4, 1.0, 0.7))
    assert torch.equal(mixed.log_probs, lm)
    assert mixed.weight.tolist() == [0, 0]


def test_weight_1_is_p_knn(setting: Setting) -> None:
    lm, queries = batch(setting, 2)
    mixed = setting.knn_lm.mix_all(lm, queries, Mixture(4, 1.0, 1.0))
    assert torch.equal(mixed.log_probs, mixed.knn_log_probs)
    assert (mixed.log_probs == -math.inf).any()


@pytest.mark.parametrize(
    ("field", "mixture"),
    [
        *(("k", Mixture(k=k)) for k in (0, -1)),
        *(("knn_temperature", Mixture(temperature=temperature)) for temperature in (0, -1, math.inf, math.nan)),
        *(("weight", Mixture(weight=weight)) for weight in (-0.1, 1.1, math.nan)),
    ],
)
def test_settings_out_of_range_are_refused_by_field(setting: Setting, field: str, mixture: Mixture) -> None:
    for refuse in (mixture.validate, lambda: setting.knn_lm.next_token("a", mixture)):
        with pytest.raises(InvalidInput) as refused:
            refuse()
        assert refused.value.field == field


def test_nothing_to_predict_from_is_refused(setting: Setting) -> None:
    with pytest.raises(InvalidInput) as refused:
        setting.knn_lm.next_token([])
    assert refused.value.field == "text"


@pytest.mark.parametrize("tokens", [[1] * 65, [VOCABULARY], [-1]])
def test_prompts_that_the_model_cannot_read_are_refused(setting: Setting, tokens: list[int]) -> None:
    with pytest.raises(InvalidInput) as refused:
        setting.knn_lm.next_token(tokens)
    assert refused.value.field == "text"
