"""What Prometheus reads: from the engine's reports, from calls over the wire, and by HTTP."""

from __future__ import annotations

import re
import socket
import urllib.request
from collections.abc import Callable
from dataclasses import fields, replace

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from knnlm_server.app import Border
from knnlm_server.errors import CannotListen, QueueFull
from knnlm_server.listening import Place
from knnlm_server.metrics import Metrics, MetricsPort
from knnlm_server.pb import generation_pb2 as pb
from knnlm_server.pb.generation_pb2_grpc import GenerationServiceStub
from knnlm_server.telemetry import EngineObserver, StepReport
from tests.server.conftest import WAIT_SECONDS, RunningServer
from tests.server.fake_engine import FakeEngine

Start = Callable[..., RunningServer]

IDLE = StepReport(**{field.name: 0 for field in fields(StepReport)})
seconds = st.floats(0, 100)
counts = st.integers(0, 10_000)
reports = st.builds(StepReport, **{field.name: seconds if field.name.endswith("seconds") else counts for field in fields(StepReport)})


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = metrics.registry.get_sample_value(name, labels)
    assert found is not None, name
    return found


@given(st.lists(reports, min_size=1, max_size=5))
def test_steps_add_up_and_gauges_are_those_of_the_last(steps: list[StepReport]) -> None:
    metrics = Metrics()
    observer: EngineObserver = metrics
    for step in steps:
        observer.step(step)
    assert value(metrics, "knnlm_requests_running") == steps[-1].running
    assert value(metrics, "knnlm_requests_waiting") == steps[-1].waiting
    assert value(metrics, "knnlm_waiting_tokens") == steps[-1].waiting_tokens
    assert value(metrics, "knnlm_cache_tokens") == steps[-1].cache_tokens
    assert value(metrics, "knnlm_texts_scoring") == steps[-1].scoring
    assert value(metrics, "knnlm_scoring_tokens") == steps[-1].scoring_tokens
    assert value(metrics, "knnlm_retrieval_steps_total", outcome="retrieved") == sum(step.searched_rows for step in steps)
    assert value(metrics, "knnlm_retrieval_steps_total", outcome="skipped") == sum(step.skipped_rows for step in steps)
    assert value(metrics, "knnlm_prompt_tokens_computed_total") == sum(step.prompt_tokens for step in steps)
    assert value(metrics, "knnlm_step_time_seconds_count") == len(steps)
    assert value(metrics, "knnlm_forward_time_seconds_count") == sum(step.forward_seconds > 0 for step in steps)
    assert value(metrics, "knnlm_search_time_seconds_sum") == pytest.approx(sum(step.retrieval_seconds for step in steps))
    for part in ("forward", "retrieval", "mix", "sample", "score"):
        told = sum(getattr(step, f"{part}_seconds") for step in steps)
        assert value(metrics, "knnlm_engine_seconds_total", part=part) == pytest.approx(told)


def test_admissions_tell_the_queue_and_the_prefix_cache() -> None:
    metrics = Metrics()
    metrics.admitted("r1", 0.5, 100, 0)
    metrics.admitted("r2", 1.5, 100, 64)
    assert value(metrics, "knnlm_request_queue_time_seconds_sum") == 2.0
    assert value(metrics, "knnlm_prefix_cache_queries_total") == 200
    assert value(metrics, "knnlm_prefix_cache_hits_total") == 64


