"""Random and hostile messages and bytes: no INTERNAL, nothing in the log that is a bug, and a good request answered after each."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knnlm_server.admin_service import AdminService
from knnlm_server.app import Border
from knnlm_server.client import GenerationClient
from knnlm_server.listening import Place
from knnlm_server.pb import generation_pb2 as pb
from tests.hostile import ADMIN, ANSWERS, GENERATION, PREFACE, Attacker, Method, connected, conversation, likely_requests, messages, throw
from tests.server.conftest import WAIT_SECONDS, running
from tests.server.fake_engine import FakeAdmin, FakeEngine

GENERATE = next(method for method in GENERATION if method.path.endswith("/Generate"))
CALL = conversation(GENERATE, pb.GenerateRequest(prompt=pb.Input(text="hi")).SerializeToString())


@dataclass
class Target:
    """A server with both services, who attacks them, and a client that means well."""

    address: str
    generation: Attacker
    admin: Attacker
    client: GenerationClient

    def answers(self) -> None:
        """The server still does its work."""
        assert self.client.generate("hi", max_new_tokens=8, timeout=WAIT_SECONDS).text == "ab!"


class Complaints(logging.Handler):
    """Keeps what is logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(self.format(record))


@pytest.fixture(scope="module")
def complaints() -> Iterator[Complaints]:
    found = Complaints()
    logging.getLogger().addHandler(found)
    yield found
    logging.getLogger().removeHandler(found)


@pytest.fixture(scope="module")
def target(complaints: Complaints) -> Iterator[Target]:
    admin = AdminService(FakeAdmin(main=Path("main")))
    with ExitStack() as stack:
        server = stack.enter_context(running(FakeEngine(), border=Border(admin=Place("127.0.0.1", 0)), admin=admin)).server
        assert server.admin_place is not None
        attackers = [stack.enter_context(closing(Attacker(address))) for address in (server.address, server.admin_place.address)]
        yield Target(server.address, *attackers, stack.enter_context(GenerationClient(server.address)))
    assert not complaints.records


def attacker_of(target: Target, method: Method) -> Attacker:
    return target.admin if method in ADMIN else target.generation


@pytest.mark.parametrize("method", [*GENERATION, *ADMIN], ids=lambda method: method.path.rsplit("/", 1)[1])
@given(data=st.data())
def test_any_message_gets_a_right_status(target: Target, method: Method, data: st.DataObject) -> None:
    message = data.draw(messages(method.request) | likely_requests(method.request))
    assert attacker_of(target, method).send(method, message.SerializeToString()) in ANSWERS
    target.answers()


@pytest.mark.parametrize("method", [*GENERATION, *ADMIN], ids=lambda method: method.path.rsplit("/", 1)[1])
@given(data=st.data())
def test_any_bytes_as_a_message_get_a_right_status(target: Target, method: Method, data: st.DataObject) -> None:
    good = data.draw(messages(method.request)).SerializeToString()
    content = data.draw(st.binary(max_size=100) | st.just(good + b"\xff") | st.integers(0, len(good)).map(lambda end: good[:end]))
    assert attacker_of(target, method).send(method, content) in ANSWERS
    target.answers()


@given(
    service=st.sampled_from(["knnlm.v1.GenerationService", "knnlm.v2.GenerationService", "x", ""]), name=st.text("azAZ09._-%", max_size=20)
)
def test_methods_that_there_are_not_are_unimplemented(target: Target, service: str, name: str) -> None:
    method = Method(f"/{service}/{name}", None, False)
    assert target.generation.send(method, b"") is grpc.StatusCode.UNIMPLEMENTED
    target.answers()


@given(content=st.binary(max_size=400), preface=st.booleans())
def test_garbage_on_the_port(target: Target, content: bytes, preface: bool) -> None:
    throw(target.address, PREFACE * preface + content)
    target.answers()


@given(end=st.integers(0, len(CALL)))
def test_a_call_that_breaks_off(target: Target, end: int) -> None:
    throw(target.address, CALL[:end])
    target.answers()


@settings(max_examples=150)
@given(position=st.integers(len(PREFACE), len(CALL) - 1), value=st.integers(0, 255))
def test_a_call_with_a_wrong_byte(target: Target, position: int, value: int) -> None:
    throw(target.address, CALL[:position] + bytes([value]) + CALL[position + 1 :])
    target.answers()


@given(flag=st.integers(0, 255), length=st.sampled_from([0, 1, 3, 100, 2**16, 2**31, 2**32 - 1]))
def test_a_message_that_lies_about_its_length(target: Target, flag: int, length: int) -> None:
    throw(target.address, conversation(GENERATE, b"abc", prefix=struct.pack(">BI", flag, length)))
    target.answers()


@pytest.mark.parametrize(
    "content",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        PREFACE + b"\xff" * 3 + b"\x00" * 70_000,
    ],
    ids=["HTTP/1", "TLS", "a frame too large"],
)
def test_other_protocols_on_the_port(target: Target, content: bytes) -> None:
    throw(target.address, content)
    target.answers()


@pytest.mark.parametrize("method", [*GENERATION, *ADMIN], ids=lambda method: method.path.rsplit("/", 1)[1])
def test_a_message_that_is_too_large_is_refused(target: Target, method: Method) -> None:
    content = b"\x0a\x80\x80\x80\x10" + bytes(2**25)
    assert attacker_of(target, method).send(method, content) is grpc.StatusCode.RESOURCE_EXHAUSTED
    target.answers()


def test_connections_that_say_nothing_hold_up_nobody(target: Target) -> None:
    with ExitStack() as stack:
        for at in range(100):
            stack.enter_context(connected(target.address)).sendall(CALL[: at % len(CALL)])
        target.answers()
