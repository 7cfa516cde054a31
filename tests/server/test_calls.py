"""What every call goes through, over the wire: tokens and roles, ids, tenants, bytes that are no message, and what is logged."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from knnlm.errors import StoreMismatch
from knnlm_server import logs
from knnlm_server.access import TokenAccess
from knnlm_server.admin_service import SERVICE_NAME as ADMIN_SERVICE_NAME
from knnlm_server.app import Border
from knnlm_server.listening import Place
from knnlm_server.pb import admin_pb2
from knnlm_server.pb import generation_pb2 as pb
from knnlm_server.pb.admin_pb2_grpc import AdminServiceServicer, AdminServiceStub
from knnlm_server.pb.generation_pb2_grpc import GenerationServiceStub
from knnlm_server.service import SERVICE_NAME
from tests.server.conftest import WAIT_SECONDS, RunningServer
from tests.server.fake_engine import LIMITS, FakeEngine

Start = Callable[..., RunningServer]

TOKENS = {"alice": "alice-0123456789", "bob": "bob-0123456789ab", "root": "root-0123456789a"}
FILE = "\n".join(
    f'[[tokens]]\nname = "{name}"\ntoken = "{token}"\nroles = ["{"admin" if name == "root" else "generate"}"]'
    for name, token in TOKENS.items()
)
REQUEST = pb.GenerateRequest(
    prompt=pb.Input(text="a secret prompt"), options=pb.GenerationOptions(stopping=pb.StoppingOptions(max_new_tokens=8))
)


class Admin(AdminServiceServicer):
    """Has one datastore that can be unloaded once."""

    def __init__(self) -> None:
        self.unloaded: list[str] = []

    async def UnloadDatastore(self, request: Any, context: Any) -> admin_pb2.UnloadDatastoreResponse:
        if self.unloaded:
            raise StoreMismatch("It is gone.")
        self.unloaded.append(request.name)
        return admin_pb2.UnloadDatastoreResponse()


@pytest.fixture
def access(tmp_path: Path) -> TokenAccess:
    path = tmp_path / "tokens.toml"
    path.write_text(FILE)
    return TokenAccess(path)


@pytest.fixture
def channel_to() -> Iterator[Callable[[str], grpc.Channel]]:
    channels: list[grpc.Channel] = []

    def open_channel(target: str) -> grpc.Channel:
        channels.append(grpc.insecure_channel(target))
        return channels[-1]

    yield open_channel
    for channel in channels:
        channel.close()


def bearer(name: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {TOKENS[name]}"),)


def failure(call: Callable[[], Any]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def details(error: Any, kind: Any) -> Any:
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    (packed,) = [detail for detail in status.details if detail.Is(kind.DESCRIPTOR)]
    return kind.FromString(packed.value)


def test_a_call_needs_a_token_with_the_role(start_server: Start, access: TokenAccess, channel_to: Any) -> None:
    engine = FakeEngine()
    stub = GenerationServiceStub(channel_to(start_server(engine, border=Border(access=access)).target))
    for call in (
        lambda: stub.Generate(REQUEST),
        lambda: list(stub.StreamGenerate(pb.StreamGenerateRequest())),
        lambda: stub.GetServerInfo(pb.GetServerInfoRequest()),
    ):
        error = failure(call)
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert details(error, error_details_pb2.ErrorInfo).reason == "TOKEN_MISSING"
    error = failure(lambda: stub.Generate(REQUEST, metadata=bearer("root")))
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "'root' has not the role 'generate'" in error.details()
    assert not engine.requests
    assert stub.Generate(REQUEST, metadata=bearer("alice")).completions


def test_requests_carry_the_name_of_their_token_as_tenant(start_server: Start, access: TokenAccess, channel_to: Any) -> None:
    engine = FakeEngine()
    stub = GenerationServiceStub(channel_to(start_server(engine, border=Border(access=access)).target))
    for name in ("alice", "bob"):
        stub.Generate(REQUEST, metadata=bearer(name))
    assert [request.tenant for request in engine.requests] == ["alice", "bob"]


def test_health_and_reflection_need_no_token(start_server: Start, access: TokenAccess, channel_to: Any) -> None:
    channel = channel_to(start_server(FakeEngine(), border=Border(access=access), admin=Admin()).target)
    for name in ("", SERVICE_NAME, ADMIN_SERVICE_NAME):
        request = health_pb2.HealthCheckRequest(service=name)
        assert health_pb2_grpc.HealthStub(channel).Check(request).status == health_pb2.HealthCheckResponse.SERVING
    assert {SERVICE_NAME, ADMIN_SERVICE_NAME} <= set(ProtoReflectionDescriptorDatabase(channel).get_services())


def test_reflection_can_be_switched_off(start_server: Start, channel_to: Any) -> None:
    channel = channel_to(start_server(FakeEngine(), border=Border(reflection=False)).target)
    error = failure(lambda: ProtoReflectionDescriptorDatabase(channel).get_services())
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


def test_the_admin_service_stands_beside_the_others_where_tokens_say_who_may_use_it(
    start_server: Start, access: TokenAccess, channel_to: Any
) -> None:
    admin = Admin()
    stub = AdminServiceStub(channel_to(start_server(FakeEngine(), border=Border(access=access), admin=admin).target))
    request = admin_pb2.UnloadDatastoreRequest(name="wiki")
    assert failure(lambda: stub.UnloadDatastore(request)).code() is grpc.StatusCode.UNAUTHENTICATED
    assert failure(lambda: stub.UnloadDatastore(request, metadata=bearer("alice"))).code() is grpc.StatusCode.PERMISSION_DENIED
    assert not admin.unloaded
    stub.UnloadDatastore(request, metadata=bearer("root"))
    assert admin.unloaded == ["wiki"]
    error = failure(lambda: stub.UnloadDatastore(request, metadata=bearer("root")))
    assert (error.code(), error.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "It is gone.")


def test_without_tokens_the_admin_service_is_on_its_own_port_alone(start_server: Start, channel_to: Any) -> None:
    admin = Admin()
    request = admin_pb2.UnloadDatastoreRequest(name="wiki")
    server = start_server(FakeEngine(), border=Border(admin=Place()), admin=admin).server
    assert failure(lambda: AdminServiceStub(channel_to(server.address)).UnloadDatastore(request)).code() is grpc.StatusCode.UNIMPLEMENTED
    own = channel_to(server.admin_place.address)
    AdminServiceStub(own).UnloadDatastore(request)
    assert admin.unloaded == ["wiki"]
    assert failure(lambda: GenerationServiceStub(own).Generate(REQUEST)).code() is grpc.StatusCode.UNIMPLEMENTED
    status = health_pb2_grpc.HealthStub(own).Check(health_pb2.HealthCheckRequest(service=ADMIN_SERVICE_NAME)).status
    assert status == health_pb2.HealthCheckResponse.SERVING


def test_without_tokens_and_port_there_is_no_admin_service(start_server: Start, channel_to: Any) -> None:
    channel = channel_to(start_server(FakeEngine(), admin=Admin()).target)
    error = failure(lambda: AdminServiceStub(channel).UnloadDatastore(admin_pb2.UnloadDatastoreRequest()))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert ADMIN_SERVICE_NAME not in ProtoReflectionDescriptorDatabase(channel).get_services()


@pytest.mark.parametrize("given", ["mine-1", "0af7651916cd43dd8448eb211c80319c", "a:b.c_d"])
def test_a_well_formed_id_of_the_client_is_taken(start_server: Start, channel_to: Any, given: str) -> None:
    engine = FakeEngine(failure=ZeroDivisionError())
    stub = GenerationServiceStub(channel_to(start_server(engine).target))
    _, call = stub.Generate.with_call(REQUEST, metadata=(("x-request-id", given),))
    assert dict(call.trailing_metadata())["x-request-id"] == given
    failing = pb.GenerateRequest(prompt=pb.Input(text="fail"), options=REQUEST.options)
    error = failure(lambda: stub.Generate(failing, metadata=(("x-request-id", given),)))
    assert details(error, error_details_pb2.RequestInfo).request_id == given
    assert dict(error.trailing_metadata())["x-request-id"] == given
    # Two clients may send the same id; in the engine each request has its own.
    first, second = (request.request_id for request in engine.requests)
    assert first != second
    assert first.startswith(f"{given}/")
    assert second.startswith(f"{given}/")


@pytest.mark.parametrize("given", ["", " ", "two words", "a" * 65, 'x","level":"ERROR'])
def test_an_odd_id_of_the_client_is_replaced(start_server: Start, channel_to: Any, given: str) -> None:
    stub = GenerationServiceStub(channel_to(start_server(FakeEngine()).target))
    _, call = stub.Generate.with_call(REQUEST, metadata=(("x-request-id", given),))
    assert len(dict(call.trailing_metadata())["x-request-id"]) == 32


def test_a_stream_has_its_id_at_its_end(start_server: Start, channel_to: Any) -> None:
    """Not before: gRPC tries a call again only as long as nothing of its response has come."""
    call = GenerationServiceStub(channel_to(start_server(FakeEngine()).target)).StreamGenerate(
        pb.StreamGenerateRequest(prompt=REQUEST.prompt, options=REQUEST.options)
    )
    assert len(list(call)) == 3
    assert "x-request-id" not in dict(call.initial_metadata())
    assert len(dict(call.trailing_metadata())["x-request-id"]) == 32


@pytest.mark.parametrize("method", ["Generate", "StreamGenerate", "Score", "GetServerInfo"])
def test_bytes_that_are_no_message_are_refused(start_server: Start, channel_to: Any, method: str) -> None:
    channel = channel_to(start_server(FakeEngine()).target)
    path = f"/{SERVICE_NAME}/{method}"
    call = (
        (lambda: list(channel.unary_stream(path)(b"\xff\xff")))
        if method == "StreamGenerate"
        else (lambda: channel.unary_unary(path)(b"\xff\xff"))
    )
    error = failure(call)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(error, error_details_pb2.BadRequest).field_violations[0].field == "request"


def test_a_message_that_is_too_large_is_refused(start_server: Start, channel_to: Any) -> None:
    engine = FakeEngine(limits=replace(LIMITS, max_message_bytes=1000))
    stub = GenerationServiceStub(channel_to(start_server(engine).target))
    error = failure(lambda: stub.Generate(pb.GenerateRequest(prompt=pb.Input(text="a" * 1001))))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert stub.Generate(REQUEST).completions


class Lines(logging.Handler):
    """The log as an operator sees it."""

    def __init__(self, log_format: logs.LogFormat, *, texts_of_exceptions: bool) -> None:
        super().__init__()
        self.setFormatter(logs.formatter(log_format, texts_of_exceptions=texts_of_exceptions))
        self.addFilter(logs.add_request_id)
        self.lines: list[str] = []
        self.ended = threading.Semaphore(0)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))
        if "call ended" in record.getMessage():
            self.ended.release()

    def wait(self, calls: int) -> str:
        for _ in range(calls):
            assert self.ended.acquire(timeout=WAIT_SECONDS)
        return "\n".join(self.lines)


@pytest.fixture(params=["text", "json"])
def log(request: pytest.FixtureRequest) -> Iterator[Lines]:
    yield from _listening(Lines(request.param, texts_of_exceptions=False))


@pytest.fixture
def open_log() -> Iterator[Lines]:
    yield from _listening(Lines("json", texts_of_exceptions=True))


def _listening(handler: Lines) -> Iterator[Lines]:
    logger = logging.getLogger("knnlm_server")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)


def test_no_prompt_and_no_token_is_logged(start_server: Start, access: TokenAccess, channel_to: Any, log: Lines) -> None:
    failing = pb.GenerateRequest(prompt=pb.Input(text="fail: a secret prompt"), options=REQUEST.options)
    bad = pb.GenerateRequest(prompt=REQUEST.prompt, options=pb.GenerationOptions(sampling=pb.SamplingOptions(top_p=7.0)))
    engine = FakeEngine(failure=ValueError("can't do 'a secret prompt'"))
    stub = GenerationServiceStub(channel_to(start_server(engine, border=Border(access=access)).target))
    alice = bearer("alice")
    stub.Generate(REQUEST, metadata=(*alice, ("x-request-id", "r-good")))
    assert failure(lambda: stub.Generate(failing, metadata=(*alice, ("x-request-id", "r-failed")))).code() is grpc.StatusCode.INTERNAL
    failure(lambda: stub.Generate(bad, metadata=alice))
    failure(lambda: stub.Generate(REQUEST, metadata=(("authorization", "Bearer wrong-0123456789"),)))
    list(stub.StreamGenerate(pb.StreamGenerateRequest(prompt=REQUEST.prompt, options=REQUEST.options), metadata=alice))
    written = log.wait(5)
    assert "secret" not in written
    assert "0123456789" not in written
    # What an operator needs is there: who, what, how it ended, and where it broke.
    for word in ("r-good", "r-failed", "alice", "StreamGenerate", "INVALID_ARGUMENT", "TOKEN_MISSING", "ValueError", "fake_engine.py"):
        assert word in written


def test_prompts_are_logged_when_asked_for(start_server: Start, channel_to: Any, open_log: Lines) -> None:
    stub = GenerationServiceStub(channel_to(start_server(FakeEngine(), border=Border(log_prompts=True)).target))
    stub.Generate(REQUEST, metadata=(("x-request-id", "r-1"),))
    lines = [json.loads(line) for line in open_log.wait(1).splitlines()]
    assert [line["request_id"] for line in lines if "a secret prompt" in line["message"]] == ["r-1"]


def test_a_line_says_how_a_call_ended(start_server: Start, channel_to: Any, open_log: Lines) -> None:
    stub = GenerationServiceStub(channel_to(start_server(FakeEngine(["a", "b"])).target))
    stub.Generate(REQUEST, metadata=(("x-request-id", "r-1"),))
    (line,) = [json.loads(line) for line in open_log.wait(1).splitlines()]
    assert (line["request_id"], line["method"], line["code"], line["level"]) == ("r-1", "Generate", "OK", "INFO")
    assert (line["prompt_tokens"], line["completion_tokens"]) == (len("a secret prompt"), 2)


def test_a_cancelled_call_is_logged_as_that(start_server: Start, channel_to: Any, open_log: Lines) -> None:
    engine = FakeEngine(["a", "b"], hold_after=1)
    stub = GenerationServiceStub(channel_to(start_server(engine).target))
    call = stub.StreamGenerate(pb.StreamGenerateRequest(prompt=REQUEST.prompt, options=REQUEST.options))
    next(call)
    call.cancel()
    (line,) = [json.loads(line) for line in open_log.wait(1).splitlines()]
    assert (line["code"], line["completion_tokens"]) == ("CANCELLED", 1)
