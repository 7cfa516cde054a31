"""Each error becomes the right code with the details that a program can act on."""

from __future__ import annotations

import logging
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

import knnlm.errors
import knnlm_server.errors
from knnlm.errors import DocumentNotFound, InvalidInput, KNNLMError, StoreDamaged, StoreMismatch
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
from knnlm_server.status import CODES, code_of, reason_of, status_of


def details(error: Exception) -> dict[str, Any]:
    status = status_of(error, "r1")
    message = status_pb2.Status.FromString(status.trailing_metadata[0][1])
    assert message.code == status.code.value[0]
    assert message.message == status.details
    found = {}
    for packed in message.details:
        kind = getattr(error_details_pb2, packed.TypeName().rsplit(".", 1)[1])
        found[kind.__name__] = kind.FromString(packed.value)
    return found


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*(subclasses(child) for child in kind.__subclasses__()))


def test_every_error_of_the_product_has_a_code_from_the_table() -> None:
    own = {kind for kind in subclasses(KNNLMError) if kind.__module__ in (knnlm.errors.__name__, knnlm_server.errors.__name__)}
    assert len(own) > 15
    for kind in own:
        error = kind("f", "is bad.") if kind is InvalidInput else kind("x")
        assert code_of(error) in CODES.values()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidInput("options.k", "is 0."), grpc.StatusCode.INVALID_ARGUMENT),
        (QueueFull("full"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (ShuttingDown("bye"), grpc.StatusCode.UNAVAILABLE),
        (StoreDamaged("x"), grpc.StatusCode.DATA_LOSS),
        (StoreMismatch("x"), grpc.StatusCode.FAILED_PRECONDITION),
        (DatastoreNotLoaded("x"), grpc.StatusCode.NOT_FOUND),
        (DatastoreLoaded("x"), grpc.StatusCode.ALREADY_EXISTS),
        (ReadTooSlowly("x"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (TokenMissing("x"), grpc.StatusCode.UNAUTHENTICATED),
        (RoleMissing("x"), grpc.StatusCode.PERMISSION_DENIED),
        (DocumentNotFound("x"), grpc.StatusCode.NOT_FOUND),
        (EngineFailed("x"), grpc.StatusCode.INTERNAL),
        (KNNLMError("x"), grpc.StatusCode.INTERNAL),
        (ValueError("x"), grpc.StatusCode.INTERNAL),
    ],
)
def test_codes(error: Exception, code: grpc.StatusCode) -> None:
    assert status_of(error, "r1").code is code


def test_invalid_input_names_the_field() -> None:
    found = details(InvalidInput("options.sampling.top_p", "is 2, but must be at most 1."))
    (violation,) = found["BadRequest"].field_violations
    assert (violation.field, violation.description) == ("options.sampling.top_p", "is 2, but must be at most 1.")
    assert (found["ErrorInfo"].reason, found["ErrorInfo"].domain) == ("INVALID_INPUT", "knnlm")


def test_queue_full_says_when_to_come_again() -> None:
    found = details(QueueFull("full"))
    assert found["RetryInfo"].retry_delay.ToSeconds() == 1
    assert found["ErrorInfo"].reason == "QUEUE_FULL"
    assert dict(status_of(QueueFull("full"), "r1").trailing_metadata)["grpc-retry-pushback-ms"] == "1000"


def test_what_the_server_knows_of_its_pace_is_said_to_programs_and_to_grpc() -> None:
    full = QueueFull("full")
    full.retry_seconds = 12.345
    assert details(full)["RetryInfo"].retry_delay.ToMilliseconds() == 12345
    assert dict(status_of(full, "r1").trailing_metadata)["grpc-retry-pushback-ms"] == "12345"


def test_only_a_full_queue_asks_to_come_again() -> None:
    assert "RetryInfo" not in details(ReadTooSlowly("slow"))
    assert "grpc-retry-pushback-ms" not in dict(status_of(ReadTooSlowly("slow"), "r1").trailing_metadata)


@pytest.mark.parametrize("error", [InvalidInput("k", "is 0."), QueueFull("full"), TokenMissing("who?"), ValueError("x")])
def test_every_error_has_the_id_under_which_it_was_logged(error: Exception) -> None:
    assert details(error)["RequestInfo"].request_id == "r1"
    assert dict(status_of(error, "r1").trailing_metadata)["x-request-id"] == "r1"


def test_unexpected_errors_go_to_the_log_and_tell_the_client_only_an_id(caplog: pytest.LogCaptureFixture) -> None:
    error = ValueError("secret path /home/me")
    with caplog.at_level(logging.ERROR):
        status = status_of(error, "r1")
    assert "secret" not in status.details
    assert "r1" in status.details
    assert details(error)["RequestInfo"].request_id == "r1"
    assert caplog.records[0].exc_info is not None
    assert caplog.records[0].exc_info[1] is error
    assert reason_of(error) == "UNEXPECTED"


def test_expected_refusals_are_not_logged_as_errors(caplog: pytest.LogCaptureFixture) -> None:
    status_of(InvalidInput("x", "is bad."), "r1")
    status_of(QueueFull("full"), "r1")
    assert not caplog.records
