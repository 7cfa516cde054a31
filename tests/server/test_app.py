"""The server's life: starting, draining, a port in use, and signals to a process."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from knnlm.errors import ModelError
from knnlm_server.app import GenerationServer
from knnlm_server.client import GenerationClient, ServerUnavailable
from knnlm_server.errors import CannotListen
from knnlm_server.listening import Place
from knnlm_server.sequence import FinishEvent, TokenEvent
from tests.server.conftest import WAIT_SECONDS, RunningServer
from tests.server.fake_engine import FakeEngine

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
from tests.server.fake_engine import FakeEngine

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
