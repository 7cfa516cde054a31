from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class LoadDatastoreRequest(_message.Message):
    __slots__ = ("name", "path", "make_default")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    MAKE_DEFAULT_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    make_default: bool
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ..., make_default: _Optional[bool] = ...) -> None: ...

class LoadDatastoreResponse(_message.Message):
    __slots__ = ("fingerprint", "entries", "documents")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    entries: int
    documents: int
    def __init__(self, fingerprint: _Optional[str] = ..., entries: _Optional[int] = ..., documents: _Optional[int] = ...) -> None: ...

class UnloadDatastoreRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UnloadDatastoreResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReloadDatastoreRequest(_message.Message):
    __slots__ = ("name", "path")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ...) -> None: ...

class ReloadDatastoreResponse(_message.Message):
    __slots__ = ("fingerprint", "entries", "documents")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    entries: int
    documents: int
    def __init__(self, fingerprint: _Optional[str] = ..., entries: _Optional[int] = ..., documents: _Optional[int] = ...) -> None: ...

class RemoveDocumentsRequest(_message.Message):
    __slots__ = ("datastore", "document_ids", "where")
    DATASTORE_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_IDS_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    datastore: str
    document_ids: _containers.RepeatedScalarFieldContainer[str]
    where: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, datastore: _Optional[str] = ..., document_ids: _Optional[_Iterable[str]] = ..., where: _Optional[_Iterable[str]] = ...) -> None: ...

class RemoveDocumentsResponse(_message.Message):
    __slots__ = ("documents", "entries")
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    documents: int
    entries: int
    def __init__(self, documents: _Optional[int] = ..., entries: _Optional[int] = ...) -> None: ...
