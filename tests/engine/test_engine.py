"""The decoding engine: what a request is given does not depend on its company, and is what the definition says."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitNormalization, RepetitionPenaltyLogitsProcessor

from knnlm.drawing import sample
from knnlm.evaluation.scoring import score
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel
from knnlm.penalties import allowed_scores as real_allowed_scores
from knnlm.sampling import SamplingParams
from knnlm_server import row_sampling
from knnlm_server.errors import EngineFailed, QueueFull
from knnlm_server.sequence import (
    DetailParams,
    FinishReason,
    GenerationRequest,
    RetrievalParams,
    ScoreRequest,
    TokenEvent,
)
from knnlm_server.telemetry import StepReport, Unobserved
from knnlm_server.text_stream import TextStream
from tests.engine.harness import (
    GREEDY,
    LM_ALONE,
    Answer,
    CountingIndex,
    Parts,
    RecordingEngine,
    complete,
    drive,
    make_engine,
    random_prompt,
    request,
)

NEIGHBORS_ALONE = RetrievalParams(1.0, 4, 10.0)
MIXED = RetrievalParams(0.5, 8, 10.0)
EVERYTHING = DetailParams(log_probs=True, alternatives=5, neighbors=3)


def noise(count: int = 4) -> list[GenerationRequest]:
    """Other requests of all kinds, to share the batch with."""
    samplings = [GREEDY, SamplingParams(temperature=0.9, seed=1), SamplingParams(temperature=1.2, top_k=20, repetition_penalty=1.2, seed=2)]
    retrievals = [LM_ALONE, MIXED, NEIGHBORS_ALONE]
    return [
        request(
            f"noise-{n}", random_prompt(3 + 9 * n, 100 + n), samplings[n % 3], retrievals[n % 3], max_new_tokens=4 + 5 * n, ignore_eos=True
        )
        for n in range(count)
    ]


def hf_generate(parts: Parts, prompt: list[int], max_new_tokens: int, **options: Any) -> list[int]:
    out = parts.model._model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), max_new_tokens=max_new_tokens,
        do_sample=False, pad_token_id=0, **options,
    )  # fmt: skip
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


# --- 1. The base LM: Hugging Face generate, token for token ---


@pytest.mark.parametrize("step_tokens", [7, 512])
@pytest.mark.parametrize("company", [False, True])
def test_greedy_is_generate_token_for_token_whatever_else_is_in_the_batch(parts: Parts, company: bool, step_tokens: int) -> None:
    prompts = {f"asked-{length}": random_prompt(length, length) for length in (1, 2, 13, 40)}
    asked = [request(name, prompt, max_new_tokens=24) for name, prompt in prompts.items()]
    engine = make_engine(parts, step_tokens, max_concurrent=8 if company else 1)
    answers = complete(engine, *(noise() if company else []), *asked)
    for name, prompt in prompts.items():
        assert answers[name].tokens == hf_generate(parts, prompt, 24)


def test_the_end_of_text_ends_a_completion_where_generate_ends_it(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = random_prompt(9, 3)
    end = hf_generate(parts, prompt, 12)[7]
    expected = hf_generate(parts, prompt, 12, eos_token_id=end)
    monkeypatch.setattr(HFLanguageModel, "eos_ids", frozenset({end}))
    answer = complete(make_engine(parts), request("a", prompt, max_new_tokens=12), *noise())["a"]
    assert answer.tokens == expected
    assert answer.finish is not None
    assert answer.finish.reason is FinishReason.EOS


def test_min_new_tokens_is_that_of_generate(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = random_prompt(9, 3)
    end = hf_generate(parts, prompt, 12)[2]
    expected = hf_generate(parts, prompt, 12, eos_token_id=end, min_new_tokens=6)
    monkeypatch.setattr(HFLanguageModel, "eos_ids", frozenset({end}))
    answer = complete(make_engine(parts), request("a", prompt, max_new_tokens=12, min_new_tokens=6))["a"]
    assert answer.tokens == expected
    assert len(answer.tokens) >= 6


def test_repetition_penalty_is_that_of_generate_over_normalised_scores(parts: Parts) -> None:
    prompt, penalty = random_prompt(15, 4), 1.4
    expected = hf_generate(parts, prompt, 20, logits_processor=[LogitNormalization(), RepetitionPenaltyLogitsProcessor(penalty)])
    sampling = SamplingParams(temperature=0.0, repetition_penalty=penalty)
    penalised, plain = request("a", prompt, sampling, max_new_tokens=20), request("b", prompt, max_new_tokens=20)
    answers = complete(make_engine(parts), *noise(), penalised, plain)
    assert answers["a"].tokens == expected
    assert answers["a"].tokens != answers["b"].tokens, "the penalty makes no difference here, so this test shows nothing"


def test_prompt_and_completion_may_fill_the_context_to_its_last_token(parts: Parts) -> None:
    context = parts.model.context
    for length in (context - 1, context - 5):
        prompt = random_prompt(length, length)
        answers = complete(make_engine(parts, 10), request("a", prompt, max_new_tokens=context - length, ignore_eos=True), *noise(2))
        assert len(answers["a"].tokens) == context - length
        assert answers["a"].tokens == hf_generate(parts, prompt, context - length, eos_token_id=-1)


# --- 2. In a batch or alone: the same keys and the same tokens ---


@dataclass(frozen=True)
class Arrival:
    """A request, the step before which it comes, and how many steps later it is given up (None: never)."""

    at: int
    request: GenerationRequest
    cancelled_after: int | None


@st.composite
def _arrivals(draw: st.DrawFn) -> list[Arrival]:
    arrivals = []
    for number in range(draw(st.integers(2, 6))):
        prompt = random_prompt(draw(st.one_of(st.integers(1, 6), st.integers(7, 45))), draw(st.integers(0, 50)))
        sampling = draw(
            st.sampled_from(
                [GREEDY, SamplingParams(temperature=0.8, seed=5), SamplingParams(repetition_penalty=1.3, temperature=1.1, top_k=30, seed=7)]
            )
        )
        weight, k, temperature = (draw(st.sampled_from(choices)) for choices in ([0.0, 0.3, 1.0], [1, 3, 8], [1.0, 10.0]))
        retrieval = RetrievalParams(weight, int(k), temperature)
        asked = request(str(number), prompt, sampling, retrieval, max_new_tokens=draw(st.integers(1, 12)))
        arrivals.append(Arrival(draw(st.integers(0, 9)), asked, draw(st.one_of(st.none(), st.none(), st.integers(0, 9)))))
    return arrivals


SCENARIOS = st.tuples(_arrivals(), st.integers(1, 5), st.sampled_from([3, 8, 20, 512]))


def play(parts: Parts, arrivals: list[Arrival], slots: int, step_tokens: int) -> tuple[RecordingEngine, dict[str, Answer]]:
    engine = make_engine(parts, step_tokens, max_concurrent=slots)
    actions: dict[int, list[Callable[[], object]]] = defaultdict(list)
    for arrival in arrivals:
        actions[arrival.at].append(lambda r=arrival.request: engine.add(r))  # type: ignore[misc]
    for arrival in arrivals:
        if arrival.cancelled_after is not None:
            actions[arrival.at + arrival.cancelled_after].append(lambda r=arrival.request: engine.cancel(r.request_id))  # type: ignore[misc]
    return engine, drive(engine, actions)


_ALONE: dict[tuple[Path, str, GenerationRequest], tuple[list[torch.Tensor], Answer]] = {}


def alone(parts: Parts, asked: GenerationRequest) -> tuple[list[torch.Tensor], Answer]:
    """Keys and answer of a request that has a fresh engine for itself."""
    place = (parts.path, parts.model.dtype, replace(asked, request_id="alone"))
    if place not in _ALONE:
        engine = make_engine(parts, max_concurrent=1)
        answer = complete(engine, place[2])["alone"]
        _ALONE[place] = engine.keys["alone"], answer
    return _ALONE[place]


def assert_keys(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).abs().max()) <= tolerance * float(other.abs().max())


@given(SCENARIOS)
@settings(max_examples=40)
def test_batch_equals_alone_token_for_token_in_float64(parts: Parts, scenario: tuple[list[Arrival], int, int]) -> None:
    arrivals, slots, step_tokens = scenario
    engine, answers = play(parts, arrivals, slots, step_tokens)
    for arrival in arrivals:
        name = arrival.request.request_id
        keys, expected = alone(parts, arrival.request)
        answer = answers[name]
        assert answer.failure is None
        count = len(answer.tokens)
        assert answer.tokens == expected.tokens[:count]
        assert_keys(engine.keys[name], keys[:count], 1e-6)
        if arrival.cancelled_after is None:
            assert answer.finish == expected.finish
            assert answer.text == expected.text
        if answer.finish is not None:
            assert count == len(expected.tokens)


@given(SCENARIOS)
@settings(max_examples=25)
def test_batch_equals_alone_in_its_keys_in_float32(single_parts: Parts, scenario: tuple[list[Arrival], int, int]) -> None:
    arrivals, slots, step_tokens = scenario
    engine, answers = play(single_parts, arrivals, slots, step_tokens)
    for arrival in arrivals:
        name = arrival.request.request_id
        keys, expected = alone(single_parts, arrival.request)
        tokens = answers[name].tokens
        # Where two tokens are as likely up to rounding, texts may part; until then every key is the same.
        same = next((i for i, (a, b) in enumerate(zip(tokens, expected.tokens, strict=False)) if a != b), len(tokens) - 1)
        assert_keys(engine.keys[name][: same + 1], keys[: same + 1], 1e-5)


def test_a_full_house_of_requests_of_every_kind_is_each_alone(parts: Parts) -> None:
    asked = noise(8)
    asked = [replace(r, prompt=r.prompt[:40], stopping=replace(r.stopping, max_new_tokens=20)) for r in asked]
    engine = make_engine(parts, 16, max_concurrent=5)
    answers = complete(engine, *asked)
    assert max(engine.rows_of_steps) == 5, "rows did not share a step, so this shows nothing"
    for one in asked:
        assert answers[one.request_id].tokens == alone(parts, one)[1].tokens


# --- 3. Sampling and stopping ---


def test_a_seed_draws_the_same_tokens_alone_in_company_and_again(parts: Parts) -> None:
    asked = request("a", random_prompt(8, 1), SamplingParams(temperature=1.0, seed=11), MIXED, max_new_tokens=15, ignore_eos=True)
    other = replace(asked, request_id="b", sampling=SamplingParams(temperature=1.0, seed=12))
    answers = complete(make_engine(parts), other, *noise(3), asked)
    assert answers["a"].tokens == alone(parts, asked)[1].tokens
    assert answers["a"].tokens != answers["b"].tokens


def test_without_a_seed_every_request_draws_its_own(gpt2: Parts) -> None:
    hot = SamplingParams(temperature=5.0)
    answers = complete(make_engine(gpt2), *[request(n, [5, 6], hot, max_new_tokens=30, ignore_eos=True) for n in "ab"])
    assert answers["a"].tokens != answers["b"].tokens


def test_a_seed_counts_every_token_also_those_that_a_penalty_changed(parts: Parts) -> None:
    """The n-th draw belongs to the n-th token: the definition by hand, one forward pass a token."""
    params = SamplingParams(temperature=0.9, top_p=0.8, repetition_penalty=1.2, seed=21)
    asked = request("a", random_prompt(6, 2), params, MIXED, max_new_tokens=12, ignore_eos=True)
    chance, tokens = random.Random(21), list(asked.prompt)
    for _ in range(12):
        mixed = parts.knn_lm.next_token(tokens, Mixture(MIXED.k, MIXED.temperature, MIXED.weight))
        tokens.append(sample(mixed.log_probs[0], params, tokens, chance.random()))
    assert complete(make_engine(parts), asked, *noise(2))["a"].tokens == tokens[len(asked.prompt) :]


def text_request(name: str, **stopping: Any) -> GenerationRequest:
    """Greedy text of the neighbours alone: plain words from the corpus, where the tiny LM's would be noise."""
    prompt = stopping.pop("prompt", random_prompt(5, 8))
    return request(name, prompt, retrieval=NEIGHBORS_ALONE, **stopping)


