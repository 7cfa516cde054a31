"""The client of the admin service against a servicer that notes what arrives: messages, results, errors, no second attempt."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

from knnlm.errors import InvalidInput
from knnlm_server.admin_client import AdminClient, Removed, ServedDatastore
from knnlm_server.client import RequestFailed, ServerUnavailable
from knnlm_server.pb import admin_pb2 as pb
from knnlm_server.pb.admin_pb2_grpc import AdminServiceServicer, add_AdminServiceServicer_to_server
from tests.server.test_client import free_port


class Notes(AdminServiceServicer):
    """Answers every call, but UNAVAILABLE for the datastore "gone"."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.metadata: dict[str, str] = {}

    def LoadDatastore(self, request: pb.LoadDatastoreRequest, context: Any) -> pb.LoadDatastoreResponse:
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        return pb.LoadDatastoreResponse(fingerprint="f", entries=5, documents=2)

    def UnloadDatastore(self, request: pb.UnloadDatastoreRequest, context: Any) -> pb.UnloadDatastoreResponse:
        self.requests.append(request)
        if request.name == "gone":
            context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        return pb.UnloadDatastoreResponse()

    def ReloadDatastore(self, request: pb.ReloadDatastoreRequest, context: Any) -> pb.ReloadDatastoreResponse:
        self.requests.append(request)
        return pb.ReloadDatastoreResponse(fingerprint="g", entries=4, documents=1)

    def RemoveDocuments(self, request: pb.RemoveDocumentsRequest, context: Any) -> pb.RemoveDocumentsResponse:
        self.requests.append(request)
        return pb.RemoveDocumentsResponse(documents=2, entries=30)


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def admin(notes: Notes) -> Iterator[AdminClient]:
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    add_AdminServiceServicer_to_server(notes, server)  # type: ignore[no-untyped-call]  # generated
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with AdminClient(f"127.0.0.1:{port}", token="t0ken") as client:
        yield client
    server.stop(None).wait()


def test_every_call_arrives_and_answers(admin: AdminClient, notes: Notes) -> None:
    assert admin.load("news", "/stores/news", make_default=True, request_id="r1") == ServedDatastore("f", 5, 2)
    assert admin.reload("news") == admin.reload("news", "/stores/other") == ServedDatastore("g", 4, 1)
    assert admin.remove("news", ["a", "b"], where=["license=internal"]) == Removed(2, 30)
    admin.unload("news")
    assert notes.requests == [
        pb.LoadDatastoreRequest(name="news", path="/stores/news", make_default=True),
        pb.ReloadDatastoreRequest(name="news"),
        pb.ReloadDatastoreRequest(name="news", path="/stores/other"),
        pb.RemoveDocumentsRequest(datastore="news", document_ids=["a", "b"], where=["license=internal"]),
        pb.UnloadDatastoreRequest(name="news"),
    ]
    assert (notes.metadata["authorization"], notes.metadata["x-request-id"]) == ("Bearer t0ken", "r1")


def test_no_call_is_sent_twice(admin: AdminClient, notes: Notes) -> None:
    with pytest.raises(ServerUnavailable, match="not now"):
        admin.unload("gone")
    assert len(notes.requests) == 1


def test_what_no_field_can_hold_is_refused_before_sending(admin: AdminClient, notes: Notes) -> None:
    with pytest.raises(InvalidInput, match="document_ids: is one string"):
        admin.remove("news", "a")
    assert not notes.requests


def test_no_server_is_a_typed_error() -> None:
    with AdminClient(f"127.0.0.1:{free_port()}") as client, pytest.raises(RequestFailed):
        client.unload("news")
