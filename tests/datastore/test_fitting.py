"""Datastores that may be mixed and those that may not, each refused with both sides; and mixes opened from Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import knnlm
from knnlm.datastore.fitting import require_mixable, require_special_tokens
from knnlm.datastore.manifest import Manifest
from knnlm.errors import InvalidInput, StoreMismatch
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel, KeyLayer, ModelFingerprint
from knnlm.opening import open_searchable
from tests import reference
from tests.stores import build, text_folder
from tests.tiny import tiny_corpus

MIXTURE = Mixture(k=6, temperature=8.0, weight=0.5)
PROMPT = "The farmer carried"


@pytest.fixture(scope="module")
def stores(gpt2: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("fitting")
    texts = {"news": tiny_corpus(4, seed=1), "law": tiny_corpus(5, seed=2)}
    for name, documents in texts.items():
        build(text_folder(folder / f"{name}-text", documents), folder / name, gpt2, index="Flat", keys="float32", max_length=16)
    return {name: folder / name for name in texts}


def other_model(manifest: Manifest, **parts: str) -> Manifest:
    fingerprint = {**vars(manifest.model.fingerprint), **parts}
    return replace(manifest, model=replace(manifest.model, name="models/other", fingerprint=ModelFingerprint(**fingerprint)))


CHANGES: dict[str, tuple[Callable[[Manifest], Manifest], str]] = {
    "configuration": (
        lambda m: other_model(m, configuration="f" * 32),
        r"the model's configuration of 'news' is .*, of 'law' f{12} \(models/",
    ),
    "tokenizer": (lambda m: other_model(m, tokenizer="f" * 32), r"the model's tokenizer of 'news' is .*, of 'law' f{12} \(models/other\)"),
    "weights": (lambda m: other_model(m, weights="f" * 32), r"the model's weights of 'news' is .*, of 'law' f{12} \(models/other\)"),
    "bos": (lambda m: replace(m, text=replace(m.text, bos_id=0)), "of 'news' is no BOS and no EOS, of 'law' BOS 0 and no EOS"),
    "eos": (lambda m: replace(m, text=replace(m.text, eos_id=7)), "of 'news' is no BOS and no EOS, of 'law' no BOS and EOS 7"),
    "layer": (
        lambda m: replace(m, key=replace(m.key, layer=KeyLayer("last_hidden", "transformer.ln_f", True))),
        r"the key layer of 'news' is last_ffn_input \(transformer.h.1.mlp\), of 'law' last_hidden \(transformer.ln_f\)",
    ),
    "width": (lambda m: replace(m, key=replace(m.key, dimension=64)), "the width of keys of 'news' is 32, of 'law' 64"),
    "distance": (lambda m: replace(m, key=replace(m.key, dtype="none")), "the kind of distance of 'news' is 'exact', of 'law' 'index'"),
}


@pytest.mark.parametrize("part", CHANGES)
def test_what_does_not_fit_is_refused_with_both_sides(part: str, stores: dict[str, Path]) -> None:
    news, law = (Manifest.read(stores[name]) for name in ("news", "law"))
    change, sentence = CHANGES[part]
    with pytest.raises(StoreMismatch, match=f"The datastores 'news' and 'law' can't be mixed: .*{sentence}"):
        require_mixable({"news": news, "more": news, "law": change(law)})


def test_what_makes_no_difference_is_not_refused(stores: dict[str, Path]) -> None:
    news, law = (Manifest.read(stores[name]) for name in ("news", "law"))
    moved = replace(law, model=replace(law.model, name="elsewhere/gpt2", revision="main"), key=replace(law.key, dtype="float16"))
    require_mixable({"news": news, "law": moved})
    require_mixable({"news": news})


def test_special_tokens_of_prompts_and_documents(stores: dict[str, Path], gpt2: HFLanguageModel) -> None:
    manifest = Manifest.read(stores["news"])
    require_special_tokens(manifest, gpt2.tokenizer())
    with pytest.raises(
        StoreMismatch, match="documents have no BOS and no EOS, but the prompts and documents that are served have BOS 0 and EOS 0"
    ):
        require_special_tokens(manifest, gpt2.tokenizer("yes", eos=True))


def test_a_mix_of_opened_stores_equals_numpy(stores: dict[str, Path]) -> None:
    mix = knnlm.open_mix(stores, weights={"law": 3.0}, k=MIXTURE.k, temperature=MIXTURE.temperature, weight=MIXTURE.weight)
    found = mix.next_token(PROMPT)
    lm = mix.next_token(PROMPT, replace(MIXTURE, weight=0.0)).log_probs[0].double().numpy()
    tokens = mix.knn_lm.tokenizer.encode(PROMPT)
    query = mix.model.forward(torch.tensor([tokens])).keys[0, -1].double().numpy()
    scores, values = [], []
    for name, prior in (("news", 1.0), ("law", 3.0)):
        store = mix.stores[name].store
        assert store.keys is not None
        distances, ids = reference.neighbors(query, store.keys.slice(0, len(store)).double().numpy(), MIXTURE.k)
        scores += (-distances / MIXTURE.temperature + np.log(prior)).tolist()
        values += store.values.slice(0, len(store)).numpy()[ids].tolist()
    shares = np.exp(np.array(scores) - np.logaddexp.reduce(scores))
    knn = np.bincount(values, weights=shares, minlength=len(lm))
    np.testing.assert_allclose(found.log_probs[0].exp().numpy(), np.exp(reference.mixture(lm, knn, MIXTURE.weight)), atol=2e-5)
    assert found.neighbors.stores is not None
    number, entry = int(found.neighbors.stores[0, 0]), int(found.neighbors.ids[0, 0])
    name, evidence = mix.evidence(number, entry)
    assert name == ["news", "law"][number]
    assert evidence.token_id == int(found.neighbors.tokens[0, 0])


def test_a_mix_of_one_is_that_one(stores: dict[str, Path]) -> None:
    alone = knnlm.open_store(stores["law"], k=6, weight=0.5)
    mix = knnlm.open_mix({"law": stores["law"]}, weights={"law": 9.0}, k=6, weight=0.5)
    assert torch.equal(alone.next_token(PROMPT).log_probs, mix.next_token(PROMPT).log_probs)
    assert alone.generate(PROMPT, max_new_tokens=8) == mix.generate(PROMPT, max_new_tokens=8)


def test_names_that_are_not_there_and_no_names(stores: dict[str, Path]) -> None:
    with pytest.raises(InvalidInput, match="weights: names laws, but the datastores are news, law"):
        knnlm.open_mix(stores, weights={"laws": 2.0})
    with pytest.raises(InvalidInput, match="stores: is empty"):
        knnlm.open_mix({})


def test_a_store_is_opened_for_a_model_that_is_loaded_already(stores: dict[str, Path]) -> None:
    opened, with_model = open_searchable(stores["news"], dtype="float32", k=3), knnlm.open_store(stores["news"], k=3)
    assert (opened.mixture, opened.mixture_source) == (with_model.knn_lm.mixture, "k given, the rest defaults")
    assert opened.mixture_source == with_model.mixture_source
    query = torch.zeros(1, 32)
    assert torch.equal(opened.retriever.retrieve(query, 3).ids, with_model.retriever.retrieve(query, 3).ids)
