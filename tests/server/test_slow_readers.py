"""Clients that don't read, on real sockets: their streams are ended, their engine's work too, and nobody else waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from knnlm_server.app import Border
from knnlm_server.metrics import Metrics
from knnlm_server.pb import generation_pb2 as pb
from knnlm_server.pb.generation_pb2_grpc import GenerationServiceStub
from tests.server.conftest import WAIT_SECONDS, RunningServer
from tests.server.fake_engine import FakeEngine

Start = Callable[..., RunningServer]

# More than gRPC and the kernel keep for a connection whose client does not read.
LONG = ["x" * 100_000] * 2_000
OPTIONS = pb.GenerationOptions(stopping=pb.StoppingOptions(max_new_tokens=8))
STREAM = pb.StreamGenerateRequest(prompt=pb.Input(text="hi"), options=OPTIONS)


def reason(error: Any) -> str:
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    status.details[0].Unpack(info)
    return info.reason


def test_a_stream_that_nobody_reads_is_ended_and_says_why_once_it_is_read(start_server: Start) -> None:
    engine, metrics = FakeEngine(LONG), Metrics()
    server = start_server(engine, border=Border(metrics=metrics, stall_seconds=0.2))
    with grpc.insecure_channel(server.target) as slow, grpc.insecure_channel(server.target) as other:
        unread = GenerationServiceStub(slow).StreamGenerate(STREAM)
        assert next(unread).tokens[0].index == 0
        assert engine.closed.wait(WAIT_SECONDS)
        # Its place is free although the client has still not read.
        assert GenerationServiceStub(other).Detokenize(pb.DetokenizeRequest(token_ids=[104]), timeout=WAIT_SECONDS).text == "h"
        with pytest.raises(grpc.RpcError) as caught:
            assert len(list(unread)) < len(LONG)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert reason(caught.value) == "READ_TOO_SLOWLY"
    assert "0.2 seconds" in (caught.value.details() or "")
    assert metrics.registry.get_sample_value("knnlm_requests_rejected_total", {"reason": "READ_TOO_SLOWLY"}) == 1


def test_a_stream_that_nobody_reads_does_not_hold_up_the_end_of_the_server(start_server: Start) -> None:
    engine = FakeEngine(LONG)
    server = start_server(engine, border=Border(stall_seconds=0.2))
    with grpc.insecure_channel(server.target) as channel:
        unread = GenerationServiceStub(channel).StreamGenerate(STREAM)
        next(unread)
        assert engine.closed.wait(WAIT_SECONDS)
        server.submit(server.server.stop(grace=10 * WAIT_SECONDS)).result(WAIT_SECONDS)


def test_one_who_reads_slowly_but_steadily_gets_everything(start_server: Start) -> None:
    server = start_server(FakeEngine(LONG[:50]), border=Border(stall_seconds=WAIT_SECONDS))
    with grpc.insecure_channel(server.target) as channel:
        events = list(GenerationServiceStub(channel).StreamGenerate(STREAM))
    assert [token.index for event in events for token in event.tokens] == list(range(50))