def test_what_is_counted_of_requests_over_the_wire(start_server: Start) -> None:
    metrics = Metrics()
    server = start_server(FakeEngine(["a", "b", "c"], failure=QueueFull("full")), border=Border(metrics=metrics))
    options = pb.GenerationOptions(stopping=pb.StoppingOptions(max_new_tokens=8), num_samples=2)
    with grpc.insecure_channel(server.target) as channel:
        stub = GenerationServiceStub(channel)
        stub.Generate(pb.GenerateRequest(prompt=pb.Input(text="abcd"), options=options))
        list(stub.StreamGenerate(pb.StreamGenerateRequest(prompt=pb.Input(text="ab"), options=options)))
        with pytest.raises(grpc.RpcError):
            stub.Generate(pb.GenerateRequest(prompt=pb.Input(text="fail"), options=options))
        with pytest.raises(grpc.RpcError):
            stub.Generate(pb.GenerateRequest())
    assert value(metrics, "knnlm_requests_total", method="Generate", code="OK") == 1
    assert value(metrics, "knnlm_requests_total", method="StreamGenerate", code="OK") == 1
    assert value(metrics, "knnlm_requests_total", method="Generate", code="RESOURCE_EXHAUSTED") == 1
    assert value(metrics, "knnlm_requests_rejected_total", reason="QUEUE_FULL") == 1
    assert value(metrics, "knnlm_requests_rejected_total", reason="INVALID_INPUT") == 1
    assert value(metrics, "knnlm_e2e_request_latency_seconds_count", method="Generate") == 3
    assert value(metrics, "knnlm_time_to_first_token_seconds_count") == 2
    assert value(metrics, "knnlm_inter_token_latency_seconds_count") == 2 * 2 * 2  # requests, samples, gaps
    assert value(metrics, "knnlm_prompt_tokens_total") == 4 + 2
    assert value(metrics, "knnlm_generation_tokens_total") == 2 * 2 * 3
    assert value(metrics, "knnlm_request_generation_tokens_count") == 4
    assert value(metrics, "knnlm_request_success_total", finished_reason="length") == 4


def test_prometheus_reads_them_by_http(start_server: Start) -> None:
    server = start_server(FakeEngine(), border=Border(metrics_place=Place())).server
    assert server.metrics_place is not None
    with urllib.request.urlopen(f"http://{server.metrics_place.address}/metrics", timeout=WAIT_SECONDS) as answer:
        families = {family.name: family for family in text_string_to_metric_families(answer.read().decode())}
    entries = {sample.labels["datastore"]: sample.value for sample in families["knnlm_datastore_entries"].samples}
    assert entries == {"main": 1000, "other": 50, "foreign": 1000}
    assert families["knnlm_server_info"].samples[0].labels == {"version": "0.1.0", "model": "tiny"}
    for family in families.values():
        assert re.fullmatch(r"knnlm_[a-z0-9_]+", family.name)
        assert family.documentation.endswith(".") or family.name == "knnlm_server_info"


def test_datastores_are_those_of_the_moment(start_server: Start) -> None:
    metrics, engine = Metrics(), FakeEngine()
    start_server(engine, border=Border(metrics=metrics, metrics_place=Place()))
    engine.info = replace(engine.info, datastores=engine.info.datastores[1:2])
    assert metrics.registry.get_sample_value("knnlm_datastore_entries", {"datastore": "main"}) is None
    assert value(metrics, "knnlm_datastore_documents", datastore="other") == 10


def test_the_port_is_free_again_after_the_end() -> None:
    port = MetricsPort(Metrics(), "127.0.0.1", 0)
    with pytest.raises(CannotListen, match="--metrics-port"):
        MetricsPort(Metrics(), "127.0.0.1", port.port)
    port.stop()
    Place("127.0.0.1", port.port).ensure_free()
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port.port), timeout=WAIT_SECONDS):  # noqa: PT011
        pass


def test_a_scrape_has_every_metric_from_the_start() -> None:
    names = {family.name for family in Metrics().registry.collect()}
    assert {
        "knnlm_requests_running", "knnlm_requests_waiting", "knnlm_time_to_first_token_seconds", "knnlm_inter_token_latency_seconds",
        "knnlm_request_queue_time_seconds", "knnlm_search_time_seconds", "knnlm_forward_time_seconds", "knnlm_retrieval_steps",
        "knnlm_requests_rejected", "knnlm_prefix_cache_hits", "knnlm_generation_tokens", "knnlm_requests",
    } <= names  # fmt: skip
