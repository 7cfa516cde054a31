"""Clients that share no code with the server: grpclib (HTTP/2 in pure Python) and ``buf curl``, which knows the protocol by reflection."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpclib.client import Channel, StreamStreamMethod, UnaryStreamMethod, UnaryUnaryMethod
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from knnlm_server.errors import QueueFull
from knnlm_server.pb import generation_pb2 as pb
from tests.server.conftest import WAIT_SECONDS, RunningServer
from tests.server.fake_engine import EVIDENCE, FakeEngine

BUF = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")
SERVICE = "knnlm.v1.GenerationService"
OPTIONS = pb.GenerationOptions(stopping=pb.StoppingOptions(max_new_tokens=8), detail=pb.DetailOptions(evidence=True, neighbors=1))
Start = Callable[[FakeEngine], RunningServer]


def with_grpclib(target: str, use: Callable[[Channel], Awaitable[Any]]) -> Any:
    async def connected() -> Any:
        host, port = target.split(":")
        async with Channel(host, int(port)) as channel:
            return await asyncio.wait_for(use(channel), WAIT_SECONDS)

    return asyncio.run(connected())


def generate(channel: Channel, text: str) -> Awaitable[pb.GenerateResponse]:
    method = UnaryUnaryMethod(channel, f"/{SERVICE}/Generate", pb.GenerateRequest, pb.GenerateResponse)
    return method(pb.GenerateRequest(prompt=pb.Input(text=text), options=OPTIONS))


def streaming(channel: Channel) -> UnaryStreamMethod[pb.StreamGenerateRequest, pb.StreamGenerateResponse]:
    return UnaryStreamMethod(channel, f"/{SERVICE}/StreamGenerate", pb.StreamGenerateRequest, pb.StreamGenerateResponse)


STREAM_REQUEST = pb.StreamGenerateRequest(prompt=pb.Input(text="hi"), options=OPTIONS)


def test_grpclib_calls(start_server: Start) -> None:
    response = with_grpclib(start_server(FakeEngine()).target, lambda channel: generate(channel, "hi"))
    assert (response.completions[0].text, response.prompt_tokens) == ("ab!", 2)
    assert response.completions[0].evidence.verbatim.text == "ab"


def test_grpclib_streams(start_server: Start) -> None:
    events = with_grpclib(start_server(FakeEngine()).target, lambda channel: streaming(channel)(STREAM_REQUEST))
    assert [(len(event.tokens), len(event.finishes)) for event in events] == [(1, 0), (1, 0), (0, 1)]
    assert "".join(part.text for event in events for part in (*event.tokens, *event.finishes)) == "ab!"


def test_grpclib_cancels(start_server: Start) -> None:
    engine = FakeEngine(hold_after=1)

    async def use(channel: Channel) -> str:
        async with streaming(channel).open() as stream:
            await stream.send_message(STREAM_REQUEST, end=True)
            first = await stream.recv_message()
            await stream.cancel()
        assert first is not None
        return first.tokens[0].text

    assert with_grpclib(start_server(engine).target, use) == "a"
    assert engine.closed.wait(WAIT_SECONDS)


def test_grpclib_gives_up_at_its_deadline(start_server: Start) -> None:
    engine = FakeEngine(hold_after=1)
    with pytest.raises(asyncio.TimeoutError):
        with_grpclib(start_server(engine).target, lambda channel: streaming(channel)(STREAM_REQUEST, timeout=0.3))
    assert engine.closed.wait(WAIT_SECONDS)


def test_grpclib_reads_error_details(start_server: Start) -> None:
    target = start_server(FakeEngine(failure=QueueFull("full"))).target
    with pytest.raises(GRPCError) as refused:
        with_grpclib(target, lambda channel: generate(channel, ""))
    assert refused.value.status is Status.INVALID_ARGUMENT
    (violation,) = next(d for d in refused.value.details if isinstance(d, error_details_pb2.BadRequest)).field_violations
    assert (violation.field, violation.description) == ("prompt.text", "has no tokens.")
    with pytest.raises(GRPCError) as full:
        with_grpclib(target, lambda channel: generate(channel, "fail"))
    assert full.value.status is Status.RESOURCE_EXHAUSTED
    assert next(d for d in full.value.details if isinstance(d, error_details_pb2.RetryInfo)).retry_delay.seconds == 1


def test_grpclib_asks_for_health(start_server: Start) -> None:
    async def use(channel: Channel) -> int:
        check = UnaryUnaryMethod(channel, "/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse)
        response = await check(health_pb2.HealthCheckRequest(service=SERVICE))
        return int(response.status)

    assert with_grpclib(start_server(FakeEngine()).target, use) == health_pb2.HealthCheckResponse.SERVING


def test_grpclib_asks_what_there_is(start_server: Start) -> None:
    async def use(channel: Channel) -> list[str]:
        path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        method = StreamStreamMethod(channel, path, reflection_pb2.ServerReflectionRequest, reflection_pb2.ServerReflectionResponse)
        (response,) = await method([reflection_pb2.ServerReflectionRequest(list_services="")])
        return [service.name for service in response.list_services_response.service]

    assert SERVICE in with_grpclib(start_server(FakeEngine()).target, use)


def buf_curl(target: str, method: str, request: dict[str, Any], *arguments: str) -> tuple[int, list[Any], str]:
    """Exit status, the JSON objects on standard output, and standard error. Knows the protocol from the server alone."""
    assert BUF is not None, "buf is not installed (PyPI buf-bin, extra dev)"
    url = f"http://{target}/{SERVICE}/{method}"
    command = [BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", *arguments, "--data", json.dumps(request), url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
    decoder, rest, found = json.JSONDecoder(), done.stdout.strip(), list[Any]()
    while rest:
        value, end = decoder.raw_decode(rest)
        found.append(value)
        rest = rest[end:].strip()
    return done.returncode, found, done.stderr


JSON_OPTIONS = {"stopping": {"maxNewTokens": 8}, "detail": {"logProbs": True, "neighbors": 1, "evidence": True}}


def test_buf_curl_calls(start_server: Start) -> None:
    status, (response,), _ = buf_curl(start_server(FakeEngine()).target, "Generate", {"prompt": {"text": "hi"}, "options": JSON_OPTIONS})
    (completion,) = response["completions"]
    assert (status, completion["text"], completion["finishReason"]) == (0, "ab!", "FINISH_REASON_LENGTH")
    assert completion["tokens"][0]["knnLogProb"] == "-Infinity"
    assert completion["tokens"][0]["neighbors"][0]["metadata"] == {"title": "On bytes"}
    assert completion["evidence"]["documents"][0]["weight"] == EVIDENCE.documents[0].weight


def test_buf_curl_streams(start_server: Start) -> None:
    target = start_server(FakeEngine()).target
    status, events, _ = buf_curl(target, "StreamGenerate", {"prompt": {"text": "hi"}, "options": JSON_OPTIONS})
    assert status == 0
    assert [next(iter(event)) for event in events] == ["tokens", "tokens", "finishes"]


def test_buf_curl_reads_error_details(start_server: Start) -> None:
    status, found, said = buf_curl(start_server(FakeEngine()).target, "Generate", {"prompt": {"text": ""}, "options": JSON_OPTIONS})
    error = json.loads(said)
    assert (status != 0, found, error["code"]) == (True, [], "invalid_argument")
    details = {detail["type"]: detail.get("debug") for detail in error["details"]}
    assert {"google.rpc.BadRequest", "google.rpc.ErrorInfo"} <= set(details)
