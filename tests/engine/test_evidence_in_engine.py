"""Evidence and sampling as requests get them: from a running engine, against the plain loop and the events of its tokens."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from knnlm.datastore.reader import Datastore
from knnlm.datastore_mix import StoreMix
from knnlm.drawing import sample
from knnlm.generation import generate
from knnlm.index import open_index
from knnlm.knn_lm import KNNLanguageModel
from knnlm.mixture import Mixture
from knnlm.opening import SearchableStore
from knnlm.retrieval import Retriever
from knnlm.sampling import SamplingParams
from knnlm_server.sequence import CompletionEvidence, DatastoreChoice, DetailParams, GenerationRequest, RetrievalParams
from tests.engine.harness import GREEDY, LM_ALONE, Answer, Parts, complete, make_engine, random_prompt, request, sample_name
from tests.stores import build, text_folder
from tests.tiny import tiny_corpus

ALL = DetailParams(log_probs=True, evidence=True)
MIXED = RetrievalParams(0.6, 8, 10.0)
SAMPLINGS = [
    GREEDY,
    SamplingParams(temperature=0.8, seed=5),
    SamplingParams(top_p=0.7, seed=6),
    SamplingParams(top_k=9, min_p=0.01, typical_p=0.9, seed=7),
    replace(GREEDY, frequency_penalty=0.4, presence_penalty=0.2),
    SamplingParams(logit_bias=((70, 3.0), (80, -5.0)), repetition_penalty=1.2, bad_words=((70, 71), (72,)), temperature=1.2, seed=8),
]


def asked(number: int, sampling: SamplingParams, retrieval: RetrievalParams = MIXED) -> GenerationRequest:
    prompt = random_prompt(4 + number, number)
    return request(f"r{number}", prompt, sampling, retrieval, ALL, max_new_tokens=14, ignore_eos=True)


def evidence_of(answer: Answer) -> CompletionEvidence:
    assert answer.finish is not None
    assert answer.finish.evidence is not None
    return answer.finish.evidence


@pytest.fixture(scope="module")
def second_store(gpt2: Parts, tmp_path_factory: pytest.TempPathFactory) -> SearchableStore:
    """Another datastore of the same model."""
    folder = tmp_path_factory.mktemp("second")
    build(text_folder(folder / "corpus", tiny_corpus(6, seed=9)), folder / "store", gpt2.model, index="exact", keys="float32")
    store = Datastore.open(folder / "store")
    index = open_index(store.path / store.manifest.index, store.keys, len(store))
    return SearchableStore(store, Retriever(index, store.keys, store.values), Mixture(8, 10.0, 0.3), "the test")


def followed(parts: Parts, knn_lm: KNNLanguageModel, asked: GenerationRequest, count: int) -> tuple[list[int], list[int]]:
    """The tokens that the plain loop draws for a request, and those that the base model alone would have drawn instead of each."""
    retrieval, params = asked.retrieval, asked.sampling
    mixture, chance = Mixture(retrieval.k, retrieval.temperature, retrieval.weight), random.Random(params.seed)
    tokens, alone = list(asked.prompt), []
    for generated in range(count):
        uniform = chance.random()
        base = parts.knn_lm.next_token(tokens, replace(mixture, weight=0.0)).log_probs[0]
        said = knn_lm.next_token(tokens, mixture).log_probs[0]
        alone.append(sample(base, params, tokens, uniform, generated=generated))
        tokens.append(sample(said, params, tokens, uniform, generated=generated, base=base))
    return tokens[len(asked.prompt) :], alone


def test_tokens_and_what_the_base_model_would_have_said_are_those_of_the_plain_loop(gpt2: Parts) -> None:
    requests = [asked(number, sampling) for number, sampling in enumerate(SAMPLINGS)]
    answers = complete(make_engine(gpt2), *requests)
    shares = []
    for one in requests:
        tokens, alone = followed(gpt2, gpt2.knn_lm, one, 14)
        assert answers[one.request_id].tokens == tokens
        found = evidence_of(answers[one.request_id])
        assert found.changed_share == sum(token != other for token, other in zip(tokens, alone, strict=True)) / 14
        assert found.searched_tokens == 14
        shares.append(found.changed_share)
    assert max(shares) > 0
    assert min(shares) < 1


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_plain_loop_writes_what_the_engine_writes(gpt2: Parts, sampling: SamplingParams) -> None:
    prompt, mixture = "The farmer sold ", Mixture(1, 10.0, 1.0)
    tokens = gpt2.knn_lm.tokenizer.encode(prompt)
    # What the only neighbour says first is forbidden, so the base model comes to speak.
    [said] = gpt2.knn_lm.next_token(tokens, mixture).neighbors.tokens[0].tolist()
    sampling = replace(sampling, bad_words=((said,),))
    one = request("a", tokens, sampling, RetrievalParams(1.0, 1, 10.0), max_new_tokens=10)
    text = generate(gpt2.knn_lm, gpt2.model, prompt, max_new_tokens=10, sampling=sampling, mixture=mixture)
    assert complete(make_engine(gpt2), one)["a"].text == text


def test_evidence_is_the_same_alone_and_in_company(gpt2: Parts) -> None:
    requests = [asked(number, sampling) for number, sampling in enumerate(SAMPLINGS)]
    together = complete(make_engine(gpt2, max_concurrent=3), *requests)
    for one in requests:
        alone = complete(make_engine(gpt2), one)[one.request_id]
        assert alone.tokens == together[one.request_id].tokens
        found, expected = evidence_of(together[one.request_id]), evidence_of(alone)
        assert replace(found, documents=()) == replace(expected, documents=())
        assert [d.document_id for d in found.documents] == [d.document_id for d in expected.documents]
        assert [d.weight for d in found.documents] == pytest.approx([d.weight for d in expected.documents], rel=1e-4)


def test_documents_weigh_what_the_tokens_shares_come_to(gpt2: Parts, second_store: SearchableStore) -> None:
    served = gpt2.datastores()
    served.serve("second", second_store)
    both = replace(MIXED, datastores=(DatastoreChoice("default", 1.0), DatastoreChoice("second", 3.0)))
    requests = [asked(0, SAMPLINGS[1]), asked(1, SAMPLINGS[1], both), asked(2, GREEDY, replace(both, weight=1.0))]
    answers = complete(make_engine(gpt2, datastores=served), *requests)
    for one in requests:
        answer = answers[one.request_id]
        found = evidence_of(answer)
        shares = [event.knn_share or 0.0 for event in answer.events]
        assert sum(document.weight for document in found.documents) == pytest.approx(sum(shares), abs=1e-9)
        assert max(shares) > 0
    assert {d.datastore for d in evidence_of(answers["r0"]).documents} == {"default"}
    assert {d.datastore for d in evidence_of(answers["r2"]).documents} == {"default", "second"}
    mix = StoreMix([gpt2.knn_lm.retriever, second_store.retriever], [1.0, 3.0])
    knn_lm = KNNLanguageModel(gpt2.model, gpt2.knn_lm.tokenizer, mix)
    assert answers["r1"].tokens == followed(gpt2, knn_lm, requests[1], 14)[0]


def test_a_document_that_is_recited_is_found_from_its_first_token_on(gpt2: Parts) -> None:
    text = tiny_corpus(24)[7]
    tokens = gpt2.knn_lm.tokenizer.encode_plain(text)
    one = request("a", tokens[:20], GREEDY, RetrievalParams(1.0, 1, 10.0), ALL, max_new_tokens=16, ignore_eos=True)
    run = evidence_of(complete(make_engine(gpt2), one)["a"]).verbatim
    assert run is not None
    assert (run.start, run.tokens, run.text) == (0, 16, gpt2.knn_lm.tokenizer.decode(tokens[20:36]))
    assert (run.datastore, Path(run.source).name) == ("default", "story-07.txt")
    assert run.character_start is not None
    assert text[run.character_start : run.character_end] == run.text
    assert run.line == text[: run.character_start].count("\n") + 1


def test_each_sample_has_evidence_of_its_own(gpt2: Parts) -> None:
    one = replace(asked(1, SamplingParams(temperature=1.3, seed=4)), samples=3)
    answers = complete(make_engine(gpt2), one)
    for number in range(3):
        answer = answers[sample_name("r1", number)]
        shares = [event.knn_share or 0.0 for event in answer.events]
        assert sum(document.weight for document in evidence_of(answer).documents) == pytest.approx(sum(shares), abs=1e-9)
    assert len({tuple(answers[sample_name("r1", number)].tokens) for number in range(3)}) == 3


def test_without_retrieval_or_without_asking_there_is_none(gpt2: Parts) -> None:
    off, silent = asked(0, GREEDY, LM_ALONE), replace(asked(1, GREEDY), detail=DetailParams())
    answers = complete(make_engine(gpt2), off, silent)
    assert evidence_of(answers["r0"]) == CompletionEvidence(0.0, 0, (), None)
    assert answers["r1"].finish is not None
    assert answers["r1"].finish.evidence is None


def test_at_most_as_many_documents_are_named_as_the_limit_says(gpt2: Parts) -> None:
    one = asked(3, SamplingParams(temperature=1.0, seed=2))
    every = evidence_of(complete(make_engine(gpt2), one)["r3"]).documents
    assert len(every) > 2
    assert evidence_of(complete(make_engine(gpt2, max_evidence_documents=2), one)["r3"]).documents == every[:2]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_bad_words_are_never_completed(gpt2: Parts, sampling: SamplingParams) -> None:
    free = asked(5, sampling, replace(MIXED, weight=1.0))
    said = complete(make_engine(gpt2), free)["r5"].tokens
    words = ((said[0],), (said[3], said[4]), (free.prompt[-1], said[1]))
    answer = complete(make_engine(gpt2), replace(free, sampling=replace(sampling, bad_words=words)), asked(1, GREEDY))["r5"]
    text = [*free.prompt, *answer.tokens]
    for word in words:
        assert all(tuple(text[i : i + len(word)]) != word for i in range(len(free.prompt) - len(word) + 1, len(text)))
    assert answer.tokens != said


def test_neighbours_that_know_bad_words_only_leave_the_word_to_the_base_model(gpt2: Parts) -> None:
    one = asked(2, GREEDY, RetrievalParams(1.0, 1, 10.0))
    [first, *_] = complete(make_engine(gpt2), one)["r2"].tokens
    answer = complete(make_engine(gpt2), replace(one, sampling=replace(GREEDY, bad_words=((first,),))))["r2"]
    base = gpt2.knn_lm.next_token(list(one.prompt), Mixture(1, 10.0, 0.0)).log_probs[0]
    assert answer.tokens[0] == int(base.index_fill(0, torch.tensor([first]), -torch.inf).argmax())
    event = answer.events[0]
    assert (event.log_prob, event.knn_log_prob, event.knn_share) == (-torch.inf, -torch.inf, 0.0)
