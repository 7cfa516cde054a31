"""What the server counts, for Prometheus: names after those of vLLM and text-generation-inference, with the prefix ``knnlm_``.

Fed by the engine (:class:`~knnlm_server.telemetry.EngineObserver`), by every call's end, and by the stream of each
completion. Knows neither engine nor gRPC service.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from knnlm_server.errors import CannotListen
from knnlm_server.sequence import FinishEvent, GenerationRequest, ServerInfo, TokenEvent
from knnlm_server.telemetry import StepReport

if TYPE_CHECKING:
    from wsgiref.simple_server import WSGIServer

# From one step of a tiny model to a request that waits for minutes.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)

_PARTS = ("forward", "retrieval", "mix", "sample", "score")


class Metrics:
    """All metrics of one server, in a registry of its own. Safe to use from several threads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._engine_metrics()
        self._call_metrics()
        self._completion_metrics()

    def _engine_metrics(self) -> None:
        self._running = Gauge("knnlm_requests_running", "Completions that have a row of the cache.", registry=self.registry)
        self._waiting = Gauge("knnlm_requests_waiting", "Requests that wait for a row.", registry=self.registry)
        self._waiting_tokens = Gauge("knnlm_waiting_tokens", "Prompt tokens of the requests that wait.", registry=self.registry)
        self._cache_tokens = Gauge("knnlm_cache_tokens", "Tokens that the rows of the cache hold.", registry=self.registry)
        self._queue_time = self._seconds("knnlm_request_queue_time_seconds", "From a request's arrival to its row.")
        self._step_time = self._seconds("knnlm_step_time_seconds", "One step of the engine, for all its rows.")
        self._forward_time = self._seconds("knnlm_forward_time_seconds", "Forward passes of one step.")
        self._search_time = self._seconds("knnlm_search_time_seconds", "Search and re-ranking of one step that has any.")
        part = Counter("knnlm_engine_seconds", "Seconds of the engine by what it did.", ["part"], registry=self.registry)
        self._parts = {name: part.labels(name) for name in _PARTS}
        outcome = Counter(
            "knnlm_retrieval_steps",
            "Tokens that were made with a search (retrieved) or without one, at weight 0 or because of a gate (skipped).",
            ["outcome"],
            registry=self.registry,
        )
        self._retrieved, self._skipped = outcome.labels("retrieved"), outcome.labels("skipped")
        self._computed = Counter("knnlm_prompt_tokens_computed", "Prompt tokens that were computed.", registry=self.registry)
        self._asked = Counter(
            "knnlm_prefix_cache_queries", "Prompt tokens that were looked up in the prefix cache.", registry=self.registry
        )
        self._reused = Counter("knnlm_prefix_cache_hits", "Prompt tokens that were not computed again.", registry=self.registry)

    def _call_metrics(self) -> None:
        self._calls = Counter("knnlm_requests", "Calls that have ended, by method and status.", ["method", "code"], registry=self.registry)
        self._rejected = Counter(
            "knnlm_requests_rejected",
            "Calls that ended with an error other than INTERNAL, by the reason in its ErrorInfo.",
            ["reason"],
            registry=self.registry,
        )
        self._latency = Histogram(
            "knnlm_e2e_request_latency_seconds", "From a call's arrival to its end.", ["method"], buckets=_SECONDS, registry=self.registry
        )

    def _completion_metrics(self) -> None:
        self._first_token = self._seconds("knnlm_time_to_first_token_seconds", "From a request's arrival to its first token.")
        self._between_tokens = self._seconds("knnlm_inter_token_latency_seconds", "Between two tokens of a completion.")
        self._prompt_tokens = Counter("knnlm_prompt_tokens", "Prompt tokens of requests that got a token.", registry=self.registry)
        self._generation_tokens = Counter("knnlm_generation_tokens", "Tokens generated.", registry=self.registry)
        self._prompt_sizes = self._tokens("knnlm_request_prompt_tokens", "Prompt tokens of a request that got a token.")
        self._completion_sizes = self._tokens("knnlm_request_generation_tokens", "Tokens of a completion that has ended.")
        self._finished = Counter(
            "knnlm_request_success", "Completions that have ended, by why.", ["finished_reason"], registry=self.registry
        )

    def _seconds(self, name: str, what: str) -> Histogram:
        return Histogram(name, what, buckets=_SECONDS, registry=self.registry)

    def _tokens(self, name: str, what: str) -> Histogram:
        return Histogram(name, what, buckets=_TOKENS, registry=self.registry)

    def step(self, report: StepReport) -> None:
        """See :meth:`knnlm_server.telemetry.EngineObserver.step`."""
        self._step_time.observe(report.seconds)
        if report.forward_seconds > 0:
            self._forward_time.observe(report.forward_seconds)
        if report.retrieval_seconds > 0:
            self._search_time.observe(report.retrieval_seconds)
        for name, counter in self._parts.items():
            counter.inc(getattr(report, f"{name}_seconds"))
        self._retrieved.inc(report.searched_rows)
        self._skipped.inc(report.skipped_rows)
        self._computed.inc(report.prompt_tokens)
        self._running.set(report.running)
        self._waiting.set(report.waiting)
        self._waiting_tokens.set(report.waiting_tokens)
        self._cache_tokens.set(report.cache_tokens)

    def admitted(self, request_id: str, waited_seconds: float, prompt_tokens: int, reused_tokens: int) -> None:
        """See :meth:`knnlm_server.telemetry.EngineObserver.admitted`."""
        self._queue_time.observe(waited_seconds)
        self._asked.inc(prompt_tokens)
        self._reused.inc(reused_tokens)

    def call_ended(self, method: str, code: grpc.StatusCode, reason: str, seconds: float) -> None:
        """A call has ended; ``reason`` is that of its error, empty where there is none."""
        self._calls.labels(method, code.name).inc()
        self._latency.labels(method).observe(seconds)
        if reason and code is not grpc.StatusCode.INTERNAL:
            self._rejected.labels(reason).inc()

    def watch(self, request: GenerationRequest) -> Callable[[TokenEvent | FinishEvent], None]:
        """To be called with each event of a request as it arrives."""
        last: dict[int, float] = {}

        def arrived(event: TokenEvent | FinishEvent) -> None:
            if isinstance(event, FinishEvent):
                self._finished.labels(event.reason.value).inc()
                self._completion_sizes.observe(event.completion_tokens)
                return
            now = time.monotonic()
            if not last:
                self._began(request, now)
            if event.sample in last:
                self._between_tokens.observe(now - last[event.sample])
            last[event.sample] = now
            self._generation_tokens.inc()

        return arrived

    def _began(self, request: GenerationRequest, now: float) -> None:
        self._first_token.observe(now - request.arrived)
        self._prompt_tokens.inc(len(request.prompt))
        self._prompt_sizes.observe(len(request.prompt))

    def show(self, info: Callable[[], ServerInfo]) -> None:
        """Report the datastores of ``info`` too, as they are whenever someone asks."""
        self.registry.register(_Served(info))


