"""Removals while requests run: when the engine looks, what it loses, and a store that can't be read any more."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from knnlm.datastore.reader import Datastore
from knnlm.datastore.removal import remove_documents
from knnlm.errors import StoreDamaged
from knnlm.index import open_index
from knnlm.knn_lm import KNNLanguageModel
from knnlm.retrieval import Retriever
from knnlm_server import store_watch
from knnlm_server.sequence import DetailParams, GenerationRequest, RetrievalParams, TokenEvent
from knnlm_server.served_stores import ServedStore
from knnlm_server.store_watch import SECONDS_BETWEEN_LOOKS, StoreWatch
from tests.engine.harness import Answer, Parts, drive, make_engine, random_prompt, request

MIXED = RetrievalParams(0.5, 16, 10.0)


@pytest.fixture
def parts(gpt2: Parts, tmp_path: Path) -> Parts:
    """The model over a copy of its store, whose removals it takes over."""
    store = Datastore.open(shutil.copytree(gpt2.store.path, tmp_path / "store"))
    index = open_index(store.path / store.manifest.index, store.keys, len(store))
    retriever = Retriever(index, store.keys, store.values, allowed=store.allowed)
    knn_lm = KNNLanguageModel(gpt2.knn_lm.model, gpt2.knn_lm.tokenizer, retriever, gpt2.knn_lm.mixture)
    return replace(gpt2, knn_lm=knn_lm, store=store)


class Looked:
    """A datastore that counts how often it is looked at, and fails on demand."""

    def __init__(self, store: Datastore) -> None:
        self.tombstones, self.looks = store.tombstones, 0
        self.failure: Exception | None = None

    def refresh(self) -> bool:
        self.looks += 1
        if self.failure is not None:
            raise self.failure
        return False


def served(store: Looked, name: str = "news") -> ServedStore:
    return ServedStore(name, 0, store, None, None)  # type: ignore[arg-type]  # a watch needs no more of it


def test_it_looks_at_the_first_call_and_then_from_time_to_time(gpt2: Parts) -> None:
    store, now = Looked(gpt2.store), [1000.0]
    watch = StoreWatch(lambda: [served(store)], lambda: now[0])
    for at, looks in ((0.0, 1), (0.0, 1), (0.9, 1), (1.0, 2), (1.9, 2), (7.0, 3), (7.5, 3), (8.0, 4)):
        now[0] = 1000.0 + at * SECONDS_BETWEEN_LOOKS
        watch.look()
        assert store.looks == looks


def test_a_store_that_can_not_be_read_is_said_once_and_again_when_it_fails_anew(gpt2: Parts, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="knnlm_server")
    store, now = Looked(gpt2.store), iter(range(100))
    one = served(store)
    watch = StoreWatch(lambda: [one], lambda: float(next(now)))
    store.failure = StoreDamaged("manifest.json is damaged.")
    for _ in range(3):
        watch.look()
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "removals from the datastore news can't be seen, and it is served as it was: manifest.json is damaged.")
    ]
    store.failure = None
    for _ in range(2):
        watch.look()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    store.failure = OSError(5, "Input/output error")
    watch.look()
    assert caplog.records[-1].levelname == "WARNING"
    assert store.looks == 6


def test_after_a_hurry_the_next_call_looks(gpt2: Parts) -> None:
    store, now = Looked(gpt2.store), [1000.0]
    watch = StoreWatch(lambda: [served(store)], lambda: now[0])
    watch.look()
    watch.look()
    assert store.looks == 1
    watch.hurry()
    watch.look()
    watch.look()
    assert store.looks == 2


def test_one_that_can_not_be_read_keeps_no_other_from_being_looked_at(gpt2: Parts, caplog: pytest.LogCaptureFixture) -> None:
    broken, sound, now = Looked(gpt2.store), Looked(gpt2.store), iter(range(100))
    both = [served(broken, "broken"), served(sound, "sound")]
    watch = StoreWatch(lambda: both, lambda: float(next(now)))
    broken.failure = OSError(5, "Input/output error")
    watch.look()
    watch.look()
    assert (broken.looks, sound.looks) == (2, 2)
    assert ["broken" in record.getMessage() for record in caplog.records] == [True]


def documents_named(events: list[TokenEvent]) -> list[set[str]]:
    return [{neighbor.document_id for neighbor in event.neighbors} for event in events]


def asked(name: str, seed: int) -> GenerationRequest:
    detail = DetailParams(neighbors=16)
    return request(name, random_prompt(4, seed), retrieval=MIXED, detail=detail, max_new_tokens=30, ignore_eos=True)


def test_running_requests_lose_a_removed_document_and_keep_k_neighbours(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_watch, "SECONDS_BETWEEN_LOOKS", 0.0)
    undisturbed = drive_with(parts, {})
    # Documents that were neighbours at many steps on both sides of the removal.
    counts: dict[str, int] = {}
    for answer in undisturbed.values():
        for named in documents_named(answer.events[15:]):
            for name in named:
                counts[name] = counts.get(name, 0) + 1
    gone = sorted(counts, key=counts.__getitem__)[-3:]
    answers = drive_with(parts, {15: [lambda: remove_documents(parts.store.path, gone)]})
    for name, answer in answers.items():
        named = documents_named(answer.events)
        assert named[:15] == documents_named(undisturbed[name].events)[:15]
        assert not any(now & set(gone) for now in named[15:])
        assert all(len(event.neighbors) == 16 for event in answer.events)
    assert any(named & set(gone) for answer in answers.values() for named in documents_named(answer.events[:15]))


def drive_with(parts: Parts, actions: dict[int, list[Callable[[], object]]]) -> dict[str, Answer]:
    """Two requests; ``actions[n]`` happens before step n."""
    engine = make_engine(parts)
    for wanted in (asked("a", 1), asked("b", 2)):
        engine.add(wanted)
    return drive(engine, actions)


def test_a_store_that_is_deleted_ends_no_request(parts: Parts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(store_watch, "SECONDS_BETWEEN_LOOKS", 0.0)
    undisturbed = drive_with(parts, {})
    answers = drive_with(parts, {10: [lambda: shutil.rmtree(parts.store.path)]})
    for name, answer in answers.items():
        assert answer.failure is None
        assert answer.tokens == undisturbed[name].tokens
        assert documents_named(answer.events) == documents_named(undisturbed[name].events)
    assert len([record for record in caplog.records if "can't be seen" in record.getMessage()]) == 1


def test_with_every_document_removed_the_base_lm_goes_on(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_watch, "SECONDS_BETWEEN_LOOKS", 0.0)
    everything = [parts.store.documents[row].id for row in range(len(parts.store.documents))]
    answers = drive_with(parts, {5: [lambda: remove_documents(parts.store.path, everything)]})
    for answer in answers.values():
        assert answer.failure is None
        assert all(event.neighbors for event in answer.events[:5])
        assert not any(event.neighbors for event in answer.events[5:])
        assert len(answer.events) == 30