@pytest.fixture(scope="module")
def story(gpt2: Parts) -> Answer:
    """What the neighbours say, with nothing to stop it but its length."""
    answer = complete(make_engine(gpt2), text_request("a", max_new_tokens=40, ignore_eos=True))["a"]
    assert len(answer.text) > 40
    return answer


def test_max_new_tokens(gpt2: Parts, story: Answer) -> None:
    for most in (1, 2, 17):
        answer = complete(make_engine(gpt2), text_request("a", max_new_tokens=most))["a"]
        assert answer.tokens == story.tokens[:most]
        assert answer.finish is not None
        assert (answer.finish.reason, answer.finish.prompt_tokens) == (FinishReason.LENGTH, 5)


def test_text_is_the_decoded_completion(gpt2: Parts, story: Answer) -> None:
    assert story.text == gpt2.knn_lm.tokenizer.decode(story.tokens)
    assert "".join(event.token_text for event in story.events) == story.text


def test_a_stop_token_ends_the_completion_and_is_no_part_of_its_text(gpt2: Parts, story: Answer) -> None:
    place = next(i for i in range(8, 40) if story.tokens[i] not in story.tokens[:i])
    answer = complete(make_engine(gpt2), text_request("a", max_new_tokens=40, stop_token_ids=(story.tokens[place], 299)), *noise(2))["a"]
    assert answer.finish is not None
    assert answer.finish.reason is FinishReason.STOP_TOKEN
    assert answer.tokens == story.tokens[: place + 1]
    assert answer.text == gpt2.knn_lm.tokenizer.decode(story.tokens[:place])