class _Served(Collector):
    """Entries and documents of each datastore, and what is served, read when the metrics are."""

    def __init__(self, info: Callable[[], ServerInfo]) -> None:
        self._info = info

    def collect(self) -> Iterator[Metric]:
        info = self._info()
        entries = GaugeMetricFamily("knnlm_datastore_entries", "Entries that are not removed.", labels=["datastore"])
        documents = GaugeMetricFamily("knnlm_datastore_documents", "Documents that are not removed.", labels=["datastore"])
        for store in info.datastores:
            entries.add_metric([store.name], store.entries)
            documents.add_metric([store.name], store.documents)
        server = GaugeMetricFamily("knnlm_server_info", "Always 1; the labels say what is served.", labels=["version", "model"])
        server.add_metric([info.version, info.model], 1)
        return iter((entries, documents, server))


class MetricsPort:
    """An HTTP port on which Prometheus reads the metrics; port 0 takes a free one."""

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        """Raises :class:`CannotListen`."""
        self._server: WSGIServer
        self._thread: threading.Thread
        try:
            self._server, self._thread = start_http_server(port, host, metrics.registry)
        except OSError as error:
            raise CannotListen(f"Can't listen on {host}:{port} for metrics: {error.strerror}; choose another --metrics-port.") from error
        self.port: int = self._server.server_port

    def stop(self) -> None:
        """Free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
