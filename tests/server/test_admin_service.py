"""knnlm.admin.v1 on a real port over datastores that are none: requests, answers, and what each error becomes."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from knnlm.errors import DocumentNotFound, KNNLMError, StoreDamaged, StoreLocked, StoreMismatch, StoreNotFound
from knnlm_server.admin_service import AdminService
from knnlm_server.app import Border, GenerationServer
from knnlm_server.listening import Place
from knnlm_server.pb import admin_pb2 as pb
from knnlm_server.pb.admin_pb2_grpc import AdminServiceStub
from knnlm_server.sequence import DatastoreInfo
from tests.server.fake_engine import MAIN, FakeAdmin, FakeEngine

PATIENCE = 30.0
METHODS = {
    "LoadDatastore": pb.LoadDatastoreRequest(name="law", path="/stores/law"),
    "UnloadDatastore": pb.UnloadDatastoreRequest(name="news"),
    "ReloadDatastore": pb.ReloadDatastoreRequest(name="news"),
    "RemoveDocuments": pb.RemoveDocumentsRequest(datastore="news", document_ids=["a"]),
}


@asynccontextmanager
async def admin_stub(datastores: FakeAdmin) -> AsyncIterator[Any]:
    border = Border(admin=Place("127.0.0.1", 0, "--admin-port"))
    server = GenerationServer(FakeEngine(["a"]), border=border, admin=AdminService(datastores))
    await server.start()
    assert server.admin_place is not None
    async with grpc.aio.insecure_channel(server.admin_place.address) as channel:
        yield AdminServiceStub(channel)
    await server.stop(grace=0)


def with_stub(datastores: FakeAdmin, use: Callable[[Any], Awaitable[Any]]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(PATIENCE), admin_stub(datastores) as stub:
            return await use(stub)

    return asyncio.run(bounded())


def answer(datastores: FakeAdmin, method: str, request: Any) -> Any:
    return with_stub(datastores, lambda stub: getattr(stub, method)(request))


def refusal(datastores: FakeAdmin, method: str, request: Any) -> tuple[grpc.StatusCode, str]:
    async def refused(stub: Any) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await getattr(stub, method)(request)
        return error.value.code(), error.value.details() or ""

    found: tuple[grpc.StatusCode, str] = with_stub(datastores, refused)
    return found


def test_load() -> None:
    datastores = FakeAdmin(news=Path("/stores/news"))
    found = answer(datastores, "LoadDatastore", pb.LoadDatastoreRequest(name="law", path="/stores/law"))
    assert found == pb.LoadDatastoreResponse(fingerprint=MAIN.fingerprint, entries=MAIN.entries, documents=MAIN.documents)
    assert (datastores.stores["law"], datastores.default) == (Path("/stores/law"), "news")
    answer(datastores, "LoadDatastore", pb.LoadDatastoreRequest(name="wiki", path="/stores/wiki", make_default=True))
    assert datastores.default == "wiki"


def test_unload_and_reload() -> None:
    datastores = FakeAdmin(news=Path("/stores/news"), law=Path("/stores/law"))
    assert answer(datastores, "ReloadDatastore", pb.ReloadDatastoreRequest(name="news")).fingerprint == "reloaded"
    assert datastores.stores["news"] == Path("/stores/news")
    answer(datastores, "ReloadDatastore", pb.ReloadDatastoreRequest(name="news", path="/stores/new"))
    assert datastores.stores["news"] == Path("/stores/new")
    assert answer(datastores, "UnloadDatastore", pb.UnloadDatastoreRequest(name="news")) == pb.UnloadDatastoreResponse()
    assert list(datastores.stores) == ["law"]


def test_remove_documents() -> None:
    datastores = FakeAdmin(news=Path("/stores/news"))
    request = pb.RemoveDocumentsRequest(datastore="news", document_ids=["a", "b"], where=["license=internal", "source=x=y"])
    assert answer(datastores, "RemoveDocuments", request) == pb.RemoveDocumentsResponse(documents=2, entries=20)
    answer(datastores, "RemoveDocuments", pb.RemoveDocumentsRequest(datastore="news", where=["year=2020"]))
    assert datastores.removed == [("news", ("a", "b"), {"license": "internal", "source": "x=y"}), ("news", (), {"year": "2020"})]


BAD_NAMES = ["", "a b", "../news", "ä", "-a", "a" * 65]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_a_name_that_none_may_have_is_refused_with_its_field(method: str, name: str) -> None:
    request, field = METHODS[method].__deepcopy__(), "datastore" if method == "RemoveDocuments" else "name"
    setattr(request, field, name)
    code, words = refusal(FakeAdmin(news=Path("/stores/news")), method, request)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert words.startswith(f"{field}: is {name!r}, but must be 1 to 64 letters")


@pytest.mark.parametrize(
    ("method", "request_", "words"),
    [
        ("LoadDatastore", pb.LoadDatastoreRequest(name="law"), "path: is empty"),
        ("LoadDatastore", pb.LoadDatastoreRequest(name="law", path="a\0b"), "path: is 'a\\x00b'"),
        ("ReloadDatastore", pb.ReloadDatastoreRequest(name="news", path=""), "path: is empty"),
        ("RemoveDocuments", pb.RemoveDocumentsRequest(datastore="news"), "document_ids: is empty, and so is where"),
        ("RemoveDocuments", pb.RemoveDocumentsRequest(datastore="news", where=["year"]), "where: is 'year', but must be FIELD=VALUE"),
        ("RemoveDocuments", pb.RemoveDocumentsRequest(datastore="news", where=["a=1", "a=2"]), "where: names a twice"),
        ("UnloadDatastore", pb.UnloadDatastoreRequest.FromString(b"\x0a\x04news\x78\x01"), "request: has field number 15"),
    ],
)
def test_fields_that_can_not_be_used_are_named(method: str, request_: Any, words: str) -> None:
    datastores = FakeAdmin(news=Path("/stores/news"))
    code, found = refusal(datastores, method, request_)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert words in found
    assert (list(datastores.stores), datastores.removed) == (["news"], [])


class Failing(FakeAdmin):
    """Every change fails with one error."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def load(self, name: str, path: Path, *, make_default: bool = False) -> DatastoreInfo:
        raise self.error

    def remove_documents(self, name: str, ids: Sequence[str], where: Mapping[str, str]) -> tuple[int, int]:
        raise self.error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StoreNotFound("There is no datastore at /stores/law."), grpc.StatusCode.FAILED_PRECONDITION),
        (StoreMismatch("It was built with another model."), grpc.StatusCode.FAILED_PRECONDITION),
        (StoreLocked("Another process writes it."), grpc.StatusCode.FAILED_PRECONDITION),
        (StoreDamaged("keys.npy is damaged."), grpc.StatusCode.DATA_LOSS),
        (DocumentNotFound("No document 'a'."), grpc.StatusCode.NOT_FOUND),
    ],
)
def test_errors_of_a_store_become_statuses(error: KNNLMError, code: grpc.StatusCode) -> None:
    for method in ("LoadDatastore", "RemoveDocuments"):
        assert refusal(Failing(error), method, METHODS[method]) == (code, str(error))


