"""Datastores of a running server change while it answers: loaded, mixed, unloaded, opened again, and documents removed."""

from __future__ import annotations

import asyncio
import gc
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from knnlm.model import HFLanguageModel
from knnlm_index_builder.compaction import compact
from knnlm_index_builder.settings import Resources
from knnlm_server.admin_service import AdminService
from knnlm_server.app import Border, GenerationServer
from knnlm_server.async_engine import AsyncEngine
from knnlm_server.engine_parts import build_engine_parts
from knnlm_server.listening import Place
from knnlm_server.pb import admin_pb2, generation_pb2
from knnlm_server.pb.admin_pb2_grpc import AdminServiceStub
from knnlm_server.pb.generation_pb2_grpc import GenerationServiceStub
from tests.changing import append
from tests.integration.long_model import LONG, long_model
from tests.stores import Silent, build, text_folder
from tests.tiny import tiny_corpus

K = 12
WITHIN_SECONDS = 1.0
PATIENCE = 120.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HFLanguageModel:
    return HFLanguageModel.load(long_model(tmp_path_factory.mktemp("long") / "model"))


@pytest.fixture(scope="module")
def made(model: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for seed, (name, index) in enumerate({"news": "IVF4,SQ8", "law": "exact"}.items()):
        build(text_folder(folder / f"{name}-text", tiny_corpus(20, seed=seed)), folder / name, model, index=index, max_length=64)
    return folder


@pytest.fixture
def stores(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "stores"))


@dataclass
class Served:
    """A server with a real engine, and stubs of both of its ports."""

    generation: Any
    admin: Any
    streams: list[Stream] = field(default_factory=list)

    def stream(self, *datastores: str) -> Stream:
        """Begin to read a completion that goes on for long."""
        self.streams.append(Stream(self.generation.StreamGenerate(asked(*datastores, tokens=LONG))))
        return self.streams[-1]

    async def generate(self, *datastores: str, **weights: float) -> list[Any]:
        """Tokens of a short completion."""
        request = asked(*datastores, tokens=6, **weights)
        return list((await self.generation.Generate(as_unary(request))).completions[0].tokens)

    async def retrieve(self, *datastores: str) -> list[Any]:
        """Neighbours of a context."""
        chosen = [generation_pb2.DatastoreWeight(name=name) for name in datastores]
        request = generation_pb2.RetrieveRequest(context=PROMPT, k=K, knn_temperature=100.0, datastores=chosen)
        return list((await self.generation.Retrieve(request)).neighbors)

    async def served(self) -> dict[str, Any]:
        """What GetServerInfo says of the datastores, in order."""
        info = await self.generation.GetServerInfo(generation_pb2.GetServerInfoRequest())
        return {datastore.name: datastore for datastore in info.datastores}


PROMPT = generation_pb2.Input(text="The farmer")


def asked(*datastores: str, tokens: int, **weights: float) -> generation_pb2.StreamGenerateRequest:
    chosen = [*(generation_pb2.DatastoreWeight(name=name) for name in datastores)]
    chosen += [generation_pb2.DatastoreWeight(name=name, weight=weight) for name, weight in weights.items()]
    options = generation_pb2.GenerationOptions(
        sampling=generation_pb2.SamplingOptions(seed=1),
        stopping=generation_pb2.StoppingOptions(max_new_tokens=tokens, ignore_eos=True),
        retrieval=generation_pb2.RetrievalOptions(k=K, knn_temperature=100.0, interpolation_weight=0.5, datastores=chosen),
        detail=generation_pb2.DetailOptions(neighbors=2 * K),
    )
    return generation_pb2.StreamGenerateRequest(prompt=PROMPT, options=options)


def as_unary(request: generation_pb2.StreamGenerateRequest) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(prompt=request.prompt, options=request.options)


