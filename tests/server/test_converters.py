"""Messages to requests and back: defaults, every bound with its field's path, and nothing lost on the way."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.errors import InvalidInput
from knnlm.sampling import SamplingParams
from knnlm_server import converters
from knnlm_server.pb import generation_pb2 as pb
from knnlm_server.sequence import (
    Alternative,
    DetailParams,
    FinishEvent,
    FinishReason,
    Limits,
    NeighborEvidence,
    ScoreResult,
    StoppingParams,
    TokenEvent,
)
from tests.server.fake_engine import DEFAULT_RETRIEVAL, INFO, LIMITS, NEIGHBOR, ByteTokenizer

READER = converters.RequestReader(ByteTokenizer(), INFO)

finite = st.floats(allow_nan=False, allow_infinity=False)
log_prob = st.one_of(finite, st.just(-math.inf))
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
count = st.integers(0, 2**31)
neighbors = st.builds(
    NeighborEvidence,
    entry=st.integers(0, 2**63),
    token_id=count,
    text=text,
    weight=finite,
    distance=finite,
    document_id=text,
    source=text,
    character_start=st.none() | count,
    character_end=st.none() | count,
    line=st.none() | count,
    left_context=text,
)
tokens = st.builds(
    TokenEvent,
    index=count,
    token_id=count,
    text=text,
    token_text=text,
    log_prob=st.none() | log_prob,
    lm_log_prob=st.none() | log_prob,
    knn_log_prob=st.none() | log_prob,
    knn_share=st.none() | finite,
    alternatives=st.lists(st.builds(Alternative, count, text, log_prob), max_size=3).map(tuple),
    neighbors=st.lists(neighbors, max_size=3).map(tuple),
)


def request(prompt: Any = "abc", truncate_prompt: bool = False, **parts: Any) -> pb.GenerateRequest:
    stopping = {"max_new_tokens": 8} | parts.pop("stopping", {})
    message = pb.Input(text=prompt) if isinstance(prompt, str) else pb.Input(token_ids=pb.TokenIds(ids=prompt))
    options = pb.GenerationOptions(
        sampling=pb.SamplingOptions(**parts.pop("sampling", {})),
        stopping=pb.StoppingOptions(**stopping),
        retrieval=pb.RetrievalOptions(**parts.pop("retrieval", {})),
        detail=pb.DetailOptions(**parts.pop("detail", {})),
        truncate_prompt=truncate_prompt,
    )
    return pb.GenerateRequest(prompt=message, options=options)


def refused(message: Any, reader: converters.RequestReader = READER) -> InvalidInput:
    read = reader.score if isinstance(message, pb.ScoreRequest) else reader.generation
    with pytest.raises(InvalidInput) as caught:
        read(message, "r1")
    return caught.value


def test_a_bare_prompt_gets_the_documented_defaults() -> None:
    roomy = replace(INFO, limits=Limits(context=1024))
    found = converters.RequestReader(ByteTokenizer(bos=256), roomy).generation(pb.GenerateRequest(prompt=pb.Input(text="hi")), "r1")
    assert found.request_id == "r1"
    assert found.prompt == (256, 104, 105)
    assert found.sampling == SamplingParams()
    assert found.stopping == StoppingParams()
    assert found.stopping.max_new_tokens == 128
    assert found.retrieval == DEFAULT_RETRIEVAL
    assert found.detail == DetailParams()


def test_every_option_arrives() -> None:
    sampling = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2, "seed": 0}
    stopping = {"max_new_tokens": 9, "min_new_tokens": 2, "stop_strings": ["x"], "stop_token_ids": [0, 3], "ignore_eos": True}
    detail = {"log_probs": True, "alternatives": 2, "neighbors": 3}
    retrieval = {"interpolation_weight": 0.5, "k": 3, "knn_temperature": 2.5}
    found = READER.generation(request(sampling=sampling, stopping=stopping, detail=detail, retrieval=retrieval), "r1")
    assert found.sampling == SamplingParams(**sampling)
    assert found.stopping == StoppingParams(9, 2, ("x",), (0, 3), True, LIMITS.max_seconds)
    assert found.detail == DetailParams(True, 2, 3)
    assert (found.retrieval.weight, found.retrieval.k, found.retrieval.temperature) == (0.5, 3, 2.5)


def test_zero_is_not_unset() -> None:
    found = READER.generation(request(sampling={"temperature": 0, "seed": 0}, retrieval={"interpolation_weight": 0}), "r1")
    assert (found.sampling.temperature, found.sampling.seed, found.retrieval.weight) == (0, 0, 0)


def test_off_is_weight_zero_and_stands_alone() -> None:
    assert READER.generation(request(retrieval={"off": True}), "r1").retrieval.weight == 0
    error = refused(request(retrieval={"off": True, "k": 3}))
    assert error.field == "options.retrieval.off"
    assert "k" in error.problem


@pytest.mark.parametrize("message", [pb.GenerateRequest, pb.StreamGenerateRequest])
def test_both_generation_requests_have_the_same_fields(message: Any) -> None:
    shape = [(field.name, field.number, field.message_type.full_name) for field in message.DESCRIPTOR.fields]
    assert shape == [("prompt", 1, "knnlm.v1.Input"), ("options", 2, "knnlm.v1.GenerationOptions")]


@pytest.mark.parametrize(
    ("message", "params"),
    [
        (pb.SamplingOptions, SamplingParams),
        (pb.StoppingOptions, StoppingParams),
        (pb.DetailOptions, DetailParams),
        (pb.Limits, Limits),
        (pb.Neighbor, NeighborEvidence),
        (pb.GeneratedToken, TokenEvent),
        (pb.GetServerInfoResponse, type(INFO)),
    ],
)
def test_messages_and_dataclasses_have_the_same_names(message: Any, params: Any) -> None:
    assert {field.name for field in message.DESCRIPTOR.fields} == {field.name for field in fields(params)}


SAMPLING, STOPPING, RETRIEVAL, DETAIL = "options.sampling", "options.stopping", "options.retrieval", "options.detail"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -0.5])
@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("sampling", "temperature"),
        ("sampling", "top_p"),
        ("sampling", "min_p"),
        ("sampling", "repetition_penalty"),
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
        ({"stopping": {"max_new_tokens": 0}}, f"{STOPPING}.max_new_tokens"),
        ({"stopping": {"max_new_tokens": LIMITS.context}}, f"{STOPPING}.max_new_tokens"),
        ({"stopping": {"max_new_tokens": LIMITS.context}, "truncate_prompt": True}, f"{STOPPING}.max_new_tokens"),
        ({"stopping": {"min_new_tokens": 9}}, f"{STOPPING}.min_new_tokens"),
        ({"stopping": {"stop_strings": ["a", ""]}}, f"{STOPPING}.stop_strings[1]"),
        ({"stopping": {"stop_strings": ["a" * 1001]}}, f"{STOPPING}.stop_strings[0]"),
        ({"stopping": {"stop_strings": ["a", "b", "c"]}}, f"{STOPPING}.stop_strings"),
        ({"stopping": {"stop_token_ids": [0, 257]}}, f"{STOPPING}.stop_token_ids[1]"),
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


@pytest.mark.parametrize(("place", "path"), [("", "request"), ("options", "options"), ("options.sampling", "options.sampling")])
def test_fields_that_the_server_does_not_know_are_refused(place: str, path: str) -> None:
    message = request()
    part: Any = message
    for name in filter(None, place.split(".")):
        part = getattr(part, name)
    part.MergeFromString(b"\xa0\x06\x01")
    error = refused(message)
    assert error.field == path
    assert "100" in error.problem


@given(tokens)
def test_token_events_survive_the_wire(event: TokenEvent) -> None:
    wire = converters.token_message(event).SerializeToString()
    assert converters.read_token(pb.GeneratedToken.FromString(wire)) == event


@given(st.sampled_from(FinishReason), text, count, count)
def test_finish_events_survive_the_wire(reason: FinishReason, rest: str, prompt: int, completion: int) -> None:
    event = FinishEvent(reason, rest, prompt, completion)
    wire = converters.finish_message(event).SerializeToString()
    assert converters.read_finish(pb.Finish.FromString(wire)) == event


def test_every_finish_reason_of_the_proto_is_known() -> None:
    assert {f"FINISH_REASON_{reason.name}" for reason in FinishReason} == set(pb.FinishReason.keys()) - {"FINISH_REASON_UNSPECIFIED"}


def test_server_info_survives_the_wire() -> None:
    wire = converters.server_info_message(INFO).SerializeToString()
    assert converters.read_server_info(pb.GetServerInfoResponse.FromString(wire)) == INFO


def test_a_completion_is_its_pieces_and_what_was_held_back() -> None:
    pieces = [TokenEvent(0, 97, "a", "a", neighbors=(NEIGHBOR,)), TokenEvent(1, 98, "", "b")]
    message = converters.completion_message(pieces, FinishEvent(FinishReason.EOS, "b", 3, 2))
    assert (message.text, message.finish_reason, len(message.tokens)) == ("ab", pb.FINISH_REASON_EOS, 2)


def test_scores_keep_their_tokens() -> None:
    scored = READER.score(pb.ScoreRequest(input=pb.Input(text="abc")), "r1")
    message = converters.score_message(scored, ScoreResult((-1.0, -2.0), (-3.0, -4.0), (-math.inf, -5.0)))
    assert list(message.token_ids) == [97, 98, 99]
    assert list(message.knn_log_probs) == [-math.inf, -5.0]
    searched_nothing = replace(scored, retrieval=replace(DEFAULT_RETRIEVAL, weight=0.0))
    assert not converters.score_message(searched_nothing, ScoreResult((-1.0,), (-3.0,), (-math.inf,))).knn_log_probs
