"""The server's life: starting, draining, a port in use, and signals to a process."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from knnlm.errors import InvalidInput, ModelError
from knnlm_server.access import OpenAccess
from knnlm_server.app import Border, GenerationServer, check, ensure_reachable_as_meant, serve
from knnlm_server.client import GenerationClient, ServerUnavailable
from knnlm_server.errors import CannotListen, EngineFailed
from knnlm_server.listening import Place
from knnlm_server.pb import generation_pb2 as pb
from knnlm_server.pb.generation_pb2_grpc import GenerationServiceStub
from knnlm_server.sequence import FinishEvent, GenerationRequest, TokenEvent
from knnlm_server.service import SERVICE_NAME
from knnlm_server.tls import TLS, TLSFiles
from tests.server.conftest import WAIT_SECONDS, RunningServer
from tests.server.fake_engine import LIMITS, FakeEngine

ROOT = Path(__file__).resolve().parents[2]
Start = Callable[[FakeEngine], RunningServer]


def is_serving(target: str) -> bool:
    with grpc.insecure_channel(target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        status: int = health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_SECONDS).status
    return status == health_pb2.HealthCheckResponse.SERVING


def wait_until_not_serving(target: str) -> None:
    while is_serving(target):
        pass


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def test_a_free_port_is_taken_and_reported(start_server: Start) -> None:
    server = start_server(FakeEngine()).server
    assert server.port > 0
    assert server.address == f"127.0.0.1:{server.port}"


def test_a_port_in_use_is_refused_in_one_sentence() -> None:
    with taken_port() as port, pytest.raises(CannotListen, match=f"Port {port} on 127.0.0.1 is in use"):
        asyncio.run(GenerationServer(FakeEngine(), port=port).start())


def test_a_second_server_on_the_same_port_is_refused(start_server: Start) -> None:
    port = start_server(FakeEngine()).server.port
    with pytest.raises(CannotListen, match="in use"):
        asyncio.run(GenerationServer(FakeEngine(), port=port).start())


def test_an_unknown_host_is_refused() -> None:
    with pytest.raises(CannotListen, match="host is unknown"):
        Place("no.such.host.invalid", 0).ensure_free()


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(CannotListen, match=r"192\.0\.2\.1 is no address of this machine"):
        Place("192.0.2.1", 0).ensure_free()


def test_while_the_engine_starts_requests_are_turned_away_and_health_says_so() -> None:
    class SlowEngine(FakeEngine):
        def start(self) -> None:
            self.starting.set()
            assert self.go_on.wait(WAIT_SECONDS)
            super().start()

    engine = SlowEngine()
    engine.starting, engine.go_on = threading.Event(), threading.Event()  # type: ignore[attr-defined]

    async def life() -> None:
        server = GenerationServer(engine)
        start = asyncio.create_task(server.start())
        await asyncio.to_thread(engine.starting.wait, WAIT_SECONDS)  # type: ignore[attr-defined]
        assert not await asyncio.to_thread(is_serving, server.address)
        with GenerationClient(server.address) as client:
            with pytest.raises(ServerUnavailable, match="starting"):
                await asyncio.to_thread(client.generate, "hi", max_new_tokens=8)
            engine.go_on.set()  # type: ignore[attr-defined]
            await start
            await asyncio.to_thread(client.wait_until_ready, WAIT_SECONDS)
        await server.stop()

    asyncio.run(life())


def test_an_engine_that_does_not_start_frees_the_port() -> None:
    class BrokenEngine(FakeEngine):
        def start(self) -> None:
            raise ModelError("does not fit into memory")

    server = GenerationServer(BrokenEngine())
    with pytest.raises(ModelError):
        asyncio.run(server.start())
    Place("127.0.0.1", server.port).ensure_free()


def test_draining_lets_running_requests_finish_and_refuses_new_ones(start_server: Start) -> None:
    engine = FakeEngine(["a", "b"], hold_after=1)
    server = start_server(engine)
    with GenerationClient(server.target) as client:
        events = client.stream("hi", max_new_tokens=8)
        next(events)
        stopped = server.submit(server.server.stop(grace=WAIT_SECONDS))
        wait_until_not_serving(server.target)
        with pytest.raises(ServerUnavailable, match="being stopped") as caught:
            client.generate("hi", max_new_tokens=8)
        assert caught.value.reason == "SHUTTING_DOWN"
        assert client.server_info().model == "tiny"
        assert not engine.stopped
        engine.release()
        assert [type(event) for event in events] == [TokenEvent, FinishEvent]
        stopped.result(WAIT_SECONDS)
    assert engine.stopped


def test_requests_that_outlast_the_grace_period_are_ended(start_server: Start) -> None:
    engine = FakeEngine(["a", "b"], hold_after=1)
    server = start_server(engine)
    with GenerationClient(server.target) as client:
        events = client.stream("hi", max_new_tokens=8)
        next(events)
        server.submit(server.server.stop(grace=0)).result(WAIT_SECONDS)
        with pytest.raises(ServerUnavailable):
            list(events)
    assert engine.closed.wait(WAIT_SECONDS)


PROGRAM = """
import asyncio, sys, threading
from knnlm_server.app import serve
from tests.server.fake_engine import LIMITS, FakeEngine

