"""A client of ``knnlm.admin.v1``: changes which datastores a running server has. Imports no torch.

::

    with AdminClient("localhost:50052", token=token) as admin:
        admin.reload("main")

Errors are those of :mod:`knnlm_server.client`. No call is sent twice: whether a lost one was done, only the server knows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.message import Message

from knnlm_server.client_channel import Connection, Retries, Tls
from knnlm_server.client_errors import failure_of
from knnlm_server.client_options import put_fields
from knnlm_server.pb import admin_pb2 as pb
from knnlm_server.pb.admin_pb2_grpc import AdminServiceStub


@dataclass(frozen=True)
class ServedDatastore:
    """A datastore as it is served now; entries and documents that are not removed."""

    fingerprint: str
    entries: int
    documents: int


@dataclass(frozen=True)
class Removed:
    """Documents that a call removed, and their entries."""

    documents: int
    entries: int


class AdminClient:
    """A client for threads. Arguments as those of :class:`~knnlm_server.client.GenerationClient`; paths are those of the
    server's machine. Every method takes ``timeout`` in seconds (None: never) and ``request_id``.
    """

    def __init__(self, target: str, *, tls: Tls | None = None, token: str | None = None) -> None:
        self._connection = Connection(target, tls, token, Retries(attempts=1))
        self.target = target
        self._channel = self._connection.channel()
        self._stub = AdminServiceStub(self._channel)  # type: ignore[no-untyped-call]  # generated

    def load(
        self, name: str, path: str | Path, *, make_default: bool = False, timeout: float | None = None, request_id: str | None = None
    ) -> ServedDatastore:
        """Serve the datastore at ``path`` under a name that is free."""
        request = put_fields(pb.LoadDatastoreRequest(), name=name, path=str(path), make_default=make_default)
        return _served(self._call(self._stub.LoadDatastore, request, timeout, request_id))

    def unload(self, name: str, *, timeout: float | None = None, request_id: str | None = None) -> None:
        """Take a datastore out of service; requests that run keep it."""
        self._call(self._stub.UnloadDatastore, put_fields(pb.UnloadDatastoreRequest(), name=name), timeout, request_id)

    def reload(
        self, name: str, path: str | Path | None = None, *, timeout: float | None = None, request_id: str | None = None
    ) -> ServedDatastore:
        """Serve a datastore as it is on disk now, or from another path."""
        request = put_fields(pb.ReloadDatastoreRequest(), name=name, path=None if path is None else str(path))
        return _served(self._call(self._stub.ReloadDatastore, request, timeout, request_id))

    def remove(
        self,
        datastore: str,
        document_ids: Iterable[str] = (),
        *,
        where: Iterable[str] = (),
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Removed:
        """Remove documents durably: those with these ids that meet every condition (``license=internal``)."""
        request = put_fields(pb.RemoveDocumentsRequest(), datastore=datastore, document_ids=document_ids, where=where)
        response = self._call(self._stub.RemoveDocuments, request, timeout, request_id)
        return Removed(response.documents, response.entries)

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _call(self, method: Any, request: Message, timeout: float | None, request_id: str | None) -> Any:
        try:
            return method(request, timeout=timeout, metadata=self._connection.metadata(request_id))
        except grpc.RpcError as error:
            raise failure_of(error, self.target, self._connection.diagnosis) from error


def _served(response: pb.LoadDatastoreResponse | pb.ReloadDatastoreResponse) -> ServedDatastore:
    return ServedDatastore(response.fingerprint, response.entries, response.documents)
