"""Errors of the clients, and how a call's status becomes one of them. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from knnlm.errors import InvalidInput, KNNLMError


@dataclass(frozen=True)
class FieldViolation:
    """A field that the server can't use: its path in the request, and why."""

    field: str
    problem: str


class RequestFailed(KNNLMError):
    """The server refused a request or failed on it.

    ``code`` is gRPC's; ``reason`` the server's name for the error (``QUEUE_FULL``), None where it came from gRPC
    itself; ``retry_seconds`` when to try again, where the server says; ``request_id`` under which its log has the
    error, where it says.
    """

    def __init__(self, code: grpc.StatusCode, message: str, details: Sequence[Any] = ()) -> None:
        KNNLMError.__init__(self, message)
        self.code = code
        self.message = message
        retry = _detail(details, error_details_pb2.RetryInfo())
        self.reason: str | None = _detail(details, error_details_pb2.ErrorInfo()).reason or None
        self.retry_seconds: float | None = retry.retry_delay.ToTimedelta().total_seconds() if retry.HasField("retry_delay") else None
        self.request_id: str | None = _detail(details, error_details_pb2.RequestInfo()).request_id or None


class FieldsRefused(RequestFailed, InvalidInput):
    """The server can't use some fields of the request: ``violations``, of which ``field`` and ``problem`` are the first."""

    def __init__(self, code: grpc.StatusCode, message: str, details: Sequence[Any], violations: Sequence[FieldViolation]) -> None:
        super().__init__(code, message, details)
        self.violations = tuple(violations)
        self.field, self.problem = violations[0].field, violations[0].problem


class ServerUnavailable(RequestFailed):
    """No server answers at the target, or it is starting or being stopped; the same request may succeed later."""


def failure_of(error: Any, target: str, diagnose: Callable[[], str] = str) -> RequestFailed:
    """The typed form of the ``grpc.RpcError`` that a call to ``target`` ended with.

    ``diagnose``: asked for a sentence that says more where no server answered.
    """
    code = error.code()
    status = rpc_status.from_call(error)
    details = () if status is None else status.details
    message = error.details() or code.name
    violations = [FieldViolation(v.field, v.description) for v in _detail(details, error_details_pb2.BadRequest()).field_violations]
    if violations:
        return FieldsRefused(code, message, details, violations)
    if code is grpc.StatusCode.UNAVAILABLE:
        return ServerUnavailable(code, message if status else _with(f"No server answers at {target} ({message}).", diagnose()), details)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:  # which only gRPC says, in two words
        message = f"The call to {target} did not end within its timeout; allow more time, or ask for less."
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and status is None and "larger than max" in message:  # which gRPC itself says
        message = f"The request is larger than the server takes on, and will not be later ({message}); send less at once."
    return RequestFailed(code, message, details)


def not_ready(target: str, timeout: float, diagnosis: str = "") -> ServerUnavailable:
    """The error of waiting for ``timeout`` seconds in vain, with a sentence that may say more."""
    return ServerUnavailable(grpc.StatusCode.UNAVAILABLE, _with(f"No server was ready at {target} within {timeout:g} seconds.", diagnosis))


def _with(sentence: str, diagnosis: str) -> str:
    return f"{sentence} {diagnosis}".rstrip()


def _detail(details: Sequence[Any], empty: Any) -> Any:
    """The detail that has the type of ``empty``, or ``empty`` where there is none."""
    for packed in details:
        if packed.Unpack(empty):
            break
    return empty