def test_names_that_are_taken_and_names_that_are_not() -> None:
    taken = FakeAdmin(law=Path("/stores/law"))
    assert refusal(taken, "LoadDatastore", METHODS["LoadDatastore"])[0] is grpc.StatusCode.ALREADY_EXISTS
    for method in ("UnloadDatastore", "ReloadDatastore", "RemoveDocuments"):
        assert refusal(taken, method, METHODS[method])[0] is grpc.StatusCode.NOT_FOUND


def test_what_was_not_expected_says_nothing_of_itself() -> None:
    secret = uuid.uuid4().hex
    code, words = refusal(Failing(RuntimeError(secret)), "LoadDatastore", METHODS["LoadDatastore"])
    assert code is grpc.StatusCode.INTERNAL
    assert secret not in words


class Slow(FakeAdmin):
    """Loads as long as it is told to; counts those that load at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go_on = threading.Semaphore(0), threading.Semaphore(0)
        self.at_once = self.most_at_once = 0

    def load(self, name: str, path: Path, *, make_default: bool = False) -> DatastoreInfo:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.begun.release()
        assert self.go_on.acquire(timeout=PATIENCE)
        self.at_once -= 1
        return super().load(name, path, make_default=make_default)


def test_changes_are_made_one_at_a_time_and_hold_nobody_up() -> None:
    datastores = Slow()

    async def use(stub: Any) -> None:
        loads = [asyncio.ensure_future(stub.LoadDatastore(pb.LoadDatastoreRequest(name=f"s{n}", path="/s"))) for n in range(4)]
        assert await asyncio.to_thread(datastores.begun.acquire, timeout=PATIENCE)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.UnloadDatastore(pb.UnloadDatastoreRequest(name=""))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        datastores.go_on.release(4)
        await asyncio.gather(*loads)

    with_stub(datastores, use)
    assert sorted(datastores.stores) == ["s0", "s1", "s2", "s3"]
    assert datastores.most_at_once == 1


def test_a_caller_who_gives_up_stops_no_change_that_has_begun() -> None:
    datastores = Slow()

    async def use(stub: Any) -> None:
        first = stub.LoadDatastore(pb.LoadDatastoreRequest(name="first", path="/s"))
        assert await asyncio.to_thread(datastores.begun.acquire, timeout=PATIENCE)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        datastores.go_on.release(2)
        await stub.LoadDatastore(pb.LoadDatastoreRequest(name="last", path="/s"))

    with_stub(datastores, use)
    assert set(datastores.stores) == {"first", "last"}
