"""Traces of calls over the wire, read from memory instead of a collector."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from knnlm_server.app import Border
from knnlm_server.pb import generation_pb2 as pb
from knnlm_server.pb.generation_pb2_grpc import GenerationServiceStub
from knnlm_server.service import SERVICE_NAME
from knnlm_server.tracing import OpenTelemetryTracing
from tests.server.conftest import WAIT_SECONDS, RunningServer, running
from tests.server.fake_engine import FakeEngine

sdk = pytest.importorskip("opentelemetry.sdk.trace")
trace = pytest.importorskip("opentelemetry.trace")
export = pytest.importorskip("opentelemetry.sdk.trace.export")
memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
trace_messages = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc")

Start = Callable[..., RunningServer]
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def request(text: str = "a secret prompt") -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=pb.Input(text=text), options=pb.GenerationOptions(stopping=pb.StoppingOptions(max_new_tokens=8)))


@pytest.fixture
def spans() -> Any:
    return memory.InMemorySpanExporter()


@pytest.fixture
def border(spans: Any) -> Border:
    provider = sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(spans))
    return Border(tracing=OpenTelemetryTracing(provider))


def test_a_call_is_a_span_below_the_clients(start_server: Start, border: Border, spans: Any) -> None:
    with start_server_channel(start_server, border, FakeEngine()) as channel:
        GenerationServiceStub(channel).Generate(request(), metadata=(("traceparent", PARENT), ("x-request-id", "r-1")))
    (span,) = spans.get_finished_spans()
    assert (span.name, span.kind) == (f"{SERVICE_NAME}/Generate", trace.SpanKind.SERVER)
    assert f"{span.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{span.parent.span_id:016x}" == PARENT.split("-")[2]
    assert span.status.status_code is trace.StatusCode.UNSET
    assert span.attributes["rpc.grpc.status_code"] == 0
    assert span.attributes["knnlm.request_id"] == "r-1"


@pytest.mark.parametrize(
    ("text", "code", "reason"),
    [("fail: a secret prompt", grpc.StatusCode.INTERNAL, "UNEXPECTED"), ("", grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT")],
)
def test_an_error_is_traced_as_one_and_quotes_nothing(
    start_server: Start, border: Border, spans: Any, text: str, code: grpc.StatusCode, reason: str
) -> None:
    engine = FakeEngine(failure=ValueError("a secret prompt"))
    with start_server_channel(start_server, border, engine) as channel, pytest.raises(grpc.RpcError) as caught:
        GenerationServiceStub(channel).Generate(request(text))
    assert caught.value.code() is code
    (span,) = spans.get_finished_spans()
    assert span.status.status_code is trace.StatusCode.ERROR
    assert (span.attributes["rpc.grpc.status_code"], span.attributes["error.type"]) == (code.value[0], reason)
    assert "secret" not in span.to_json()


def test_health_and_reflection_leave_no_spans_and_work(start_server: Start, border: Border, spans: Any) -> None:
    with start_server_channel(start_server, border, FakeEngine()) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME), timeout=WAIT_SECONDS)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
        assert SERVICE_NAME in ProtoReflectionDescriptorDatabase(channel).get_services()
    assert not spans.get_finished_spans()


def start_server_channel(start_server: Start, border: Border, engine: FakeEngine) -> grpc.Channel:
    return grpc.insecure_channel(start_server(engine, border=border).target)


def test_without_the_extra_tracing_is_refused_in_one_sentence_and_nothing_else_needs_it() -> None:
    program = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "import knnlm_server.app\n"
        "from knnlm_server.tracing import OpenTelemetryTracing\n"
        "OpenTelemetryTracing()"
    )
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=root / "server")
    assert "MissingDependency: Tracing needs OpenTelemetry; install it with: pip install 'knnlm[tracing]'." in found.stderr


class Collector(trace_service.TraceServiceServicer):  # type: ignore[misc, name-defined]
    """Keeps what is exported to it."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def Export(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return trace_messages.ExportTraceServiceResponse()


def test_spans_arrive_at_a_collector_that_opentelemetrys_variables_name(monkeypatch: pytest.MonkeyPatch) -> None:
    collector, server = Collector(), grpc.server(futures.ThreadPoolExecutor(2))
    trace_service.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    # The end of the server sends what was not sent yet.
    with running(FakeEngine(), border=Border(tracing=OpenTelemetryTracing())) as one, grpc.insecure_channel(one.target) as channel:
        GenerationServiceStub(channel).Generate(request(), metadata=(("traceparent", PARENT),), timeout=WAIT_SECONDS)
    server.stop(None).wait()
    (of_service,) = [spans for exported in collector.requests for spans in exported.resource_spans]
    names = {attribute.key: attribute.value.string_value for attribute in of_service.resource.attributes}
    assert names["service.name"] == "mine"
    (span,) = [span for scope in of_service.scope_spans for span in scope.spans]
    assert span.name == "knnlm.v1.GenerationService/Generate"
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == tuple(PARENT.split("-")[1:3])
    told = {attribute.key: attribute.value for attribute in span.attributes}
    assert told["rpc.grpc.status_code"].int_value == 0
    assert "secret" not in str(collector.requests)


def test_the_service_is_called_knnlm_unless_the_operator_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, named in (("", "knnlm"), ("mine", "mine")):
        monkeypatch.setenv("OTEL_SERVICE_NAME", name)
        tracing = OpenTelemetryTracing()
        assert tracing._provider.resource.attributes["service.name"] == named
        tracing.stop()