def test_a_stop_string_across_tokens_ends_the_text_before_it(gpt2: Parts, story: Answer) -> None:
    tokenizer = gpt2.knn_lm.tokenizer
    before = tokenizer.decode(story.tokens[:12])
    stop = before[-1] + tokenizer.decode(story.tokens[12:14])
    expected = story.text[: story.text.index(stop)]
    answer = complete(make_engine(gpt2), text_request("a", max_new_tokens=40, stop_strings=(stop, "never said")), *noise(2))["a"]
    assert answer.finish is not None
    assert answer.finish.reason is FinishReason.STOP_STRING
    assert answer.text == expected
    assert len(answer.tokens) < len(story.tokens)
    assert stop in tokenizer.decode(answer.tokens)


def test_min_new_tokens_holds_for_stop_tokens_and_stop_strings(gpt2: Parts, story: Answer) -> None:
    first_word = story.text[:3]
    answers = complete(
        make_engine(gpt2),
        text_request("string", max_new_tokens=30, min_new_tokens=10, stop_strings=(first_word,)),
        request("token", random_prompt(5, 8), retrieval=MIXED, max_new_tokens=30, min_new_tokens=10, stop_token_ids=tuple(range(1, 250))),
    )
    assert answers["string"].text.startswith(first_word)
    assert len(answers["string"].tokens) >= 10
    assert len(answers["token"].tokens) == 11 or not set(answers["token"].tokens[10:11]) & set(range(1, 250))
    assert not set(answers["token"].tokens[:10]) & set(range(1, 250))


