"""Traces of calls, behind the extra ``tracing``. Knows no service; without tracing nothing of OpenTelemetry is imported.

Where spans go is said by OpenTelemetry's own variables (``OTEL_EXPORTER_OTLP_ENDPOINT``, ``OTEL_SERVICE_NAME``, …).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import grpc

from knnlm.errors import MissingDependency

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

Metadata = Sequence[tuple[str, str | bytes]]


class Span(Protocol):
    """The trace of one call."""

    def ended(self, code: grpc.StatusCode, reason: str) -> None:
        """The call has ended; anything but OK is traced as an error."""


class Tracing(Protocol):
    """Makes spans."""

    def span(self, service: str, method: str, request_id: str, metadata: Metadata) -> AbstractContextManager[Span]:
        """The span of a call, current until the block ends, and a child of the client's where ``metadata`` name one."""

    def stop(self) -> None:
        """Send what was not sent yet."""


class _NoSpan:
    def ended(self, code: grpc.StatusCode, reason: str) -> None:
        pass


class NoTracing:
    """Traces nothing."""

    def span(self, service: str, method: str, request_id: str, metadata: Metadata) -> AbstractContextManager[Span]:
        """See :meth:`Tracing.span`."""
        return nullcontext(_NoSpan())

    def stop(self) -> None:
        """See :meth:`Tracing.stop`."""


class OpenTelemetryTracing:
    """Spans by OpenTelemetry, one for each call, with the semantic conventions for gRPC servers."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        """``provider``: where spans go; None: by OTLP, as OpenTelemetry's variables say."""
        try:
            from opentelemetry import propagate, trace
        except ImportError as error:
            raise MissingDependency("Tracing needs OpenTelemetry; install it with: pip install 'knnlm[tracing]'.") from error
        self._extract, self._trace = propagate.extract, trace
        self._provider = provider or _otlp_provider()
        self._tracer = self._provider.get_tracer("knnlm_server")

    @contextmanager
    def span(self, service: str, method: str, request_id: str, metadata: Metadata) -> Iterator[Span]:
        """See :meth:`Tracing.span`."""
        carrier = {key: value for key, value in metadata if isinstance(value, str)}
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method, "knnlm.request_id": request_id}
        with self._tracer.start_as_current_span(
            f"{service}/{method}",
            context=self._extract(carrier),
            kind=self._trace.SpanKind.SERVER,
            attributes=attributes,
            # The text of an exception may quote a prompt; ended() says what is known.
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            yield _OpenTelemetrySpan(span, self._trace)

    def stop(self) -> None:
        """See :meth:`Tracing.stop`."""
        self._provider.shutdown()


class _OpenTelemetrySpan:
    def __init__(self, span: Any, trace: Any) -> None:
        self._span, self._trace = span, trace

    def ended(self, code: grpc.StatusCode, reason: str) -> None:
        self._span.set_attribute("rpc.grpc.status_code", code.value[0])
        if code is not grpc.StatusCode.OK:
            self._span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, reason or code.name))
            self._span.set_attribute("error.type", reason or code.name)


def _otlp_provider() -> TracerProvider:
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise MissingDependency("Tracing needs OpenTelemetry; install it with: pip install 'knnlm[tracing]'.") from error
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "knnlm"}))
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
