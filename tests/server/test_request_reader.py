"""Requests from messages: defaults, every option, every bound with its field's path, and nothing dropped."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.errors import InvalidInput
from knnlm.sampling import SamplingParams
from knnlm_server.errors import DatastoreNotLoaded
from knnlm_server.pb import generation_pb2 as pb
from knnlm_server.request_reader import RequestReader
from knnlm_server.sequence import DatastoreChoice, DetailParams, Limits, RetrievalParams, StoppingParams
from tests.server.fake_engine import DEFAULT_RETRIEVAL, INFO, LIMITS, ByteTokenizer

READER = RequestReader(ByteTokenizer(), INFO)
SAMPLING, STOPPING, RETRIEVAL, DETAIL = "options.sampling", "options.stopping", "options.retrieval", "options.detail"
# Number 100, a varint.
UNKNOWN_FIELD = b"\xa0\x06\x01"


def request(prompt: Any = "abc", kind: Any = pb.GenerateRequest, **parts: Any) -> Any:
    stopping = {"max_new_tokens": 8} | parts.pop("stopping", {})
    options = pb.GenerationOptions(
        sampling=pb.SamplingOptions(**parts.pop("sampling", {})),
        stopping=pb.StoppingOptions(**stopping),
        retrieval=pb.RetrievalOptions(**parts.pop("retrieval", {})),
        detail=pb.DetailOptions(**parts.pop("detail", {})),
        **parts,
    )
    return kind(prompt=given_input(prompt), options=options)


def given_input(prompt: str | list[int]) -> pb.Input:
    return pb.Input(text=prompt) if isinstance(prompt, str) else pb.Input(token_ids=pb.TokenIds(ids=prompt))


def mix(**weights: float | None) -> dict[str, Any]:
    return {"datastores": [pb.DatastoreWeight(name=name, weight=weight) for name, weight in weights.items()]}


def read(message: Any, reader: RequestReader = READER) -> Any:
    if isinstance(message, pb.ScoreRequest):
        return reader.score(message, "r1")
    if isinstance(message, pb.RetrieveRequest):
        return reader.retrieve(message, "r1")
    if isinstance(message, pb.TokenizeRequest):
        return reader.tokenize(message)
    if isinstance(message, pb.DetokenizeRequest):
        return reader.detokenize(message)
    return reader.generation(message, "r1")


def refused(message: Any, reader: RequestReader = READER) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        read(message, reader)
    return caught.value


def test_a_bare_prompt_gets_the_documented_defaults() -> None:
    roomy = replace(INFO, limits=Limits(context=1024))
    found = RequestReader(ByteTokenizer(bos=256), roomy).generation(pb.GenerateRequest(prompt=pb.Input(text="hi")), "r1")
    assert found.request_id == "r1"
    assert found.prompt == (256, 104, 105)
    assert found.sampling == SamplingParams()
    assert found.stopping == StoppingParams()
    assert found.stopping.max_new_tokens == 128
    assert found.retrieval == DEFAULT_RETRIEVAL
    assert found.detail == DetailParams()


def test_every_option_arrives() -> None:
    sampling = {
        **{"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.8, "seed": 0},
        **{"repetition_penalty": 1.2, "frequency_penalty": -0.5, "presence_penalty": 100},
    }
    stopping = {"max_new_tokens": 9, "min_new_tokens": 2, "stop_strings": ["x"], "stop_token_ids": [0, 3], "ignore_eos": True}
    detail = {"log_probs": True, "alternatives": 2, "neighbors": 3, "evidence": True}
    retrieval = {"interpolation_weight": 0.5, "k": 3, "knn_temperature": 2.5}
    message = request(sampling=sampling, stopping=stopping | {"max_seconds": 1.5}, detail=detail, retrieval=retrieval)
    found = READER.generation(message, "r1", "tenant")
    assert found.sampling == SamplingParams(**sampling)
    assert found.stopping == StoppingParams(9, 2, ("x",), (0, 3), True, 1.5)
    assert found.detail == DetailParams(True, 2, 3, True)
    assert found.retrieval == RetrievalParams(0.5, 3, 2.5)
    assert found.tenant == "tenant"


def test_biases_arrive_in_the_order_of_their_tokens() -> None:
    found = read(request(sampling={"logit_bias": {5: -100, 0: 2.5}}))
    assert found.sampling.logit_bias == ((0, 2.5), (5, -100))


def test_bad_words_are_the_spellings_of_text_and_ids_as_they_are() -> None:
    reader = RequestReader(ByteTokenizer(bos=256), INFO)
    words = [given_input("ab"), given_input([7, 256])]
    assert read(request(sampling={"bad_words": words}), reader).sampling.bad_words == (tuple(b"ab"), tuple(b" ab"), (7, 256))


def test_bad_words_that_are_the_same_are_kept_once() -> None:
    words = [given_input("a"), given_input(list(b" a"))]
    assert read(request(sampling={"bad_words": words})).sampling.bad_words == ((97,), (32, 97))


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), ByteTokenizer(bos=256)])
def test_an_empty_bad_word_is_refused_whatever_the_tokenizer_puts_before_text(tokenizer: ByteTokenizer) -> None:
    reader = RequestReader(tokenizer, INFO)
    for word, field in (("", "text"), ([], "token_ids.ids")):
        message = request(sampling={"bad_words": [given_input("a"), given_input(word)]})
        assert refused(message, reader).field == f"{SAMPLING}.bad_words[1].{field}"
    assert refused(request(sampling={"bad_words": [pb.Input()]}), reader).field == f"{SAMPLING}.bad_words[0]"


def test_a_bad_word_that_comes_to_no_tokens_is_refused() -> None:
    class Deaf(ByteTokenizer):
        def encode_plain(self, text: str) -> list[int]:
            return []

    assert (
        refused(request(sampling={"bad_words": [given_input("a")]}), RequestReader(Deaf(), INFO)).field == f"{SAMPLING}.bad_words[0].text"
    )


@pytest.mark.parametrize(
    ("options", "samples", "ranked"),
    [({}, 1, False), ({"num_samples": 3}, 3, False), ({"best_of": 4}, 4, True), ({"num_samples": 2, "best_of": 2}, 2, False)],
)
def test_samples_and_whether_the_best_are_wanted(options: dict[str, int], samples: int, ranked: bool) -> None:
    found = read(request(**options))
    assert (found.samples, found.mean_log_prob) == (samples, ranked)


def test_a_stream_cannot_choose_the_best() -> None:
    assert refused(request(kind=pb.StreamGenerateRequest, num_samples=2, best_of=3)).field == "options.best_of"
    assert read(request(kind=pb.StreamGenerateRequest, num_samples=2, best_of=2)).samples == 2


def test_seconds_are_bounded_by_the_servers_limit_if_it_has_one() -> None:
    unlimited = RequestReader(ByteTokenizer(), replace(INFO, limits=replace(LIMITS, max_seconds=None)))
    assert read(request()).stopping.max_seconds == 60
    assert read(request(), unlimited).stopping.max_seconds is None
    assert read(request(stopping={"max_seconds": 1e6}), unlimited).stopping.max_seconds == 1e6


def test_a_datastore_brings_its_own_defaults() -> None:
    assert read(request(retrieval=mix(other=None))).retrieval == RetrievalParams(0.5, 8, 20.0, (DatastoreChoice("other"),))


def test_an_adaptive_weight_is_for_requests_that_leave_the_mixture_to_one_datastore() -> None:
    adaptive = replace(DEFAULT_RETRIEVAL, adaptive=True)
    main, *others = INFO.datastores
    reader = RequestReader(ByteTokenizer(), replace(INFO, datastores=(replace(main, default_retrieval=adaptive), *others)))
    assert read(request(), reader).retrieval == adaptive
    assert read(request(retrieval=mix(main=2.0)), reader).retrieval == replace(adaptive, datastores=(DatastoreChoice("main", 2.0),))
    score = pb.ScoreRequest(input=given_input("ab"))
    assert read(score, reader).retrieval == adaptive
    for setting in ({"k": 16}, {"knn_temperature": 10.0}, {"interpolation_weight": 0.25}):
        assert read(request(retrieval=setting), reader).retrieval == DEFAULT_RETRIEVAL
        assert not read(request(retrieval={"off": True}), reader).retrieval.searches
    assert not read(request(retrieval=mix(main=1, other=1)), reader).retrieval.adaptive
    assert not read(request(retrieval=mix(other=1)), reader).retrieval.adaptive
    # A search is what is asked for.
    assert read(pb.RetrieveRequest(context=given_input("a")), reader).retrieval == replace(DEFAULT_RETRIEVAL, weight=1.0)


def test_a_mix_takes_the_defaults_of_the_first() -> None:
    found = read(request(retrieval=mix(other=2, main=None) | {"k": 5})).retrieval
    assert found == RetrievalParams(0.5, 5, 20.0, (DatastoreChoice("other", 2.0), DatastoreChoice("main", 1.0)))


@pytest.mark.parametrize(
    "build", [request, lambda **parts: pb.ScoreRequest(input=given_input("ab"), retrieval=pb.RetrievalOptions(**parts["retrieval"]))]
)
def test_a_datastore_that_is_not_there_is_told_with_those_that_are(build: Any) -> None:
    with pytest.raises(DatastoreNotLoaded, match=r"'none'.*foreign, main, other"):
        read(build(retrieval=mix(none=None)))


def test_datastores_that_do_not_fit_together_are_refused_with_both_sides() -> None:
    error = refused(request(retrieval=mix(main=1, foreign=1)))
    assert error.field == f"{RETRIEVAL}.datastores"
    assert all(word in error.problem for word in ("main", "foreign", "'exact'", "'index'"))


def test_without_a_datastore_the_base_model_alone_answers() -> None:
    empty = RequestReader(ByteTokenizer(), replace(INFO, datastores=()))
    assert read(request(retrieval={"off": True}), empty).retrieval.weight == 0
    for message in (request(), pb.RetrieveRequest(context=given_input("a"))):
        with pytest.raises(DatastoreNotLoaded, match="retrieval off"):
            read(message, empty)


def test_a_context_gets_the_documented_defaults() -> None:
    found = read(pb.RetrieveRequest(context=given_input("abc")))
    assert (found.tokens, found.retrieval, found.neighbors) == ((97, 98, 99), replace(DEFAULT_RETRIEVAL, weight=1.0), LIMITS.max_neighbors)


def test_every_option_of_a_context_arrives() -> None:
    message = pb.RetrieveRequest(context=given_input([1, 2]), k=2, knn_temperature=3.5, neighbors=1, **mix(other=2, main=1))
    found = read(message)
    assert found.retrieval == RetrievalParams(1.0, 2, 3.5, (DatastoreChoice("other", 2.0), DatastoreChoice("main", 1.0)))
    assert (found.tokens, found.neighbors) == ((1, 2), 1)


@pytest.mark.parametrize(("stores", "neighbors"), [(["main"], 1), (["main", "other"], 2)])
def test_all_neighbours_that_vote_are_meant_where_none_are_asked_for(stores: list[str], neighbors: int) -> None:
    assert read(pb.RetrieveRequest(context=given_input("a"), k=1, **mix(**dict.fromkeys(stores)))).neighbors == neighbors


def test_a_long_context_is_refused_or_its_end_is_kept() -> None:
    long = [*range(LIMITS.context + 1)]
    problem = refused(pb.RetrieveRequest(context=given_input(long))).problem
    assert all(str(number) in problem for number in (65, 64))
    assert list(read(pb.RetrieveRequest(context=given_input(long), truncate_context=True)).tokens) == long[1:]
    assert list(read(pb.RetrieveRequest(context=given_input(long[1:]))).tokens) == long[1:]


def test_ids_to_be_written_as_text_may_be_none() -> None:
    assert read(pb.DetokenizeRequest()) == ()
    assert read(pb.DetokenizeRequest(token_ids=[0, 256])) == (0, 256)


def test_zero_is_not_unset() -> None:
    found = READER.generation(request(sampling={"temperature": 0, "seed": 0}, retrieval={"interpolation_weight": 0}), "r1")
    assert (found.sampling.temperature, found.sampling.seed, found.retrieval.weight) == (0, 0, 0)


def test_off_is_weight_zero_and_stands_alone() -> None:
    assert READER.generation(request(retrieval={"off": True}), "r1").retrieval.weight == 0
    error = refused(request(retrieval={"off": True, "k": 3}))
    assert error.field == "options.retrieval.off"
    assert "k" in error.problem


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -0.5])
@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("sampling", "temperature"),
        ("sampling", "top_p"),
        ("sampling", "min_p"),
        ("sampling", "typical_p"),
        ("sampling", "repetition_penalty"),
        ("stopping", "max_seconds"),
        ("retrieval", "interpolation_weight"),
        ("retrieval", "knn_temperature"),
    ],
)
def test_real_numbers_out_of_range_are_refused_by_name(part: str, name: str, bad: float) -> None:
    assert refused(request(**{part: {name: bad}})).field == f"options.{part}.{name}"


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ({"sampling": {"top_p": 0}}, f"{SAMPLING}.top_p"),
        ({"sampling": {"top_p": 1.01}}, f"{SAMPLING}.top_p"),
        ({"sampling": {"min_p": 1.01}}, f"{SAMPLING}.min_p"),
        ({"sampling": {"repetition_penalty": 0}}, f"{SAMPLING}.repetition_penalty"),
        ({"sampling": {"typical_p": 0}}, f"{SAMPLING}.typical_p"),
        ({"sampling": {"typical_p": 1.01}}, f"{SAMPLING}.typical_p"),
        ({"sampling": {"frequency_penalty": 100.5}}, f"{SAMPLING}.frequency_penalty"),
        ({"sampling": {"frequency_penalty": math.nan}}, f"{SAMPLING}.frequency_penalty"),
        ({"sampling": {"presence_penalty": -math.inf}}, f"{SAMPLING}.presence_penalty"),
        ({"sampling": {"logit_bias": {7: 100.5}}}, f"{SAMPLING}.logit_bias[7]"),
        ({"sampling": {"logit_bias": {7: math.nan}}}, f"{SAMPLING}.logit_bias[7]"),
        ({"sampling": {"logit_bias": {7: 1, 257: 1}}}, f"{SAMPLING}.logit_bias[257]"),
        ({"sampling": {"logit_bias": dict.fromkeys(range(4), 1.0)}}, f"{SAMPLING}.logit_bias"),
        ({"sampling": {"bad_words": [pb.Input(text="a")] * 3}}, f"{SAMPLING}.bad_words"),
        ({"sampling": {"bad_words": [pb.Input(text="a" * 101)]}}, f"{SAMPLING}.bad_words[0].text"),
        ({"sampling": {"bad_words": [given_input([1, 257])]}}, f"{SAMPLING}.bad_words[0].token_ids.ids[1]"),
        ({"sampling": {"bad_words": [given_input([1] * 65)]}}, f"{SAMPLING}.bad_words[0].token_ids.ids"),
        ({"sampling": {"bad_words": [given_input("a" * 64)]}}, f"{SAMPLING}.bad_words[0].text"),
        ({"num_samples": 0}, "options.num_samples"),
        ({"num_samples": 5}, "options.num_samples"),
        ({"best_of": 0}, "options.best_of"),
        ({"best_of": 5}, "options.best_of"),
        ({"num_samples": 3, "best_of": 2}, "options.best_of"),
        ({"stopping": {"max_seconds": 0}}, f"{STOPPING}.max_seconds"),
        ({"stopping": {"max_seconds": 60.5}}, f"{STOPPING}.max_seconds"),
        ({"retrieval": mix(main=0)}, f"{RETRIEVAL}.datastores[0].weight"),
        ({"retrieval": mix(main=1, other=math.nan)}, f"{RETRIEVAL}.datastores[1].weight"),
        ({"retrieval": mix(main=-1)}, f"{RETRIEVAL}.datastores[0].weight"),
        ({"retrieval": {"datastores": [pb.DatastoreWeight()]}}, f"{RETRIEVAL}.datastores[0].name"),
        ({"retrieval": {"datastores": [pb.DatastoreWeight(name="main")] * 2}}, f"{RETRIEVAL}.datastores[1].name"),
        ({"retrieval": mix(main=1, other=1, foreign=1)}, f"{RETRIEVAL}.datastores"),
        ({"retrieval": mix(main=1) | {"off": True}}, f"{RETRIEVAL}.off"),
        ({"stopping": {"max_new_tokens": 0}}, f"{STOPPING}.max_new_tokens"),
        ({"stopping": {"max_new_tokens": LIMITS.context}}, f"{STOPPING}.max_new_tokens"),
        ({"stopping": {"max_new_tokens": LIMITS.context}, "truncate_prompt": True}, f"{STOPPING}.max_new_tokens"),
        ({"stopping": {"min_new_tokens": 9}}, f"{STOPPING}.min_new_tokens"),
        ({"stopping": {"stop_strings": ["a", ""]}}, f"{STOPPING}.stop_strings[1]"),
        ({"stopping": {"stop_strings": ["a" * 1001]}}, f"{STOPPING}.stop_strings[0]"),
        ({"stopping": {"stop_strings": ["a", "b", "c"]}}, f"{STOPPING}.stop_strings"),
        ({"stopping": {"stop_token_ids": [0, 257]}}, f"{STOPPING}.stop_token_ids[1]"),
        ({"stopping": {"stop_token_ids": [5] * 4}}, f"{STOPPING}.stop_token_ids"),
        ({"retrieval": {"interpolation_weight": 1.01}}, f"{RETRIEVAL}.interpolation_weight"),
        ({"retrieval": {"k": 0}}, f"{RETRIEVAL}.k"),
        ({"retrieval": {"k": 33}}, f"{RETRIEVAL}.k"),
        ({"retrieval": {"knn_temperature": 0}}, f"{RETRIEVAL}.knn_temperature"),
        ({"detail": {"alternatives": 6}}, f"{DETAIL}.alternatives"),
        ({"detail": {"neighbors": 5}}, f"{DETAIL}.neighbors"),
        ({"prompt": ""}, "prompt.text"),
        ({"prompt": "a" * 101}, "prompt.text"),
        ({"prompt": []}, "prompt.token_ids.ids"),
        ({"prompt": [0, 256, 257]}, "prompt.token_ids.ids[2]"),
        ({"prompt": [1] * 57}, "prompt.token_ids.ids"),
        ({"prompt": "a" * 57}, "prompt.text"),
    ],
)
def test_values_out_of_range_are_refused_by_name(parts: dict[str, Any], field: str) -> None:
    assert refused(request(**parts)).field == field


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.GenerateRequest(), "options.stopping.max_new_tokens"),
        (pb.GenerateRequest(options=pb.GenerationOptions(stopping=pb.StoppingOptions(max_new_tokens=8))), "prompt"),
        (pb.ScoreRequest(), "input"),
        (pb.ScoreRequest(input=pb.Input(text="a")), "input.text"),
        (pb.ScoreRequest(input=pb.Input(text="a" * 51)), "input.text"),
        (pb.ScoreRequest(input=pb.Input(token_ids=pb.TokenIds(ids=[1, 300]))), "input.token_ids.ids[1]"),
        (pb.ScoreRequest(input=pb.Input(text="ab"), retrieval=pb.RetrievalOptions(k=0)), "retrieval.k"),
        (pb.RetrieveRequest(), "context"),
        (pb.RetrieveRequest(context=given_input([])), "context.token_ids.ids"),
        (pb.RetrieveRequest(context=given_input([257])), "context.token_ids.ids[0]"),
        (pb.RetrieveRequest(context=given_input("a"), k=0), "k"),
        (pb.RetrieveRequest(context=given_input("a"), k=33), "k"),
        (pb.RetrieveRequest(context=given_input("a"), knn_temperature=math.inf), "knn_temperature"),
        (pb.RetrieveRequest(context=given_input("a"), neighbors=0), "neighbors"),
        (pb.RetrieveRequest(context=given_input("a"), neighbors=5), "neighbors"),
        (pb.RetrieveRequest(context=given_input("a"), **mix(main=0)), "datastores[0].weight"),
        (pb.RetrieveRequest(context=given_input("a"), **mix(main=1, foreign=1)), "datastores"),
        (pb.TokenizeRequest(text="a" * 101), "text"),
        (pb.DetokenizeRequest(token_ids=[0] * 51), "token_ids"),
        (pb.DetokenizeRequest(token_ids=[0, 257]), "token_ids[1]"),
    ],
)
def test_missing_and_bad_inputs_are_refused_by_name(message: Any, field: str) -> None:
    assert refused(message).field == field


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers() -> None:
    problem = refused(request("a" * 60)).problem
    assert all(str(number) in problem for number in (60, 8, 68, 64, 56))


@given(length=st.integers(1, 90), new=st.integers(1, 63))
def test_truncation_keeps_the_last_tokens_that_fit(length: int, new: int) -> None:
    prompt = [i % 250 for i in range(length)]
    found = READER.generation(request(prompt, truncate_prompt=True, stopping={"max_new_tokens": new}), "r1")
    assert len(found.prompt) == min(length, LIMITS.context - new)
    assert list(found.prompt) == prompt[-len(found.prompt) :]


def test_a_prompt_that_just_fits_is_taken() -> None:
    assert len(READER.generation(request("a" * 56), "r1").prompt) == 56


@pytest.mark.parametrize(
    "place",
    [
        "",
        "prompt",
        "options",
        "options.sampling",
        "options.stopping",
        "options.retrieval",
        "options.detail",
        "options.sampling.bad_words[0]",
        "options.sampling.bad_words[0].token_ids",
        "options.retrieval.datastores[1]",
    ],
)
def test_fields_that_the_server_does_not_know_are_refused(place: str) -> None:
    message = request(sampling={"bad_words": [given_input([1])]}, retrieval=mix(main=1, other=1))
    part: Any = message
    for name in filter(None, place.replace("[", ".").replace("]", "").split(".")):
        part = part[int(name)] if name.isdigit() else getattr(part, name)
    part.MergeFromString(UNKNOWN_FIELD)
    error = refused(message)
    assert error.field == (place or "request")
    assert "100" in error.problem


@pytest.mark.parametrize("kind", [pb.ScoreRequest, pb.RetrieveRequest, pb.TokenizeRequest, pb.DetokenizeRequest])
def test_every_request_is_looked_at_for_fields_that_the_server_does_not_know(kind: Any) -> None:
    assert refused(kind.FromString(UNKNOWN_FIELD)).field == "request"