def announce(server):
    print(f"listening on {server.address}", flush=True)
    threading.Thread(target=lambda: [engine.release() for _ in sys.stdin], daemon=True).start()

engine = FakeEngine(["a", "b"], hold_after=1)
asyncio.run(serve(lambda: engine, "127.0.0.1", 0, grace=60, on_ready=announce))
"""


@contextmanager
def process() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own; a line on its standard input releases what its engine holds."""
    path = ":".join(str(ROOT / part) for part in ("", "server"))
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": path, "PATH": ""},
    )
    assert child.stdin is not None
    assert child.stdout is not None
    with child:
        try:
            yield child, child.stdout.readline().removeprefix("listening on ").strip()
        finally:
            child.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_running_request_finish_and_ends_with_status_0(number: signal.Signals) -> None:
    with process() as (child, target), GenerationClient(target) as client:
        events = client.stream("hi", max_new_tokens=8)
        next(events)
        child.send_signal(number)
        wait_until_not_serving(target)
        assert child.stdin is not None
        print(file=child.stdin, flush=True)
        assert [type(event) for event in events] == [TokenEvent, FinishEvent]
        assert child.wait(WAIT_SECONDS) == 0


def test_a_second_signal_ends_the_process_at_once() -> None:
    with process() as (child, target), GenerationClient(target) as client:
        next(client.stream("hi", max_new_tokens=8))
        held = client.stream("hi", max_new_tokens=8)
        next(held)
        child.send_signal(signal.SIGTERM)
        wait_until_not_serving(target)
        child.send_signal(signal.SIGTERM)
        assert child.wait(WAIT_SECONDS) == -signal.SIGTERM
        with pytest.raises(ServerUnavailable):
            list(held)


def ensure(host: str, **options: Any) -> None:
    ensure_reachable_as_meant(Place(host, 0), Border(**options))


class Tokens(OpenAccess):
    asks_for_tokens = True


@pytest.fixture
def tls(tmp_path: Path) -> TLS:
    certificate = trustme.CA().issue_cert("localhost")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    return TLS(TLSFiles(tmp_path / "cert.pem", tmp_path / "key.pem"))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_on_this_machine_alone_there_is_no_warning(host: str, caplog: pytest.LogCaptureFixture) -> None:
    ensure(host)
    assert not caplog.records


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_open_server_on_a_network_is_warned_of_with_what_to_do(host: str, caplog: pytest.LogCaptureFixture) -> None:
    ensure(host)
    who, clear = [record.getMessage() for record in caplog.records]
    assert "anyone who reaches" in who
    assert "--tokens or --tls-client-ca" in who
    assert "in the clear; give --tls-cert and --tls-key" in clear


def test_tokens_in_the_clear_and_tls_without_tokens_are_each_warned_of(caplog: pytest.LogCaptureFixture, tls: TLS) -> None:
    ensure("0.0.0.0", access=Tokens())
    ensure("0.0.0.0", tls=tls)
    assert ["clear" in record.getMessage() for record in caplog.records] == [True, False]
    caplog.clear()
    ensure("0.0.0.0", access=Tokens(), tls=tls)
    assert not caplog.records


def test_an_admin_port_that_is_open_to_a_network_is_refused(tls: TLS) -> None:
    for options in ({}, {"tls": tls}):
        with pytest.raises(InvalidInput, match=r"--tokens or --tls-client-ca, or use 127\.0\.0\.1"):
            ensure("127.0.0.1", admin=Place("0.0.0.0", 0, "--admin-port"), **options)
    ensure("127.0.0.1", admin=Place("0.0.0.0", 0, "--admin-port"), access=Tokens())


@pytest.mark.parametrize(("option", "place"), [("--admin-port", "admin"), ("--metrics-port", "metrics_place")])
def test_every_port_is_looked_at_before_the_engine_is_made(option: str, place: str) -> None:
    def engine() -> FakeEngine:
        raise AssertionError("the engine was made")

    with taken_port() as port:
        border = Border(**{place: Place("127.0.0.1", port, option)})  # type: ignore[arg-type]
        with pytest.raises(CannotListen, match=f"Port {port} on 127.0.0.1 is in use; choose another with {option}"):
            asyncio.run(serve(engine, "127.0.0.1", 0, border=border, on_ready=print))