class Stream:
    """Reads a stream as it comes: when each token arrived, and its neighbours."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.arrived: list[tuple[float, list[Any]]] = []
        self._reading = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        async for response in self._call:
            self.arrived += [(time.monotonic(), list(token.neighbors)) for token in response.tokens]

    async def more(self, count: int, after: float = 0.0) -> list[list[Any]]:
        """The neighbours of the next ``count`` tokens that arrive later than ``after``."""
        begun = len(self.arrived)
        while len(found := [neighbors for at, neighbors in self.arrived[begun:] if at > after]) < count:
            assert not self._reading.done(), self._reading
            await asyncio.sleep(0.01)
        return found

    async def end(self) -> None:
        """Give the completion up."""
        self._call.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)


@asynccontextmanager
async def serving(path: Path) -> AsyncIterator[Served]:
    engine = AsyncEngine(await asyncio.to_thread(build_engine_parts, {"news": path}))
    server = GenerationServer(engine, border=Border(admin=Place("127.0.0.1", 0, "--admin-port")), admin=AdminService(engine.datastores))
    await server.start()
    assert server.admin_place is not None
    async with grpc.aio.insecure_channel(server.address) as main, grpc.aio.insecure_channel(server.admin_place.address) as admin:
        served = Served(GenerationServiceStub(main), AdminServiceStub(admin))
        yield served
        for stream in served.streams:
            await stream.end()
    await server.stop(grace=0)


def with_server(path: Path, use: Callable[[Served], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE), serving(path) as served:
            await use(served)

    asyncio.run(bounded())


def named(neighbors: list[Any]) -> set[str]:
    return {neighbor.datastore for neighbor in neighbors}


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.02)


def mapped(path: Path) -> bool:
    gc.collect()
    return f"{path}/" in Path("/proc/self/maps").read_text()


async def refused(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    found: grpc.StatusCode = error.value.code()
    return found


def test_loaded_mixed_and_unloaded_while_requests_run(stores: Path) -> None:
    async def use(served: Served) -> None:
        running = served.stream()
        await running.more(5)
        loaded = await served.admin.LoadDatastore(admin_pb2.LoadDatastoreRequest(name="law", path=str(stores / "law")))
        assert (await served.served())["law"].entries == loaded.entries > 0
        for tokens, expected in ((await served.generate("law"), {"law"}), (await served.generate("news", "law"), {"news", "law"})):
            assert {neighbor.datastore for token in tokens for neighbor in token.neighbors} == expected
        for token in await served.generate("news", law=2.0):
            assert Counter(neighbor.datastore for neighbor in token.neighbors) == {"news": K, "law": K}
            assert [n.weight for n in token.neighbors] == sorted((n.weight for n in token.neighbors), reverse=True)
            assert sum(neighbor.weight for neighbor in token.neighbors) == pytest.approx(1, abs=1e-4)
        assert named(await served.retrieve("law")) == {"law"}
        await served.admin.UnloadDatastore(admin_pb2.UnloadDatastoreRequest(name="news"))
        assert list(await served.served()) == ["law"]
        assert await refused(served.generation.Generate(as_unary(asked("news", tokens=3)))) is grpc.StatusCode.NOT_FOUND
        assert named(await served.retrieve()) == {"law"}, "the next one in order is the default now"
        assert all(named(neighbors) == {"news"} and len(neighbors) == K for neighbors in await running.more(10))
        assert mapped(stores / "news")
        await running.end()
        await until(lambda: not mapped(stores / "news"))
        assert mapped(stores / "law")

    with_server(stores / "news", use)


def test_with_everything_unloaded_the_base_model_answers_and_one_can_be_loaded_again(stores: Path) -> None:
    async def use(served: Served) -> None:
        await served.admin.UnloadDatastore(admin_pb2.UnloadDatastoreRequest(name="news"))
        assert await refused(served.generation.Generate(as_unary(asked(tokens=3)))) is grpc.StatusCode.NOT_FOUND
        options = generation_pb2.GenerationOptions(retrieval=generation_pb2.RetrievalOptions(off=True))
        options.stopping.max_new_tokens = 3
        response = await served.generation.Generate(generation_pb2.GenerateRequest(prompt=PROMPT, options=options))
        assert response.completions[0].completion_tokens > 0
        await served.admin.LoadDatastore(admin_pb2.LoadDatastoreRequest(name="law", path=str(stores / "law")))
        assert named(await served.retrieve()) == {"law"}

    with_server(stores / "news", use)


def test_opened_again_after_an_append_and_a_compaction(stores: Path, model: HFLanguageModel, tmp_path: Path) -> None:
    (tmp_path / "late.txt").write_text("The farmer found late news in the village before sunrise.\n")

    async def use(served: Served) -> None:
        running = served.stream("news")
        await running.more(3)
        first = (await served.served())["news"]
        await asyncio.to_thread(append, tmp_path / "late.txt", stores / "news", model)
        assert {neighbor.document_id for neighbor in await served.retrieve("news")}.isdisjoint({"late.txt"})
        reloaded = await served.admin.ReloadDatastore(admin_pb2.ReloadDatastoreRequest(name="news"))
        assert (reloaded.documents, reloaded.entries > first.entries) == (21, True)
        assert reloaded.fingerprint != first.fingerprint
        assert "late.txt" in {neighbor.document_id for neighbor in await served.retrieve("news")}
        seen = {neighbor.document_id for neighbors in await running.more(30) for neighbor in neighbors}
        assert "late.txt" not in seen, "it keeps what it began with"
        removed = await served.admin.RemoveDocuments(admin_pb2.RemoveDocumentsRequest(datastore="news", document_ids=["story-0003.txt"]))
        assert removed.documents == 1
        await asyncio.to_thread(compact, stores / "news", Silent(), Resources(), None)
        compacted = await served.admin.ReloadDatastore(admin_pb2.ReloadDatastoreRequest(name="news"))
        assert (compacted.documents, compacted.entries) == (20, reloaded.entries - removed.entries)
        assert "late.txt" in {neighbor.document_id for neighbor in await served.retrieve("news")}
        await running.more(10)

    with_server(stores / "news", use)


def test_a_running_request_never_again_gets_a_neighbour_of_a_removed_document(stores: Path) -> None:
    async def use(served: Served) -> None:
        await served.admin.LoadDatastore(admin_pb2.LoadDatastoreRequest(name="law", path=str(stores / "law")))
        alone, mixed, orphan = served.stream("news"), served.stream("news", "law"), served.stream("law")
        before = [neighbors for stream in (alone, mixed) for neighbors in await stream.more(40)]
        counted = Counter(n.document_id for neighbors in before for n in neighbors if n.datastore == "news")
        gone = {name for name, _ in counted.most_common(2)}
        # The name stands for another opening from here on, and what runs is told of the removal all the same.
        await served.admin.ReloadDatastore(admin_pb2.ReloadDatastoreRequest(name="news"))
        await orphan.more(1)
        removed = await served.admin.RemoveDocuments(admin_pb2.RemoveDocumentsRequest(datastore="news", document_ids=sorted(gone)))
        at = time.monotonic()
        assert removed.documents == 2
        assert removed.entries > 0
        for stream, each in ((alone, K), (mixed, K)):
            later = await stream.more(60, at + WITHIN_SECONDS)
            for neighbors in later:
                assert not gone & {n.document_id for n in neighbors if n.datastore == "news"}
                assert Counter(n.datastore for n in neighbors)["news"] == each
        assert not gone & {n.document_id for n in await served.retrieve("news")}
        info = (await served.served())["news"]
        assert info.documents == 18
        unknown = admin_pb2.RemoveDocumentsRequest(datastore="news", document_ids=["nobody"])
        assert await refused(served.admin.RemoveDocuments(unknown)) is grpc.StatusCode.NOT_FOUND

    with_server(stores / "news", use)


def test_an_idle_server_sees_what_others_removed(stores: Path) -> None:
    from knnlm.datastore.removal import remove_documents

    async def use(served: Served) -> None:
        before = (await served.served())["news"]
        removal = await asyncio.to_thread(remove_documents, stores / "news", ["story-0001.txt"])
        while (now := (await served.served())["news"]).documents == before.documents:
            await asyncio.sleep(0.02)
        assert (now.documents, now.entries) == (before.documents - 1, before.entries - removal.entries)

    with_server(stores / "news", use)


def test_one_that_does_not_fit_is_refused_and_nothing_changes(stores: Path, gpt2: HFLanguageModel, tmp_path: Path) -> None:
    other = text_folder(tmp_path / "text", tiny_corpus(2))
    build(other, tmp_path / "other", gpt2, index="exact")

    async def use(served: Served) -> None:
        for path in (tmp_path / "other", tmp_path / "nowhere"):
            request = admin_pb2.LoadDatastoreRequest(name="other", path=str(path))
            assert await refused(served.admin.LoadDatastore(request)) is grpc.StatusCode.FAILED_PRECONDITION
            reload = admin_pb2.ReloadDatastoreRequest(name="news", path=str(path))
            assert await refused(served.admin.ReloadDatastore(reload)) is grpc.StatusCode.FAILED_PRECONDITION
        assert list(await served.served()) == ["news"]
        assert named(await served.retrieve()) == {"news"}
        taken = admin_pb2.LoadDatastoreRequest(name="news", path=str(stores / "law"))
        assert await refused(served.admin.LoadDatastore(taken)) is grpc.StatusCode.ALREADY_EXISTS

    with_server(stores / "news", use)
