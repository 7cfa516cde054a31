"""The gRPC servicer that changes which datastores are served. Knows no engine, no port and no role; ``calls.py`` makes statuses.

One change at a time: each reads files for as long as that takes, on a thread. A caller who gives up stops no change that has
begun.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from knnlm.datastore.selection import parse_conditions
from knnlm.errors import InvalidInput
from knnlm_server.engine_protocol import DatastoreAdmin
from knnlm_server.field_checks import refuse_unknown
from knnlm_server.pb import admin_pb2 as pb
from knnlm_server.pb.admin_pb2_grpc import AdminServiceServicer
from knnlm_server.sequence import DATASTORE_NAME

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["AdminService"].full_name

T = TypeVar("T")


class AdminService(AdminServiceServicer):
    """``knnlm.admin.v1.AdminService`` over the datastores of a server."""

    def __init__(self, datastores: DatastoreAdmin) -> None:
        self._datastores = datastores
        self._turn = asyncio.Lock()

    async def LoadDatastore(self, request: pb.LoadDatastoreRequest, context: Any) -> pb.LoadDatastoreResponse:
        """Serve a datastore."""
        refuse_unknown(request)
        name, path = _name(request.name, "name"), _path(request.path)
        info = await self._change(lambda: self._datastores.load(name, path, make_default=request.make_default))
        return pb.LoadDatastoreResponse(fingerprint=info.fingerprint, entries=info.entries, documents=info.documents)

    async def UnloadDatastore(self, request: pb.UnloadDatastoreRequest, context: Any) -> pb.UnloadDatastoreResponse:
        """Take a datastore out of service."""
        refuse_unknown(request)
        name = _name(request.name, "name")
        await self._change(lambda: self._datastores.unload(name))
        return pb.UnloadDatastoreResponse()

    async def ReloadDatastore(self, request: pb.ReloadDatastoreRequest, context: Any) -> pb.ReloadDatastoreResponse:
        """Open a datastore again."""
        refuse_unknown(request)
        name, path = _name(request.name, "name"), _path(request.path) if request.HasField("path") else None
        info = await self._change(lambda: self._datastores.reload(name, path))
        return pb.ReloadDatastoreResponse(fingerprint=info.fingerprint, entries=info.entries, documents=info.documents)

    async def RemoveDocuments(self, request: pb.RemoveDocumentsRequest, context: Any) -> pb.RemoveDocumentsResponse:
        """Remove documents from a datastore."""
        refuse_unknown(request)
        name, ids, where = _name(request.datastore, "datastore"), list(request.document_ids), parse_conditions(request.where)
        if not ids and not where:
            raise InvalidInput("document_ids", "is empty, and so is where; one of them must say what to remove.")
        documents, entries = await self._change(lambda: self._datastores.remove_documents(name, ids, where))
        return pb.RemoveDocumentsResponse(documents=documents, entries=entries)

    async def _change(self, change: Callable[[], T]) -> T:
        """Make a change when those before it are made."""
        async with self._turn:
            return await asyncio.to_thread(change)


def _name(name: str, field: str) -> str:
    if not DATASTORE_NAME.fullmatch(name):
        raise InvalidInput(field, f"is {name!r}, but must be 1 to 64 letters, digits, -, _ and ., of which the first is a letter or digit.")
    return name


def _path(path: str) -> Path:
    if not path:
        raise InvalidInput("path", "is empty, but must be the folder of a datastore.")
    if "\0" in path:
        raise InvalidInput("path", f"is {path!r}, but a path holds no NUL.")
    return Path(path)
