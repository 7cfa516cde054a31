"""What every call of a knnlm service goes through, whichever service it is: an id, a caller with a role, one right status at
its end, and a line in the log, the metrics and the traces. Health and reflection pass untouched.

Knows no engine. Servicers raise the errors of :mod:`knnlm.errors` and :mod:`knnlm_server.errors`, and find who called with
:func:`current_call`.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from knnlm.errors import InvalidInput
from knnlm_server import logs
from knnlm_server.access import Access, Caller, certified_name
from knnlm_server.metrics import Metrics
from knnlm_server.sequence import REQUEST_ID as WELL_FORMED_ID
from knnlm_server.status import REQUEST_ID, code_of, reason_of, status_of
from knnlm_server.tracing import Span, Tracing

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]
Behavior = Callable[[Any, Any], Awaitable[Any]]

_log = logging.getLogger(__name__)


@dataclass
class Call:
    """One call as it runs. ``request_id``: the client's own (metadatum ``x-request-id``) where it is well-formed.
    ``key``: unique among all calls, also where two clients send the same id; begins with the id.
    ``prompt_tokens`` and ``completion_tokens`` are what the log says at its end.
    """

    method: str
    request_id: str
    key: str
    caller: Caller
    began: float = field(default_factory=time.monotonic)
    prompt_tokens: int = 0
    completion_tokens: int = 0


_CURRENT: ContextVar[Call] = ContextVar("call")


def current_call() -> Call:
    """The call that the running task answers; raises LookupError outside of one."""
    return _CURRENT.get()


class Calls(grpc.aio.ServerInterceptor):
    """Leads the calls of the services in ``roles`` to their servicers; a caller must have the role of the service."""

    def __init__(self, roles: Mapping[str, str], access: Access, metrics: Metrics, tracing: Tracing) -> None:
        self._roles, self._access, self._metrics, self._tracing = roles, access, metrics, tracing

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The method's handler with all of this around it."""
        handler = await continuation(handler_call_details)
        service, _, method = handler_call_details.method.lstrip("/").rpartition("/")
        if handler is None or service not in self._roles:
            return handler
        answer = self._answer(service, method, handler, tuple(handler_call_details.invocation_metadata))
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(answer, None, handler.response_serializer)
        return grpc.unary_unary_rpc_method_handler(answer, None, handler.response_serializer)

    def _answer(self, service: str, method: str, handler: Any, metadata: tuple[tuple[str, str | bytes], ...]) -> Behavior:
        async def answer(content: bytes, context: Any) -> Any:
            call = _call(method, metadata)
            with _as_current(call), self._tracing.span(service, method, call.request_id, metadata) as span:
                try:
                    # At the end, not at once: a call of which anything has come back is not tried again by its client.
                    context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
                    call.caller = self._access.caller(metadata, certified_name(context.auth_context()))
                    call.caller.require(self._roles[service])
                    request = _parsed(handler.request_deserializer, content)
                    response = await (handler.unary_stream or handler.unary_unary)(request, context)
                except asyncio.CancelledError:
                    self._ended(call, span, _cancelled(context))
                    raise
                except Exception as error:
                    self._ended(call, span, code_of(error), error)
                    status = status_of(error, call.request_id)
                else:
                    self._ended(call, span, grpc.StatusCode.OK)
                    return response
            # Outside of the span: it waits for as long as the client does not read. Three arguments, since others that trace
            # take abort_with_status for success.
            return await context.abort(status.code, status.details, status.trailing_metadata)

        return answer

    def _ended(self, call: Call, span: Span, code: grpc.StatusCode, error: Exception | None = None) -> None:
        seconds = time.monotonic() - call.began
        reason = reason_of(error) if error is not None else ""
        self._metrics.call_ended(call.method, code, reason, seconds)
        span.ended(code, reason)
        facts = {"method": call.method, "code": code.name, "seconds": round(seconds, 6), "tenant": call.caller.name, "reason": reason}
        facts |= {"prompt_tokens": call.prompt_tokens, "completion_tokens": call.completion_tokens}
        given = " ".join(f"{name}={value}" for name, value in facts.items() if value not in ("", 0))
        _log.info("call ended: %s", given, extra=facts)


@contextmanager
def _as_current(call: Call) -> Iterator[None]:
    call_token, id_token = _CURRENT.set(call), logs.request_id.set(call.request_id)
    try:
        yield
    finally:
        _CURRENT.reset(call_token)
        logs.request_id.reset(id_token)


def _call(method: str, metadata: tuple[tuple[str, str | bytes], ...]) -> Call:
    given = next((value for key, value in metadata if key == REQUEST_ID), None)
    own = uuid.uuid4().hex
    nobody = Caller("", frozenset())
    if isinstance(given, str) and WELL_FORMED_ID.fullmatch(given):
        return Call(method, given, f"{given}/{own[:12]}", nobody)
    return Call(method, own, own, nobody)


def _parsed(deserializer: Callable[[bytes], Any], content: bytes) -> Any:
    try:
        return deserializer(content)
    except DecodeError as error:
        raise InvalidInput("request", "is not a message of this method; its bytes can't be read.") from error


def _cancelled(context: Any) -> grpc.StatusCode:
    left = context.time_remaining()
    return grpc.StatusCode.DEADLINE_EXCEEDED if left is not None and left <= 0 else grpc.StatusCode.CANCELLED