@pytest.mark.parametrize("sooner", [0, 1])
def test_min_new_tokens_counts_to_the_token(gpt2: Parts, story: Answer, sooner: int) -> None:
    """A stop token may be the one after the least number of tokens, and not the last one of them."""
    place = next(i for i in range(8, 40) if story.tokens[i] not in story.tokens[:i])
    stopping = {"max_new_tokens": 40, "min_new_tokens": place + sooner, "stop_token_ids": (story.tokens[place],)}
    answer = complete(make_engine(gpt2), text_request("a", **stopping))["a"]
    assert answer.tokens[:place] == story.tokens[:place]
    assert (answer.tokens[place] == story.tokens[place]) is (sooner == 0)
    assert (len(answer.tokens) == place + 1) is (sooner == 0)


def test_a_stop_string_may_end_with_the_last_of_the_least_tokens(gpt2: Parts, story: Answer) -> None:
    stop = gpt2.knn_lm.tokenizer.decode(story.tokens[:15])[-10:]
    assert stop not in gpt2.knn_lm.tokenizer.decode(story.tokens[:14])
    answer = complete(make_engine(gpt2), text_request("a", max_new_tokens=40, min_new_tokens=15, stop_strings=(stop,)))["a"]
    assert answer.finish is not None
    assert (answer.finish.reason, len(answer.tokens)) == (FinishReason.STOP_STRING, 15)


