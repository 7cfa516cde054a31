"""Results to messages and back: nothing is lost on the way."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.sampling import SamplingParams
from knnlm_server import converters
from knnlm_server.pb import generation_pb2 as pb
from knnlm_server.sequence import (
    Alternative,
    CompletionEvidence,
    DatastoreChoice,
    DatastoreInfo,
    DetailParams,
    DocumentWeight,
    FinishEvent,
    FinishReason,
    Limits,
    NeighborEvidence,
    RetrieveRequest,
    RetrieveResult,
    ScoreRequest,
    ScoreResult,
    StoppingParams,
    TokenEvent,
    VerbatimRun,
)
from tests.server.fake_engine import DEFAULT_RETRIEVAL, INFO, NEIGHBOR

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
    datastore=text,
    metadata=st.dictionaries(text, st.none() | st.booleans() | st.integers(-(2**53), 2**53) | finite | text, max_size=3),
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
    alternatives=st.lists(st.builds(Alternative, count, text, log_prob, st.none() | log_prob, st.none() | log_prob), max_size=3).map(tuple),
    neighbors=st.lists(neighbors, max_size=3).map(tuple),
    interpolation_weight=st.none() | finite,
    sample=count,
)
documents = st.builds(DocumentWeight, text, text, text, finite)
runs = st.builds(VerbatimRun, count, count, text, text, text, text, st.none() | count, st.none() | count, st.none() | count)
evidence = st.builds(CompletionEvidence, finite, count, st.lists(documents, max_size=3).map(tuple), st.none() | runs)
finishes = st.builds(FinishEvent, st.sampled_from(FinishReason), text, count, count, count, st.none() | evidence)


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
        (pb.Alternative, Alternative),
        (pb.DocumentWeight, DocumentWeight),
        (pb.VerbatimRun, VerbatimRun),
        (pb.CompletionEvidence, CompletionEvidence),
        (pb.DatastoreInfo, DatastoreInfo),
        (pb.DatastoreWeight, DatastoreChoice),
        (pb.Neighbor, NeighborEvidence),
        (pb.GeneratedToken, TokenEvent),
        (pb.GetServerInfoResponse, type(INFO)),
    ],
)
def test_messages_and_dataclasses_have_the_same_names(message: Any, params: Any) -> None:
    assert {field.name for field in message.DESCRIPTOR.fields} == {field.name for field in fields(params)}


@given(tokens)
def test_token_events_survive_the_wire(event: TokenEvent) -> None:
    wire = converters.token_message(event).SerializeToString()
    assert converters.read_token(pb.GeneratedToken.FromString(wire)) == event


@given(finishes)
def test_finish_events_survive_the_wire(event: FinishEvent) -> None:
    wire = converters.finish_message(event).SerializeToString()
    assert converters.read_finish(pb.Finish.FromString(wire)) == event


@given(st.lists(tokens, max_size=2), finishes)
def test_completions_survive_the_wire(pieces: list[TokenEvent], finish: FinishEvent) -> None:
    wire = converters.completion_message([converters.token_message(piece) for piece in pieces], finish).SerializeToString()
    found, end = converters.read_completion(pb.Completion.FromString(wire), finish.prompt_tokens)
    assert found == pieces
    assert end == replace(finish, text="".join(piece.text for piece in pieces) + finish.text)


@given(st.lists(neighbors, max_size=3), st.lists(count, min_size=1, max_size=3))
def test_neighbours_of_a_context_survive_the_wire(found: list[NeighborEvidence], context: list[int]) -> None:
    request = RetrieveRequest("r1", tuple(context), DEFAULT_RETRIEVAL, 3)
    wire = converters.retrieve_message(request, RetrieveResult(tuple(found))).SerializeToString()
    message = pb.RetrieveResponse.FromString(wire)
    assert list(message.token_ids) == context
    assert [converters.read_neighbor(neighbor) for neighbor in message.neighbors] == found


def test_every_finish_reason_of_the_proto_is_known() -> None:
    assert {f"FINISH_REASON_{reason.name}" for reason in FinishReason} == set(pb.FinishReason.keys()) - {"FINISH_REASON_UNSPECIFIED"}


GATED = replace(INFO.datastores[0], default_retrieval=replace(INFO.datastores[0].default_retrieval, adaptive=True))


@pytest.mark.parametrize("seconds", [None, 60.0])
@pytest.mark.parametrize("datastores", [INFO.datastores, (GATED, *INFO.datastores[1:]), ()])
def test_server_info_survives_the_wire(seconds: float | None, datastores: tuple[DatastoreInfo, ...]) -> None:
    info = replace(INFO, limits=replace(INFO.limits, max_seconds=seconds), datastores=datastores)
    wire = converters.server_info_message(info).SerializeToString()
    assert converters.read_server_info(pb.GetServerInfoResponse.FromString(wire)) == info


def test_a_completion_is_its_pieces_and_what_was_held_back() -> None:
    pieces = [TokenEvent(0, 97, "a", "a", neighbors=(NEIGHBOR,)), TokenEvent(1, 98, "", "b")]
    message = converters.completion_message([converters.token_message(piece) for piece in pieces], FinishEvent(FinishReason.EOS, "b", 3, 2))
    assert (message.text, message.finish_reason, len(message.tokens)) == ("ab", pb.FINISH_REASON_EOS, 2)


def test_scores_keep_their_tokens() -> None:
    scored = ScoreRequest("r1", (97, 98, 99), DEFAULT_RETRIEVAL)
    message = converters.score_message(scored, ScoreResult((-1.0, -2.0), (-3.0, -4.0), (-math.inf, -5.0)))
    assert list(message.token_ids) == [97, 98, 99]
    assert list(message.knn_log_probs) == [-math.inf, -5.0]
    searched_nothing = replace(scored, retrieval=replace(DEFAULT_RETRIEVAL, weight=0.0))
    assert not converters.score_message(searched_nothing, ScoreResult((-1.0,), (-3.0,), (-math.inf,))).knn_log_probs
