"""Which gRPC status an error becomes: one table. Knows no service and no engine.

Details are google.rpc messages: BadRequest names the field that can't be used, RetryInfo says when to come again,
ErrorInfo gives a reason that programs can compare, RequestInfo the id under which the server logged the error.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from knnlm.errors import (
    DocumentNotFound,
    IndexingError,
    InvalidInput,
    KNNLMError,
    MissingDependency,
    ModelError,
    StoreDamaged,
    StoreError,
)
from knnlm_server.errors import (
    DatastoreLoaded,
    DatastoreNotLoaded,
    EngineFailed,
    QueueFull,
    ReadTooSlowly,
    RoleMissing,
    ShuttingDown,
    TokenMissing,
)

DOMAIN = "knnlm"
REQUEST_ID = "x-request-id"

# An error takes the code of the nearest class in its tree.
CODES: dict[type[KNNLMError], grpc.StatusCode] = {
    InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ShuttingDown: grpc.StatusCode.UNAVAILABLE,
    DatastoreNotLoaded: grpc.StatusCode.NOT_FOUND,
    DatastoreLoaded: grpc.StatusCode.ALREADY_EXISTS,
    ReadTooSlowly: grpc.StatusCode.RESOURCE_EXHAUSTED,
    TokenMissing: grpc.StatusCode.UNAUTHENTICATED,
    RoleMissing: grpc.StatusCode.PERMISSION_DENIED,
    DocumentNotFound: grpc.StatusCode.NOT_FOUND,
    StoreDamaged: grpc.StatusCode.DATA_LOSS,
    StoreError: grpc.StatusCode.FAILED_PRECONDITION,
    ModelError: grpc.StatusCode.FAILED_PRECONDITION,
    MissingDependency: grpc.StatusCode.FAILED_PRECONDITION,
    IndexingError: grpc.StatusCode.INTERNAL,
    EngineFailed: grpc.StatusCode.INTERNAL,
    KNNLMError: grpc.StatusCode.INTERNAL,
}

_log = logging.getLogger(__name__)


def status_of(error: Exception, request_id: str) -> Any:
    """The ``grpc.Status`` (code, details, trailing_metadata) of an error that ended a request.

    An error that knnlm did not raise on purpose becomes INTERNAL and says nothing of itself but the request's id; its
    traceback goes to the log, and so does that of any other INTERNAL error.
    """
    code = code_of(error)
    if code is grpc.StatusCode.INTERNAL:
        _log.error("request %s failed", request_id, exc_info=error)
    message = str(error) if isinstance(error, KNNLMError) else f"Internal error; the server's log has it under request {request_id}."
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in _details(error, request_id):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    packed_status = rpc_status.to_status(status)
    trailing = (*packed_status.trailing_metadata, (REQUEST_ID, request_id), *_pushback(error))
    return packed_status._replace(trailing_metadata=trailing)


def code_of(error: Exception) -> grpc.StatusCode:
    """The status code of an error; INTERNAL for one that knnlm did not raise on purpose."""
    return next((CODES[kind] for kind in type(error).__mro__ if kind in CODES), grpc.StatusCode.INTERNAL)


def reason_of(error: Exception) -> str:
    """The reason in ErrorInfo: the name of the error's class in upper case (``QUEUE_FULL``), or ``UNEXPECTED``."""
    if not isinstance(error, KNNLMError):
        return "UNEXPECTED"
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(error).__name__).upper()


def _details(error: Exception, request_id: str) -> list[Message]:
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=reason_of(error), domain=DOMAIN)]
    if isinstance(error, InvalidInput):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.problem)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, QueueFull):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(_milliseconds(error))
        details.append(retry)
    return [*details, error_details_pb2.RequestInfo(request_id=request_id)]


def _pushback(error: Exception) -> tuple[tuple[str, str], ...]:
    """What gRPC's own retries obey, where the service configuration of a client has them."""
    return (("grpc-retry-pushback-ms", str(_milliseconds(error))),) if isinstance(error, QueueFull) else ()


def _milliseconds(error: QueueFull) -> int:
    return round(error.retry_seconds * 1000)