def test_ignore_eos_goes_on_after_the_end_of_text_but_not_after_a_stop_token(
    gpt2: Parts, story: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = next(i for i in range(8, 40) if story.tokens[i] not in story.tokens[:i])
    end = story.tokens[place]
    monkeypatch.setattr(HFLanguageModel, "eos_ids", frozenset({end}))
    answers = complete(
        make_engine(gpt2),
        text_request("stops", max_new_tokens=40),
        text_request("ignores", max_new_tokens=40, ignore_eos=True),
        text_request("stops anyway", max_new_tokens=40, ignore_eos=True, stop_token_ids=(end,)),
    )
    reasons = {name: answer.finish.reason for name, answer in answers.items() if answer.finish}
    assert reasons == {"stops": FinishReason.EOS, "ignores": FinishReason.LENGTH, "stops anyway": FinishReason.STOP_TOKEN}
    assert answers["stops"].tokens == answers["stops anyway"].tokens == story.tokens[: place + 1]
    assert answers["ignores"].tokens == story.tokens


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1.0, seed=3)])
def test_neighbours_that_know_only_the_end_can_not_end_a_completion_too_early(
    parts: Parts, sampling: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At weight 1 with one neighbour the end of text has probability 1; forbidden, it leaves the word to the LM."""
    prompt, one = random_prompt(5, 8), RetrievalParams(1.0, 1, 10.0)
    first = complete(make_engine(parts), request("a", prompt, retrieval=one, max_new_tokens=1))["a"].tokens[0]
    monkeypatch.setattr(HFLanguageModel, "eos_ids", frozenset({0, first}))
    answer = complete(make_engine(parts), request("a", prompt, sampling, one, max_new_tokens=4, min_new_tokens=2))["a"]
    assert answer.failure is None
    assert not {0, first} & set(answer.tokens[:2])


# --- 4. Retrieval and what is reported of it ---


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_greedy_decoding_is_a_plain_loop_over_the_mixture(parts: Parts, weight: float) -> None:
    retrieval, mixture = RetrievalParams(weight, 6, 5.0), Mixture(6, 5.0, weight)
    tokens = random_prompt(10, 6)
    asked = request("a", tokens, retrieval=retrieval, detail=DetailParams(log_probs=True), max_new_tokens=15, ignore_eos=True)
    answer = complete(make_engine(parts, 16), *noise(3), asked)["a"]
    for event in answer.events:
        mixed = parts.knn_lm.next_token(tokens, mixture)
        expected = int(mixed.log_probs[0].argmax())
        assert event.token_id == expected
        assert event.log_prob == pytest.approx(float(mixed.log_probs[0, expected]), abs=1e-4)
        assert event.knn_log_prob == pytest.approx(float(mixed.knn_log_probs[0, expected]), abs=1e-4)
        tokens.append(expected)


def test_rows_with_weight_0_make_no_search(gpt2: Parts) -> None:
    index = CountingIndex(gpt2.knn_lm.retriever.index)
    counted = gpt2.searched_by(index)
    complete(make_engine(counted), request("off", random_prompt(4, 1), max_new_tokens=6, ignore_eos=True))
    assert index.queries == 0
    asked = [request(f"off-{n}", random_prompt(4, n), max_new_tokens=9, ignore_eos=True) for n in range(3)]
    asked.append(request("on", random_prompt(4, 9), retrieval=MIXED, max_new_tokens=5, ignore_eos=True))
    answers = complete(make_engine(counted), *asked)
    assert index.queries == len(answers["on"].tokens) == 5


def test_one_search_serves_all_rows_that_want_the_same_k(gpt2: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    index = CountingIndex(gpt2.knn_lm.retriever.index)
    searches: list[int] = []
    search = index.search

    def counting(queries: torch.Tensor, k: int, count: int, **options: Any) -> Any:
        searches.append(len(queries))
        return search(queries, k, count, **options)

    monkeypatch.setattr(index, "search", counting)
    asked = [request(f"{n}", [3 + n], retrieval=MIXED, max_new_tokens=4, ignore_eos=True) for n in range(5)]
    complete(make_engine(gpt2.searched_by(index)), *asked)
    assert searches == [5] * 4


def test_nothing_is_reported_that_was_not_asked_for(gpt2: Parts) -> None:
    event = complete(make_engine(gpt2), request("a", [5, 6], retrieval=MIXED, max_new_tokens=1))["a"].events[0]
    assert (event.log_prob, event.lm_log_prob, event.knn_log_prob, event.knn_share) == (None, None, None, None)
    assert (event.alternatives, event.neighbors) == ((), ())


def test_log_probs_and_alternatives_are_those_before_penalty_and_temperature(parts: Parts) -> None:
    sampling = SamplingParams(temperature=0.7, repetition_penalty=1.5, top_k=40, seed=9)
    tokens = random_prompt(10, 6)
    asked = request("a", tokens, sampling, MIXED, EVERYTHING, max_new_tokens=10, ignore_eos=True)
    for event in complete(make_engine(parts), asked, *noise(2))["a"].events:
        mixed = parts.knn_lm.next_token(tokens, Mixture(MIXED.k, MIXED.temperature, MIXED.weight))
        lm = parts.knn_lm.next_token(tokens, Mixture(MIXED.k, MIXED.temperature, 0.0)).log_probs[0]
        assert event.log_prob == pytest.approx(float(mixed.log_probs[0, event.token_id]), abs=1e-4)
        assert event.lm_log_prob == pytest.approx(float(lm[event.token_id]), abs=1e-4)
        values, ids = mixed.log_probs[0].topk(5)
        assert [a.log_prob for a in event.alternatives] == pytest.approx(values.tolist(), abs=1e-4)
        assert [a.log_prob for a in event.alternatives] == sorted((a.log_prob for a in event.alternatives), reverse=True)
        assert [a.token_id for a in event.alternatives] == ids.tolist()
        assert [a.text for a in event.alternatives] == [parts.knn_lm.tokenizer.token_text(a.token_id) for a in event.alternatives]
        tokens.append(event.token_id)


def test_the_share_of_the_neighbours_is_consistent_with_the_log_probs(parts: Parts) -> None:
    mixtures = {str(weight): RetrievalParams(weight, 8, 10.0) for weight in (0.0, 0.2, 0.8, 1.0)}
    asked = [
        request(name, random_prompt(7, 4), GREEDY, mix, EVERYTHING, max_new_tokens=12, ignore_eos=True) for name, mix in mixtures.items()
    ]
    for name, answer in complete(make_engine(parts), *asked).items():
        weight = float(name)
        for event in answer.events:
            assert event.knn_share is not None
            assert event.log_prob is not None
            assert event.lm_log_prob is not None
            assert 0.0 <= event.knn_share <= 1.0
            if weight == 0.0:
                assert (event.knn_share, event.knn_log_prob, event.neighbors) == (0.0, None, ())
                assert event.log_prob == event.lm_log_prob
                continue
            assert event.knn_log_prob is not None
            p = weight * math.exp(event.knn_log_prob) + (1 - weight) * math.exp(event.lm_log_prob)
            assert math.exp(event.log_prob) == pytest.approx(p, rel=1e-4)
            assert event.knn_share == pytest.approx(weight * math.exp(event.knn_log_prob) / p, abs=1e-4)


def test_neighbours_name_the_place_in_the_document_where_the_token_stands(gpt2: Parts, corpus_folder: Path) -> None:
    few = request("few", random_prompt(5, 8), retrieval=MIXED, detail=DetailParams(neighbors=3), max_new_tokens=10, ignore_eos=True)
    every = replace(few, request_id="every", detail=DetailParams(neighbors=100))
    answers = complete(make_engine(gpt2), few, every)
    for shown, full in zip(answers["few"].events, answers["every"].events, strict=True):
        assert (len(shown.neighbors), len(full.neighbors)) == (3, MIXED.k)
        assert shown.neighbors == full.neighbors[:3], "a weight is the share among all k, not among those shown"
        assert sum(n.weight for n in full.neighbors) == pytest.approx(1.0)
        distances = [n.distance for n in full.neighbors]
        assert distances == sorted(distances)
        for neighbor in full.neighbors:
            text = (corpus_folder / Path(neighbor.source).name).read_text()
            assert Path(neighbor.document_id).name == Path(neighbor.source).name
            assert neighbor.character_start is not None
            assert neighbor.character_end is not None
            assert text[neighbor.character_start : neighbor.character_end] == neighbor.text
            assert neighbor.line == text.count("\n", 0, neighbor.character_start) + 1
            assert neighbor.left_context
            assert text[: neighbor.character_start].endswith(neighbor.left_context)
            assert int(gpt2.store.values.gather(torch.tensor([neighbor.entry]))[0]) == neighbor.token_id


def test_the_weights_of_neighbours_make_up_the_probability_of_the_token(gpt2: Parts) -> None:
    detail = DetailParams(log_probs=True, neighbors=100)
    asked = request("a", random_prompt(5, 8), GREEDY, NEIGHBORS_ALONE, detail, max_new_tokens=10, ignore_eos=True)
    for event in complete(make_engine(gpt2), asked)["a"].events:
        assert event.knn_log_prob is not None
        voted = sum(n.weight for n in event.neighbors if n.token_id == event.token_id)
        assert voted == pytest.approx(math.exp(event.knn_log_prob), abs=1e-5)


# --- 5. What breaks ends as little as it can ---


def _fail_for_seed_13(
    log_probs: torch.Tensor, base: torch.Tensor, params: SamplingParams, tokens: list[int], generated: int, ends: set[int]
) -> torch.Tensor:
    if params.seed == 13 and len(tokens) > 8:
        raise ValueError("unlucky")
    return real_allowed_scores(log_probs, base, params, tokens, generated, ends)


def _check_the_others_go_on(parts: Parts, engine: RecordingEngine, broken: GenerationRequest, others: list[GenerationRequest]) -> None:
    answers = complete(engine, broken, *others)
    failure = answers[broken.request_id].failure
    assert isinstance(failure, EngineFailed)
    for other in others:
        assert answers[other.request_id].tokens == alone(parts, other)[1].tokens
        assert answers[other.request_id].finish is not None
    assert engine.idle
    again = others[0]
    assert complete(engine, again)[again.request_id].tokens == alone(parts, again)[1].tokens


def test_sampling_that_fails_ends_its_own_request(gpt2: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    others = noise(3)
    for other in others:
        alone(gpt2, other)
    monkeypatch.setattr(row_sampling, "allowed_scores", _fail_for_seed_13)
    engine = make_engine(gpt2, max_concurrent=4)
    sampling = SamplingParams(temperature=1.0, presence_penalty=0.1, seed=13)
    broken = request("broken", random_prompt(6, 1), sampling, max_new_tokens=20, ignore_eos=True)
    _check_the_others_go_on(gpt2, engine, broken, others)
    assert len(engine.keys["broken"]) == 4, "it ended with the step that failed"


def test_text_that_fails_ends_its_own_request(gpt2: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    push = TextStream.push

    def failing(self: TextStream, token_id: int, *, may_stop: bool = True) -> str:
        if "boom" in self._stop_strings:
            raise UnicodeError("no text")
        return push(self, token_id, may_stop=may_stop)

    monkeypatch.setattr(TextStream, "push", failing)
    broken = request("broken", random_prompt(6, 1), max_new_tokens=20, stop_strings=("boom",))
    _check_the_others_go_on(gpt2, make_engine(gpt2, max_concurrent=4), broken, noise(3))


def test_text_that_fails_at_the_very_end_ends_its_own_request(gpt2: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = TextStream.finish

    def failing(self: TextStream) -> str:
        if "boom" in self._stop_strings:
            raise UnicodeError("no text")
        return finish(self)

    monkeypatch.setattr(TextStream, "finish", failing)
    broken = request("broken", random_prompt(6, 1), max_new_tokens=3, stop_strings=("boom",))
    _check_the_others_go_on(gpt2, make_engine(gpt2, max_concurrent=4), broken, noise(3))


def test_evidence_that_fails_ends_its_own_request(gpt2: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(entry: int) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(gpt2.store, "evidence", failing)
    broken = request("broken", random_prompt(6, 1), retrieval=MIXED, detail=EVERYTHING, max_new_tokens=20)
    _check_the_others_go_on(gpt2, make_engine(gpt2, max_concurrent=4), broken, noise(3))


def _serves_anew(parts: Parts, engine: RecordingEngine) -> None:
    fresh = noise(3)
    engine.keys.clear()
    answers = complete(engine, *fresh)
    for one in fresh:
        keys, expected = alone(parts, one)
        assert answers[one.request_id].tokens == expected.tokens
        assert_keys(engine.keys[one.request_id], keys, 1e-6)


def test_retrieval_that_fails_ends_the_requests_that_search_and_no_others(gpt2: Parts) -> None:
    index = CountingIndex(gpt2.knn_lm.retriever.index)
    engine = make_engine(gpt2.searched_by(index), max_concurrent=4)
    asked = [replace(one, stopping=replace(one.stopping, max_new_tokens=15)) for one in noise(4)]

    def breaks() -> None:
        index.failure = RuntimeError("index lost")

    scored = ScoreRequest("s", tuple(random_prompt(3000, 1)), MIXED)
    for one in asked:
        engine.add(one)
    engine.add_score(scored)
    answers = drive(engine, {3: [breaks]})
    assert set(answers) == {*(one.request_id for one in asked), "s"}
    searching = {one.request_id for one in asked if one.retrieval.weight} | {"s"}
    assert {name for name, answer in answers.items() if isinstance(answer.failure, EngineFailed)} == searching
    assert answers["noise-1"].events, "it had begun"
    for one in asked:
        if not one.retrieval.weight:
            assert answers[one.request_id].tokens == alone(gpt2, one)[1].tokens
    index.failure = None
    _serves_anew(gpt2, engine)


def test_one_query_that_can_not_be_searched_ends_its_own_request(gpt2: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    index, others = CountingIndex(gpt2.knn_lm.retriever.index), [replace(one, retrieval=MIXED) for one in noise(3)]
    broken = request("broken", random_prompt(6, 1), retrieval=MIXED, max_new_tokens=20, ignore_eos=True)
    bad = alone(gpt2, broken)[0][4]
    for other in others:
        alone(gpt2, other)
    search = index.search

    def failing(queries: torch.Tensor, k: int, count: int, **options: Any) -> Any:
        if bool((queries - bad).abs().amax(1).lt(1e-6).any()):
            raise RuntimeError("a query that breaks the index")
        return search(queries, k, count, **options)

    monkeypatch.setattr(index, "search", failing)
    engine = make_engine(gpt2.searched_by(index), max_concurrent=4)
    answers = complete(engine, broken, *others)
    assert isinstance(answers["broken"].failure, EngineFailed)
    assert len(answers["broken"].tokens) == 4
    for other in others:
        assert answers[other.request_id].tokens == alone(gpt2, other)[1].tokens
        assert answers[other.request_id].finish is not None


@pytest.mark.parametrize("steps", [0, 1])
def test_a_text_that_was_scored_in_the_step_that_failed_is_answered_too(gpt2: Parts, steps: int) -> None:
    index = CountingIndex(gpt2.knn_lm.retriever.index)
    engine = make_engine(gpt2.searched_by(index))
    engine.add(request("a", [5, 6], retrieval=MIXED, max_new_tokens=10, ignore_eos=True))
    engine.add_score(ScoreRequest("s", (5, 6, 7), LM_ALONE))

    def breaks() -> None:
        index.failure = RuntimeError("index lost")

    answers = drive(engine, {steps: [breaks]})
    assert answers["a"].failure is not None
    assert answers["s"].failure is not None or answers["s"].scores is not None


def test_a_forward_pass_that_fails_leaves_nothing_behind(gpt2: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, calls = gpt2.model.forward, iter(range(100))

    def failing(*args: Any, **options: Any) -> Any:
        out = forward(*args, **options)
        if next(calls) == 5:
            raise MemoryError("out of memory")
        return out

    engine = make_engine(gpt2, step_tokens=8, max_concurrent=3)
    with monkeypatch.context() as patch:
        patch.setattr(gpt2.model, "forward", failing)
        answers = complete(engine, *noise(4))
    assert all(answer.failure is not None for answer in answers.values())
    assert "MemoryError" in str(answers["noise-0"].failure)
    assert engine.idle
    _serves_anew(gpt2, engine)


def test_a_cancelled_request_frees_its_row_for_the_next_step(gpt2: Parts) -> None:
    engine = make_engine(gpt2, max_concurrent=1)
    engine.add(request("first", random_prompt(5, 1), max_new_tokens=40, ignore_eos=True))
    engine.add(request("second", random_prompt(5, 2), max_new_tokens=40, ignore_eos=True))
    assert [output.request_id for output in engine.step()] == ["first"]
    engine.cancel("first")
    assert [output.request_id for output in engine.step()] == ["second"]
    engine.cancel("second")
    assert engine.idle
    engine.cancel("second")
    engine.cancel("never heard of")


def test_a_full_queue_is_refused_and_leaves_no_trace(gpt2: Parts) -> None:
    engine = make_engine(gpt2, max_concurrent=1, max_waiting_requests=1)
    engine.add(request("a", [5], max_new_tokens=2, ignore_eos=True))
    with pytest.raises(QueueFull, match="1 requests are waiting, the limit is 1"):
        engine.add(request("b", [5], max_new_tokens=2))
    assert set(drive(engine)) == {"a"}


# --- 6. Scoring ---


@pytest.mark.parametrize("weight", [0.0, 0.4])
@pytest.mark.parametrize("length", [0, 1, 2, 40, 500])
def test_score_is_the_evaluations_own(parts: Parts, length: int, weight: float) -> None:
    tokens = tuple(random_prompt(length, 31))
    engine = make_engine(parts)
    engine.add_score(ScoreRequest("s", tokens, RetrievalParams(weight, 8, 10.0)))
    for one in noise(2):
        engine.add(one)
    scores = drive(engine)["s"].scores
    assert scores is not None
    count = max(0, length - 1)
    expected = {name: torch.zeros(count) for name in ("log_probs", "lm_log_probs", "knn_log_probs")}
    for batch in score(parts.knn_lm, [np.array(tokens)], parts.store.manifest.windowing, Mixture(8, 10.0, weight), batch_tokens=1024):
        for name, values in expected.items():
            values[batch.rows] = getattr(batch, name)
    for name, values in expected.items():
        assert list(getattr(scores, name)) == values.tolist()


def test_scoring_and_decoding_take_turns(gpt2: Parts) -> None:
    engine = make_engine(gpt2)
    for name in ("one", "two"):
        engine.add_score(ScoreRequest(name, tuple(random_prompt(3000, 5)), MIXED))
    engine.add(request("a", [5], max_new_tokens=12, ignore_eos=True))
    order: list[str] = []
    while not engine.idle:
        order += [output.request_id if not isinstance(output.content, TokenEvent) else "token" for output in engine.step()]
    assert order.index("one") > 2, "no token came while a text was scored"
    assert 0 < order.index("two") - order.index("one") <= 2, "two texts of one length are done one after the other, not by turns"
    assert order.count("token") == 12


def test_tenants_take_turns_with_their_texts(gpt2: Parts) -> None:
    text = tuple(random_prompt(3000, 5))

    def steps_of_bob(texts_of_alice: int) -> int:
        engine, steps = make_engine(gpt2), 0
        for number in range(texts_of_alice):
            engine.add_score(ScoreRequest(f"alice-{number}", text, LM_ALONE, tenant="alice"))
        engine.step()  # so that one of hers is begun
        engine.add_score(ScoreRequest("bob", text, LM_ALONE, tenant="bob"))
        while not any(output.request_id == "bob" for output in engine.step()):
            steps += 1
        assert set(drive(engine)) == {f"alice-{number}" for number in range(texts_of_alice)}
        return steps

    alone_ = steps_of_bob(0)
    assert alone_ > 2, "the text is too short to tell"
    assert steps_of_bob(4) <= 2 * alone_ + 1


def test_texts_that_are_scored_are_counted(gpt2: Parts) -> None:
    reports: list[StepReport] = []

    class Observer(Unobserved):
        def step(self, report: StepReport) -> None:
            reports.append(report)

    engine = make_engine(gpt2, options={"observer": Observer()})
    for name, length in (("a", 3000), ("b", 5)):
        engine.add_score(ScoreRequest(name, tuple(random_prompt(length, 5)), LM_ALONE, tenant=name))
    drive(engine)
    assert (reports[0].scoring, reports[0].scoring_tokens) == (2, 3005)
    assert {(report.scoring, report.scoring_tokens) for report in reports} == {(2, 3005), (1, 3000), (0, 0)}


def test_texts_to_be_scored_wait_within_a_bound_of_tokens(gpt2: Parts) -> None:
    engine = make_engine(gpt2, max_waiting_tokens=100)
    engine.add_score(ScoreRequest("long", tuple(random_prompt(150, 5)), LM_ALONE))
    with pytest.raises(QueueFull, match="152 tokens would be waiting to be scored, the limit is 100"):
        engine.add_score(ScoreRequest("more", (5, 6), LM_ALONE))
    assert set(drive(engine)) == {"long"}
    engine.add_score(ScoreRequest("more", (5, 6), LM_ALONE))
    assert set(drive(engine)) == {"more"}


def test_texts_of_one_tenant_leave_room_for_those_of_others(gpt2: Parts) -> None:
    engine = make_engine(gpt2, max_waiting_tokens=80)
    engine.add_score(ScoreRequest("a", tuple(random_prompt(50, 5)), LM_ALONE, tenant="greedy"))
    with pytest.raises(QueueFull, match="71 tokens of 'greedy' would be waiting to be scored, the limit for one caller is 70"):
        engine.add_score(ScoreRequest("b", tuple(random_prompt(21, 5)), LM_ALONE, tenant="greedy"))
    engine.add_score(ScoreRequest("c", tuple(random_prompt(30, 5)), LM_ALONE, tenant="modest"))
    assert set(drive(engine)) == {"a", "c"}


def test_a_text_that_can_not_be_scored_ends_its_own_request(gpt2: Parts) -> None:
    engine = make_engine(gpt2)
    engine.add_score(ScoreRequest("bad", (5, 10_000, 7), LM_ALONE))
    engine.add_score(ScoreRequest("good", (5, 6, 7), LM_ALONE))
    other = noise(1)[0]
    engine.add(other)
    answers = drive(engine)
    assert isinstance(answers["bad"].failure, EngineFailed)
    assert answers["good"].scores is not None
    assert answers[other.request_id].tokens == alone(gpt2, other)[1].tokens


def test_a_scoring_request_can_be_cancelled(gpt2: Parts) -> None:
    engine = make_engine(gpt2)
    engine.add_score(ScoreRequest("s", tuple(random_prompt(3000, 5)), LM_ALONE))
    engine.step()
    assert not engine.idle
    engine.cancel("s")
    assert engine.idle
