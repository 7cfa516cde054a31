"""Several datastores in one engine: rows that chose differently in one batch, contexts that are looked up, and changes below them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from knnlm.datastore.removal import remove_documents
from knnlm.datastore_mix import StoreMix
from knnlm.distribution import log_weights
from knnlm.evaluation.scoring import score
from knnlm.knn_lm import KNNLanguageModel
from knnlm.mixture import Mixture
from knnlm.opening import SearchableStore, open_searchable
from knnlm.retrieval import Retriever
from knnlm_server import store_watch
from knnlm_server.datastores import Datastores
from knnlm_server.errors import DatastoreNotLoaded, EngineFailed
from knnlm_server.sequence import (
    DetailParams,
    GenerationRequest,
    RetrievalParams,
    RetrieveRequest,
    RetrieveResult,
    ScoreRequest,
    TokenEvent,
)
from tests.engine.harness import LM_ALONE, CountingIndex, Parts, complete, drive, make_engine, random_prompt, request
from tests.engine.serving import mapped, mixing, store_of

DETAIL = DetailParams(log_probs=True, neighbors=40)
CHOICES = [
    mixing("news"), mixing("law", k=3), mixing("news", "law"), mixing("law", news=0.2, k=5), mixing("news", wiki=6.0, temperature=2.0),
    mixing("news", "law", "wiki", weight=1.0), LM_ALONE, mixing(),
]  # fmt: skip


@pytest.fixture(scope="module")
def paths(gpt2: Parts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("several")
    sizes = {"news": 8, "law": 12, "wiki": 5}
    return {name: store_of(gpt2.model, folder / name, count, seed) for seed, (name, count) in enumerate(sizes.items())}


@pytest.fixture
def served(gpt2: Parts, paths: dict[str, Path]) -> Datastores:
    datastores = Datastores(gpt2.model, gpt2.knn_lm.tokenizer)
    for name, path in paths.items():
        datastores.load(name, path)
    return datastores


def asked(name: str, retrieval: RetrievalParams, seed: int = 0, tokens: int = 8) -> GenerationRequest:
    return request(name, random_prompt(5 + seed, seed + 1), retrieval=retrieval, detail=DETAIL, max_new_tokens=tokens, ignore_eos=True)


def lookup(name: str, tokens: list[int], retrieval: RetrievalParams, neighbors: int = 100) -> RetrieveRequest:
    return RetrieveRequest(name, tuple(tokens), retrieval, neighbors)


def library(gpt2: Parts, served: Datastores, retrieval: RetrievalParams) -> KNNLanguageModel:
    """What the library makes of the datastores that ``retrieval`` names."""
    chosen = served.choose(retrieval).weights
    mix = StoreMix([one.retriever for one, _ in chosen], [weight for _, weight in chosen])
    return KNNLanguageModel(gpt2.model, gpt2.knn_lm.tokenizer, mix, Mixture(retrieval.k, retrieval.temperature, retrieval.weight))


def places(event: TokenEvent) -> list[tuple[str, int]]:
    return [(neighbor.datastore, neighbor.entry) for neighbor in event.neighbors]


def test_rows_with_different_mixes_are_each_alone(gpt2: Parts, served: Datastores) -> None:
    requests = [asked(f"{number}", choice, number) for number, choice in enumerate(CHOICES)]
    together = complete(make_engine(gpt2, datastores=served), *requests)
    for number, (one, choice) in enumerate(zip(requests, CHOICES, strict=True)):
        alone = complete(make_engine(gpt2, datastores=served), one)[one.request_id]
        assert together[one.request_id].tokens == alone.tokens
        for event, other in zip(together[one.request_id].events, alone.events, strict=True):
            assert places(event) == places(other)
            assert event.log_prob == pytest.approx(other.log_prob, abs=1e-6)
        named = {neighbor.datastore for event in alone.events for neighbor in event.neighbors}
        expected = {chosen.name for chosen in choice.datastores} or {"news"}
        assert named == (expected if choice.weight else set()), number


@pytest.mark.parametrize("choice", CHOICES[:6], ids=lambda choice: "+".join(one.name for one in choice.datastores))
def test_tokens_and_neighbours_equal_the_librarys(gpt2: Parts, served: Datastores, choice: RetrievalParams) -> None:
    one = asked("a", choice, tokens=5)
    knn_lm, tokens = library(gpt2, served, choice), list(one.prompt)
    names = [chosen.name for chosen in choice.datastores]
    for event in complete(make_engine(gpt2, datastores=served), one)["a"].events:
        expected = knn_lm.next_token(tokens)
        assert event.token_id == int(expected.log_probs.argmax())
        assert event.log_prob == pytest.approx(float(expected.log_probs[0, event.token_id]), abs=1e-6)
        assert expected.neighbors.stores is not None
        found = zip(expected.neighbors.stores[0].tolist(), expected.neighbors.ids[0].tolist(), strict=True)
        assert set(places(event)) == {(names[store], entry) for store, entry in found}
        shares = log_weights(expected.neighbors, choice.temperature).exp()[0].tolist()
        assert [neighbor.weight for neighbor in event.neighbors] == pytest.approx(shares, abs=1e-5)
        tokens.append(event.token_id)


def test_each_datastore_is_searched_once_a_step_for_the_rows_that_use_it(gpt2: Parts, paths: dict[str, Path]) -> None:
    datastores, indexes = Datastores(gpt2.model, gpt2.knn_lm.tokenizer), {}
    for name, path in paths.items():
        opened = open_searchable(path, dtype=gpt2.model.dtype)
        indexes[name] = CountingIndex(opened.retriever.index)
        retriever = Retriever(indexes[name], opened.store.keys, opened.store.values)
        datastores.serve(name, SearchableStore(opened.store, retriever, opened.mixture, "the test"))
    calls = dict.fromkeys(indexes, 0)
    for name, index in indexes.items():
        index.search = _counted(index.search, calls, name)  # type: ignore[method-assign]
    engine = make_engine(gpt2, datastores=datastores)
    prompt = random_prompt(5, 1)
    for number, choice in enumerate([mixing("news"), mixing("news", "law"), mixing("law"), LM_ALONE]):
        engine.add(request(f"{number}", prompt, retrieval=choice, max_new_tokens=4, ignore_eos=True))
    drive(engine)
    assert {name: index.queries for name, index in indexes.items()} == {"news": 8, "law": 8, "wiki": 0}
    assert calls == {"news": 4, "law": 4, "wiki": 0}


def _counted(search: Callable[..., object], calls: dict[str, int], name: str) -> Callable[..., object]:
    def counting(*args: object, **options: object) -> object:
        calls[name] += 1
        return search(*args, **options)

    return counting


def test_a_datastore_that_fails_ends_those_who_use_it(gpt2: Parts, served: Datastores, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = served.choose(mixing("law")).weights[0][0].retriever
    alone = complete(make_engine(gpt2, datastores=served), asked("news", mixing("news")))["news"]

    def lost(*_: object) -> None:
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(broken, "retrieve", lost)
    engine = make_engine(gpt2, datastores=served)
    engine.add_retrieve(lookup("looked up", [5, 6], mixing("law", weight=1.0)))
    engine.add_score(ScoreRequest("scored", (5, 6, 7), mixing("law")))
    answers = complete(engine, asked("news", mixing("news")), asked("both", mixing("news", "law")), asked("law", mixing("law")))
    assert {name for name, answer in answers.items() if answer.failure} == {"both", "law", "looked up", "scored"}
    assert answers["news"].tokens == alone.tokens


# Contexts that are looked up.


@pytest.mark.parametrize("choice", CHOICES[:5], ids=lambda choice: "+".join(one.name for one in choice.datastores))
@pytest.mark.parametrize("step_tokens", [3, 512])
def test_a_lookup_is_what_would_vote_on_the_next_token(gpt2: Parts, served: Datastores, choice: RetrievalParams, step_tokens: int) -> None:
    prompt = random_prompt(20, 4)
    voters = complete(make_engine(gpt2, datastores=served), request("a", prompt, retrieval=choice, detail=DETAIL, max_new_tokens=1))["a"]
    engine = make_engine(gpt2, step_tokens, datastores=served)
    engine.add_retrieve(lookup("r", prompt, choice))
    engine.add_retrieve(lookup("few", prompt, choice, neighbors=2))
    answers = complete(engine, *(asked(f"{number}", other, number) for number, other in enumerate(CHOICES)))
    found = answers["r"].neighbors
    assert found is not None
    expected = voters.events[0].neighbors
    assert [(n.datastore, n.entry, n.document_id, n.line) for n in found.neighbors] == [
        (n.datastore, n.entry, n.document_id, n.line) for n in expected
    ]
    assert [n.weight for n in found.neighbors] == pytest.approx([n.weight for n in expected], abs=1e-5)
    assert sum(n.weight for n in found.neighbors) == pytest.approx(1, abs=1e-5)
    few = answers["few"].neighbors
    assert few is not None
    assert [(n.datastore, n.entry) for n in few.neighbors] == [(n.datastore, n.entry) for n in found.neighbors[:2]]


def test_lookups_leave_completions_as_they_are_alone(gpt2: Parts, served: Datastores) -> None:
    requests = [asked(f"{number}", choice, number) for number, choice in enumerate(CHOICES[:4])]
    engine = make_engine(gpt2, 16, datastores=served, max_concurrent=3)
    actions = {
        step: [lambda step=step: engine.add_retrieve(lookup(f"r{step}", random_prompt(9 + step, step), mixing("law", weight=1.0)))]
        for step in range(12)
    }
    for one in requests:
        engine.add(one)
    answers = drive(engine, actions)
    assert [name for name in answers if answers[name].neighbors] == [f"r{step}" for step in range(12)]
    for one in requests:
        assert answers[one.request_id].tokens == complete(make_engine(gpt2, datastores=served), one)[one.request_id].tokens


def test_a_lookup_can_be_cancelled_and_leaves_its_row(gpt2: Parts, served: Datastores) -> None:
    engine = make_engine(gpt2, 4, datastores=served, max_concurrent=1)
    engine.add_retrieve(lookup("given up", random_prompt(30, 1), mixing("law", weight=1.0)))
    engine.add_retrieve(lookup("waits", random_prompt(3, 1), mixing("law", weight=1.0)))
    engine.step()
    engine.cancel("given up")
    answers = drive(engine)
    assert set(answers) == {"waits"}
    assert isinstance(answers["waits"].neighbors, RetrieveResult)


def test_a_lookup_in_an_empty_datastore_finds_nobody(gpt2: Parts, tmp_path: Path) -> None:
    path = store_of(gpt2.model, tmp_path / "emptied", 3)
    datastores = Datastores(gpt2.model, gpt2.knn_lm.tokenizer)
    served = datastores.serve("emptied", open_searchable(path, dtype=gpt2.model.dtype))
    remove_documents(path, [served.store.documents[row].id for row in range(3)])
    engine = make_engine(gpt2, datastores=datastores)
    engine.add_retrieve(lookup("r", [5, 6], mixing(weight=1.0)))
    assert drive(engine)["r"].neighbors == RetrieveResult(())


# Scores.


@pytest.mark.parametrize("choice", [mixing("law"), mixing("news", law=3.0), mixing(weight=0.0)])
def test_scores_over_a_mix_equal_the_librarys(gpt2: Parts, served: Datastores, choice: RetrievalParams) -> None:
    tokens = random_prompt(90, 3)
    engine = make_engine(gpt2, datastores=served)
    engine.add_score(ScoreRequest("s", tuple(tokens), choice))
    scores = drive(engine)["s"].scores
    assert scores is not None
    mixture = Mixture(choice.k, choice.temperature, choice.weight)
    expected = np.empty(len(tokens) - 1)
    for batch in score(library(gpt2, served, choice), [np.array(tokens)], served.windowing(choice), mixture):
        expected[batch.rows] = batch.log_probs.numpy()
    np.testing.assert_allclose(scores.log_probs, expected, atol=1e-5)


# Changes while requests run.


def test_running_and_queued_requests_keep_what_they_began_with(gpt2: Parts, served: Datastores, paths: dict[str, Path]) -> None:
    requests = [asked(f"{number}", mixing("law", "wiki"), number, tokens=12) for number in range(3)]
    expected = {one.request_id: complete(make_engine(gpt2, datastores=served), one)[one.request_id] for one in requests}
    engine = make_engine(gpt2, datastores=served, max_concurrent=1)
    for one in requests:
        engine.add(one)
    answers = drive(engine, {3: [lambda: served.unload("law"), lambda: served.reload("wiki", paths["news"])]})
    for name, answer in answers.items():
        assert answer.tokens == expected[name].tokens
        assert [places(event) for event in answer.events] == [places(event) for event in expected[name].events]
    with pytest.raises(DatastoreNotLoaded, match="there are news, wiki"):
        engine.add(asked("late", mixing("law")))
    assert engine.idle


def test_what_was_unloaded_is_unmapped_when_the_last_request_ends(gpt2: Parts, tmp_path: Path) -> None:
    path = store_of(gpt2.model, tmp_path / "gone", index="IVF4,SQ8")
    datastores = Datastores(gpt2.model, gpt2.knn_lm.tokenizer)
    datastores.load("gone", path)
    engine = make_engine(gpt2, datastores=datastores, max_concurrent=1)
    seen: list[bool] = []
    engine.add(asked("first", mixing(), tokens=6))
    engine.add(asked("queued", mixing(), tokens=6))
    engine.add_retrieve(lookup("r", [5, 6], mixing(weight=1.0)))
    engine.add_score(ScoreRequest("s", tuple(random_prompt(60, 1)), mixing()))
    answers = drive(
        engine, {2: [lambda: datastores.unload("gone")], **{step: [lambda: seen.append(mapped(path))] for step in range(3, 10)}}
    )
    assert all(answer.failure is None for answer in answers.values())
    assert seen == [True] * 7
    assert not mapped(path)
    assert datastores.in_use() == []


def test_a_request_that_fails_or_is_cancelled_lets_its_datastore_go(
    gpt2: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # A log that a test keeps has the frames of the step in it, and with them the datastore.
    caplog.set_level(logging.CRITICAL, logger="knnlm_server")
    path = store_of(gpt2.model, tmp_path / "gone")
    datastores = Datastores(gpt2.model, gpt2.knn_lm.tokenizer)
    datastores.load("gone", path)
    engine = make_engine(gpt2, datastores=datastores)
    for name in ("cancelled", "failed", "given up"):
        engine.add(asked(name, mixing(), tokens=6))
    datastores.unload("gone")
    engine.step()
    engine.cancel("cancelled")
    monkeypatch.setattr(engine, "_event", _broken)
    outputs = engine.step()
    assert [type(output.content) for output in outputs] == [EngineFailed, EngineFailed]
    assert engine.idle
    assert not mapped(path)


def _broken(*_: object) -> TokenEvent:
    raise RuntimeError("no event")


def test_a_removed_document_vanishes_from_a_mix_and_its_place_is_filled(
    gpt2: Parts, served: Datastores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_watch, "SECONDS_BETWEEN_LOOKS", 1000.0)
    store_of(gpt2.model, tmp_path / "shrinking", 8, seed=7)
    served.load("shrinking", tmp_path / "shrinking")
    one = asked("a", mixing("shrinking", "law", k=4), tokens=20)
    before = complete(make_engine(gpt2, datastores=served), one)["a"]
    named = [neighbor.document_id for event in before.events[10:] for neighbor in event.neighbors if neighbor.datastore == "shrinking"]
    gone = max(set(named), key=named.count)
    engine = make_engine(gpt2, datastores=served)
    engine.add(one)
    after = drive(engine, {10: [lambda: served.remove_documents("shrinking", [gone], {})]})["a"]
    assert [places(event) for event in after.events[:10]] == [places(event) for event in before.events[:10]]
    for event in after.events[10:]:
        assert [neighbor.datastore for neighbor in event.neighbors].count("shrinking") == 4
        assert ("shrinking", gone) not in {(neighbor.datastore, neighbor.document_id) for neighbor in event.neighbors}


def test_a_text_that_is_scored_loses_removed_documents_of_a_datastore_that_is_served_no_more(
    gpt2: Parts, served: Datastores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_watch, "SECONDS_BETWEEN_LOOKS", 0.0)
    store_of(gpt2.model, tmp_path / "going", 8, seed=7)
    served.load("going", tmp_path / "going")
    store = served.choose(mixing("going")).weights[0][0].store
    engine = make_engine(gpt2, datastores=served)
    engine.add_score(ScoreRequest("s", tuple(random_prompt(3000, 1)), mixing("going")))
    assert engine.step() == []
    served.unload("going")
    remove_documents(tmp_path / "going", [store.documents[2].id])
    assert engine.step() == []
    assert store.is_removed(store.documents.entry_range(2)[0])
    assert drive(engine)["s"].scores is not None
    assert "going" not in {one.name for one in served.in_use()}


def test_with_nothing_loaded_the_base_model_answers(gpt2: Parts) -> None:
    engine = make_engine(gpt2, datastores=Datastores(gpt2.model, gpt2.knn_lm.tokenizer))
    engine.add_score(ScoreRequest("s", tuple(random_prompt(30, 1)), LM_ALONE))
    answers = complete(engine, asked("a", LM_ALONE))
    assert len(answers["a"].events) == 8
    scores = answers["s"].scores
    assert scores is not None
    assert scores.log_probs == scores.lm_log_probs
    assert torch.isneginf(torch.tensor(scores.knn_log_probs)).all()
