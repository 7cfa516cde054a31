"""The service on a real port around a fake engine: what a client gets, and what becomes of the engine's generators."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from knnlm_server import converters, request_gate
from knnlm_server.errors import QueueFull
from knnlm_server.pb import generation_pb2 as pb
from knnlm_server.pb.generation_pb2_grpc import GenerationServiceStub
from knnlm_server.sequence import TokenEvent
from knnlm_server.service import SERVICE_NAME
from tests.server.conftest import WAIT_SECONDS, RunningServer
from tests.server.fake_engine import DEFAULT_RETRIEVAL, INFO, FakeEngine

Start = Callable[[FakeEngine], RunningServer]
Connect = Callable[[RunningServer], grpc.Channel]

OPTIONS = pb.GenerationOptions(stopping=pb.StoppingOptions(max_new_tokens=8))


@pytest.fixture
def connect() -> Iterator[Connect]:
    channels: list[grpc.Channel] = []

    def open_channel(server: RunningServer) -> grpc.Channel:
        channels.append(grpc.insecure_channel(server.target))
        return channels[-1]

    yield open_channel
    for channel in channels:
        channel.close()


@pytest.fixture
def stub_of(start_server: Start, connect: Connect) -> Callable[[FakeEngine], Any]:
    return lambda engine: GenerationServiceStub(connect(start_server(engine)))


def generate(text: str = "hi", options: pb.GenerationOptions = OPTIONS) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=pb.Input(text=text), options=options)


def stream(text: str = "hi", options: pb.GenerationOptions = OPTIONS) -> pb.StreamGenerateRequest:
    return pb.StreamGenerateRequest(prompt=pb.Input(text=text), options=options)


def call(stub: Any, method: str, options: pb.GenerationOptions = OPTIONS, timeout: float | None = None) -> Any:
    if method == "Generate":
        return stub.Generate(generate(options=options), timeout=timeout)
    return list(stub.StreamGenerate(stream(options=options), timeout=timeout))


def details(error: Any, kind: Any) -> Any:
    metadata = dict(error.trailing_metadata())
    for packed in status_pb2.Status.FromString(metadata["grpc-status-details-bin"]).details:
        if packed.Is(kind.DESCRIPTOR):
            return kind.FromString(packed.value)
    raise AssertionError(f"no {kind.__name__}")


def test_generate_returns_the_completion(stub_of: Any) -> None:
    response = stub_of(FakeEngine(["a", "b"])).Generate(generate())
    (completion,) = response.completions
    assert (completion.text, completion.sample) == ("ab!", 0)
    assert [token.token_text for token in completion.tokens] == ["a", "b"]
    assert (completion.finish_reason, response.prompt_tokens, completion.completion_tokens) == (pb.FINISH_REASON_LENGTH, 2, 2)
    assert not completion.tokens[0].HasField("log_prob")


def test_several_samples_come_in_the_order_of_their_numbers(stub_of: Any) -> None:
    response = stub_of(FakeEngine(["a"])).Generate(generate(options=pb.GenerationOptions(stopping=OPTIONS.stopping, num_samples=3)))
    assert [completion.sample for completion in response.completions] == [0, 1, 2]
    assert [len(completion.tokens) for completion in response.completions] == [1, 1, 1]


def test_best_of_returns_the_most_probable_completions_the_best_first(stub_of: Any) -> None:
    engine = FakeEngine(["a", "b"])  # its later samples are better
    options = pb.GenerationOptions(stopping=OPTIONS.stopping, num_samples=2, best_of=4)
    response = stub_of(engine).Generate(generate(options=options))
    assert [completion.sample for completion in response.completions] == [3, 2]
    assert [len(completion.tokens) for completion in response.completions] == [2, 2]
    assert (engine.requests[0].samples, engine.requests[0].mean_log_prob) == (4, True)


def test_a_stream_has_a_finish_for_each_sample(stub_of: Any) -> None:
    options = pb.GenerationOptions(stopping=OPTIONS.stopping, num_samples=2)
    events = list(stub_of(FakeEngine(["a", "b"])).StreamGenerate(stream(options=options)))
    assert [event.token.sample for event in events if event.HasField("token")] == [0, 1, 0, 1]
    assert [event.finish.sample for event in events if event.HasField("finish")] == [0, 1]


def test_stream_sends_tokens_then_the_finish(stub_of: Any) -> None:
    detail = pb.DetailOptions(log_probs=True, alternatives=2, neighbors=1)
    options = pb.GenerationOptions(stopping=OPTIONS.stopping, detail=detail)
    *tokens, last = stub_of(FakeEngine(["a", "b"])).StreamGenerate(stream(options=options))
    assert [event.token.text for event in tokens] == ["a", "b"]
    assert tokens[0].token.knn_log_prob == float("-inf")
    assert tokens[0].token.neighbors[0].source == "docs/a.txt"
    assert len(tokens[0].token.alternatives) == 2
    assert last.finish.text == "!"


def test_each_request_has_an_id_of_its_own(stub_of: Any) -> None:
    engine = FakeEngine()
    stub = stub_of(engine)
    stub.Generate(generate())
    stub.Generate(generate())
    assert len({request.request_id for request in engine.requests}) == 2


def test_tokens_arrive_as_they_are_made(stub_of: Any) -> None:
    engine = FakeEngine(["a", "b"], hold_after=1)
    call = stub_of(engine).StreamGenerate(stream())
    assert next(call).token.text == "a"
    assert not engine.closed.is_set()
    engine.release()
    assert next(call).token.text == "b"


def test_cancelling_a_stream_closes_the_engines_generator(stub_of: Any) -> None:
    engine = FakeEngine(["a", "b"], hold_after=1)
    call = stub_of(engine).StreamGenerate(stream())
    next(call)
    call.cancel()
    assert engine.closed.wait(WAIT_SECONDS)


def test_cancelling_a_unary_call_closes_the_engines_generator(stub_of: Any) -> None:
    engine = FakeEngine(["a", "b"], hold_after=1)
    call = stub_of(engine).Generate.future(generate())
    while not engine.requests:
        assert not call.done()
    call.cancel()
    assert engine.closed.wait(WAIT_SECONDS)


def test_messages_of_a_long_completion_are_made_as_its_tokens_come(stub_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, make = threading.Event(), converters.token_message

    def told(event: TokenEvent) -> pb.GeneratedToken:
        made.set()
        return make(event)

    monkeypatch.setattr(converters, "token_message", told)
    engine = FakeEngine(["a", "b"], hold_after=1)
    call = stub_of(engine).Generate.future(generate())
    assert made.wait(WAIT_SECONDS), "nothing was made of the first token while the second one is waited for"
    engine.release()
    assert call.result(WAIT_SECONDS).completions[0].text == "ab!"


@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
def test_an_expired_deadline_closes_the_engines_generator(stub_of: Any, method: str) -> None:
    engine = FakeEngine(["a", "b"], hold_after=1)
    stub = stub_of(engine)
    with pytest.raises(grpc.RpcError) as caught:
        call(stub, method, timeout=0.5)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    # On a machine that is busy enough, the deadline expires before the engine has heard of the request.
    assert not engine.requests or engine.closed.wait(WAIT_SECONDS)


def test_a_reader_that_reads_nothing_holds_up_nobody(stub_of: Any) -> None:
    engine = FakeEngine(["x" * 20_000] * 50)
    stub = stub_of(engine)
    unread = stub.StreamGenerate(stream())
    assert len(stub.Generate(generate()).completions[0].tokens) == 50
    unread.cancel()


@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
def test_bad_fields_are_named(stub_of: Any, method: str) -> None:
    engine = FakeEngine()
    stub = stub_of(engine)
    options = pb.GenerationOptions(stopping=OPTIONS.stopping, sampling=pb.SamplingOptions(top_p=1.5))
    with pytest.raises(grpc.RpcError) as caught:
        call(stub, method, options=options)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(caught.value, error_details_pb2.BadRequest).field_violations[0].field == "options.sampling.top_p"
    assert not engine.requests


def test_a_full_queue_says_when_to_come_again(stub_of: Any) -> None:
    stub = stub_of(FakeEngine(failure=QueueFull("256 requests are waiting.")))
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.StreamGenerate(stream("fail")))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(caught.value, error_details_pb2.RetryInfo).retry_delay.ToSeconds() > 0


def test_a_full_queue_says_when_by_the_pace_of_the_last_answers(stub_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_gate, "MOST_RETRY_SECONDS", 0.25)
    monkeypatch.setattr(request_gate, "LEAST_RETRY_SECONDS", 0.25)
    stub = stub_of(FakeEngine(failure=QueueFull("256 requests are waiting.")))
    stub.Generate(generate())
    stub.Score(pb.ScoreRequest(input=pb.Input(text="hi")))
    stub.Tokenize(pb.TokenizeRequest(text="hi"))  # which the engine does not work on
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(generate("fail"))
    assert details(caught.value, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == 250
    assert dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"] == "250"


def test_an_exception_in_the_engine_ends_only_its_own_request(stub_of: Any) -> None:
    engine = FakeEngine(["a", "b"], hold_after=1, failure=ZeroDivisionError("secret"))
    stub = stub_of(engine)
    other = stub.StreamGenerate(stream())
    next(other)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(generate("fail"))
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in caught.value.details()
    assert details(caught.value, error_details_pb2.RequestInfo).request_id in caught.value.details()
    engine.release()
    assert [event.WhichOneof("event") for event in other] == ["token", "finish"]


def test_score(stub_of: Any) -> None:
    response = stub_of(FakeEngine()).Score(pb.ScoreRequest(input=pb.Input(text="abc")))
    assert list(response.token_ids) == [97, 98, 99]
    assert list(response.log_probs) == [-1.0, -1.0]
    assert len(response.knn_log_probs) == 2


def test_score_without_retrieval_has_no_neighbour_log_probs(stub_of: Any) -> None:
    request = pb.ScoreRequest(input=pb.Input(text="abc"), retrieval=pb.RetrievalOptions(off=True))
    assert not stub_of(FakeEngine()).Score(request).knn_log_probs


def test_tokenize_gives_the_tokens_of_a_prompt(stub_of: Any) -> None:
    response = stub_of(FakeEngine(bos=256)).Tokenize(pb.TokenizeRequest(text="ab"))
    assert [(token.token_id, token.text) for token in response.tokens] == [(256, "<bos>"), (97, "a"), (98, "b")]


def test_tokenize_refuses_text_that_is_too_long(stub_of: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub_of(FakeEngine()).Tokenize(pb.TokenizeRequest(text="a" * 101))
    assert details(caught.value, error_details_pb2.BadRequest).field_violations[0].field == "text"


def test_tokenize_refuses_text_of_too_many_tokens(stub_of: Any) -> None:
    assert len(stub_of(FakeEngine()).Tokenize(pb.TokenizeRequest(text="a" * 50)).tokens) == 50
    with pytest.raises(grpc.RpcError, match="has 51 tokens, but at most 50 are taken") as caught:
        stub_of(FakeEngine()).Tokenize(pb.TokenizeRequest(text="a" * 51))
    assert details(caught.value, error_details_pb2.BadRequest).field_violations[0].field == "text"


def test_detokenize_gives_the_text_without_special_tokens(stub_of: Any) -> None:
    assert stub_of(FakeEngine(bos=256)).Detokenize(pb.DetokenizeRequest(token_ids=[256, 104, 105])).text == "hi"
    assert stub_of(FakeEngine()).Detokenize(pb.DetokenizeRequest()).text == ""


def test_detokenize_names_an_id_outside_the_vocabulary(stub_of: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub_of(FakeEngine()).Detokenize(pb.DetokenizeRequest(token_ids=[1, 257]))
    assert details(caught.value, error_details_pb2.BadRequest).field_violations[0].field == "token_ids[1]"


def test_retrieve_gives_the_context_and_its_neighbours(stub_of: Any) -> None:
    request = pb.RetrieveRequest(context=pb.Input(text="abc"), datastores=[pb.DatastoreWeight(name="main")], neighbors=2)
    response = stub_of(FakeEngine()).Retrieve(request)
    assert list(response.token_ids) == [97, 98, 99]
    assert [(neighbor.document_id, neighbor.datastore) for neighbor in response.neighbors] == [("d1", "main")] * 2
    assert dict(response.neighbors[0].metadata) == {"title": "On bytes"}


def test_a_datastore_that_is_not_loaded_is_not_found(stub_of: Any) -> None:
    request = pb.RetrieveRequest(context=pb.Input(text="abc"), datastores=[pb.DatastoreWeight(name="nowhere")])
    with pytest.raises(grpc.RpcError) as caught:
        stub_of(FakeEngine()).Retrieve(request)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert details(caught.value, error_details_pb2.ErrorInfo).reason == "DATASTORE_NOT_LOADED"


def test_server_info_tells_defaults_and_limits(stub_of: Any) -> None:
    response = stub_of(FakeEngine()).GetServerInfo(pb.GetServerInfoRequest())
    assert response.datastores[0].default_retrieval.interpolation_weight == DEFAULT_RETRIEVAL.weight
    assert response.limits.context == INFO.limits.context
    assert dict(response.settings) == INFO.settings


@pytest.mark.parametrize("name", ["", SERVICE_NAME])
def test_health(start_server: Start, connect: Connect, name: str) -> None:
    health = health_pb2_grpc.HealthStub(connect(start_server(FakeEngine())))
    assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_describes_the_service(start_server: Start, connect: Connect) -> None:
    database = ProtoReflectionDescriptorDatabase(connect(start_server(FakeEngine())))
    assert {SERVICE_NAME, "grpc.health.v1.Health"} <= set(database.get_services())
    service = DescriptorPool(database).FindServiceByName(SERVICE_NAME)
    assert [method.name for method in service.methods] == [
        "Generate",
        "StreamGenerate",
        "Score",
        "Retrieve",
        "Tokenize",
        "Detokenize",
        "GetServerInfo",
    ]