@pytest.mark.parametrize(
    ("main", "places", "words"),
    [
        ("127.0.0.1", {"metrics_place": Place("127.0.0.1", 1, "--metrics-port")}, "metrics_port: is 1, which is --port too"),
        ("0.0.0.0", {"metrics_place": Place("127.0.0.1", 1, "--metrics-port")}, "metrics_port: is 1, which is --port too"),
        ("127.0.0.1", {"admin": Place("localhost", 1, "--admin-port")}, "admin_port: is 1, which is --port too"),
        (
            "127.0.0.1",
            {"admin": Place("127.0.0.1", 2, "--admin-port"), "metrics_place": Place("127.0.0.1", 2, "--metrics-port")},
            "metrics_port: is 2, which is --admin-port too",
        ),
    ],
)
def test_one_port_for_two_purposes_is_refused_before_the_engine_is_made(main: str, places: dict[str, Place], words: str) -> None:
    def engine() -> FakeEngine:
        raise AssertionError("the engine was made")

    with taken_port() as port, taken_port() as other:
        ports = {1: port, 2: other}
    border = Border(**{name: replace(place, port=ports[place.port]) for name, place in places.items()})  # type: ignore[arg-type]
    for number, had in ports.items():
        words = words.replace(f"is {number},", f"is {had},")
    with pytest.raises(InvalidInput, match=words):
        asyncio.run(serve(engine, main, port, border=border, on_ready=print))


def test_one_port_on_two_addresses_is_no_collision() -> None:
    with taken_port() as port:
        pass
    Place("127.0.0.2", port).ensure_apart(Place("127.0.0.1", port))
    Place("127.0.0.1", 0).ensure_apart(Place("127.0.0.1", 0))


def test_a_port_that_is_taken_meanwhile_frees_those_that_were_had() -> None:
    engine = FakeEngine()

    async def life() -> int:
        with taken_port() as port:
            server = GenerationServer(engine, border=Border(metrics_place=Place("127.0.0.1", port)))
            with pytest.raises(CannotListen, match="--metrics-port"):
                await server.start()
        return server.port

    Place("127.0.0.1", asyncio.run(life())).ensure_free()
    assert not engine.started


def test_a_server_whose_engine_ends_by_itself_says_so_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()

    async def life() -> None:
        server = GenerationServer(engine)
        await server.start()
        assert await asyncio.to_thread(is_serving, server.address)
        engine.broken = True
        await asyncio.wait_for(server.failed.wait(), WAIT_SECONDS)
        assert not await asyncio.to_thread(is_serving, server.address)
        with GenerationClient(server.address) as client, pytest.raises(ServerUnavailable, match="engine has failed"):
            await asyncio.to_thread(client.generate, "hi", max_new_tokens=8)
        await server.stop()

    asyncio.run(life())
    assert "the engine has ended" in caplog.text


def test_health_watch_tells_each_service_from_start_to_drain(start_server: Start) -> None:
    server = start_server(FakeEngine())
    with grpc.insecure_channel(server.target) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME), timeout=WAIT_SECONDS)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        stopped = server.submit(server.server.stop(grace=WAIT_SECONDS))
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        stopped.result(WAIT_SECONDS)


def test_more_calls_than_the_server_takes_on_are_told_when_to_come_again(start_server: Start) -> None:
    engine = FakeEngine(["a", "b"], hold_after=1, limits=replace(LIMITS, max_concurrent=1, max_waiting_requests=1))
    server = start_server(engine)
    options = pb.GenerationOptions(stopping=pb.StoppingOptions(max_new_tokens=8))
    asked = pb.StreamGenerateRequest(prompt=pb.Input(text="hi"), options=options)
    with grpc.insecure_channel(server.target) as channel:
        stub = GenerationServiceStub(channel)
        held = [stub.StreamGenerate(asked) for _ in range(2)]
        for events in held:
            next(events)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.StreamGenerate(asked))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
        assert len(engine.requests) == 2
        engine.release()
        assert [len(list(events)) for events in held] == [2, 2]
        assert len(list(stub.StreamGenerate(asked))) == 3


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("access", [OpenAccess(), Tokens()])
def test_check_answers_one_request_through_the_servers_own_port(access: OpenAccess, encrypted: bool, tls: TLS) -> None:
    answers: list[tuple[int, int]] = []
    engine = FakeEngine(["a"])

    def answered(server: GenerationServer, tokens: int, seconds: float) -> None:
        answers.append((server.port, tokens))

    asyncio.run(check(lambda: engine, "127.0.0.1", 0, border=Border(access=access, tls=tls if encrypted else None), on_answer=answered))
    ((port, tokens),) = answers
    assert tokens == 1
    assert [request.tenant for request in engine.requests] == ["check"]
    assert engine.stopped
    Place("127.0.0.1", port).ensure_free()


def test_check_fails_where_the_server_does_not_answer() -> None:
    class Failing(FakeEngine):
        async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent | FinishEvent, None]:
            raise ModelError("The model has no weights.")
            yield  # a generator

    engine = Failing()
    with pytest.raises(EngineFailed, match=r"FAILED_PRECONDITION: The model has no weights\."):
        asyncio.run(check(lambda: engine, "127.0.0.1", 0, on_answer=print))
    assert engine.stopped
