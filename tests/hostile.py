"""Messages and bytes that no well-meaning client sends, and what a server may answer to them."""

from __future__ import annotations

import math
import socket
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from hpack import Encoder
from hyperframe.frame import DataFrame, HeadersFrame, SettingsFrame
from hypothesis import strategies as st

from knnlm_server.pb import admin_pb2, generation_pb2

WAIT_SECONDS = 60.0
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

# What a request that is wrong may be answered; INTERNAL and UNKNOWN are bugs, and a deadline is an engine that hangs.
ANSWERS = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}

doubles = st.sampled_from([0.0, 0.5, 1.0, 1e-6, 1e6, 100.0, -1.0, 5e-324, 1.7e308, math.nan, math.inf, -math.inf]) | st.floats()
texts = st.sampled_from(["", "a", "main", "other", "default", " ", "\0", "é\U0001f600", "a" * 200, "\u202e", "../..", "x=y", "<s>"])
SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_DOUBLE: doubles,
    FieldDescriptor.TYPE_UINT32: st.sampled_from([0, 1, 2, 3, 5, 50, 256, 257, 2**31 - 1, 2**31, 2**32 - 1]),
    FieldDescriptor.TYPE_UINT64: st.sampled_from([0, 1, 2**63 - 1, 2**63, 2**64 - 1]),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_STRING: texts | st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
}


@dataclass(frozen=True)
class Method:
    """A method of a service: its path, what it takes, whether it streams."""

    path: str
    request: Any
    streams: bool


def methods(file: Any) -> list[Method]:
    """Every method of the services of a proto file."""
    return [
        Method(f"/{service.full_name}/{method.name}", GetMessageClass(method.input_type), method.server_streaming)
        for service in file.services_by_name.values()
        for method in service.methods
    ]


GENERATION, ADMIN = methods(generation_pb2.DESCRIPTOR), methods(admin_pb2.DESCRIPTOR)


@st.composite
def messages(draw: Any, kind: Any) -> Any:
    """A message with any of its fields set to anything that fits their types; maps, lists and messages in it alike."""
    message = kind()
    for field in kind.DESCRIPTOR.fields:
        if draw(st.integers(0, 2)) == 0:
            _set(draw, message, field)
    return message


@st.composite
def likely_requests(draw: Any, kind: Any) -> Any:
    """A message of which little is wrong, so that it gets beyond the first check: two of its fields are drawn freely."""
    message = kind()
    for name in {"prompt", "input", "context"} & set(kind.DESCRIPTOR.fields_by_name):
        getattr(message, name).text = draw(st.sampled_from(["ab", "once upon a time", "é" * 8]))
    if "options" in kind.DESCRIPTOR.fields_by_name:
        message.options.stopping.max_new_tokens = draw(st.integers(1, 4))
    for _ in range(2):
        _set_one(draw, message)
    return message


def _set_one(draw: Any, message: Any) -> None:
    """Set one field, however deep it lies."""
    fields = [field for field in message.DESCRIPTOR.fields if field.name not in ("prompt", "input", "context")]
    if not fields:
        return
    field = draw(st.sampled_from(fields))
    if field.message_type is None or field.is_repeated:
        _set(draw, message, field)
    else:
        _set_one(draw, getattr(message, field.name))


def _set(draw: Any, message: Any, field: Any) -> None:
    if field.message_type is None:
        value = SCALARS[field.type]
        if field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(value, max_size=4)))
        else:
            setattr(message, field.name, draw(value))
    elif field.message_type.GetOptions().map_entry:
        key, value = (SCALARS[field.message_type.fields_by_name[name].type] for name in ("key", "value"))
        getattr(message, field.name).update(draw(st.dictionaries(key, value, max_size=4)))
    elif field.is_repeated:
        getattr(message, field.name).extend(draw(st.lists(messages(GetMessageClass(field.message_type)), max_size=3)))
    else:
        getattr(message, field.name).CopyFrom(draw(messages(GetMessageClass(field.message_type))))
        getattr(message, field.name).SetInParent()


class Attacker:
    """Sends bytes as requests and tells how the server answered."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._channel = grpc.insecure_channel(target, options=[("grpc.max_send_message_length", -1), ("grpc.enable_retries", 0)])

    def send(self, method: Method, content: bytes) -> grpc.StatusCode:
        """Status with which a call ended."""
        make = self._channel.unary_stream if method.streams else self._channel.unary_unary
        answer = make(method.path)(content, timeout=WAIT_SECONDS) if method.streams else None
        try:
            if answer is None:
                make(method.path)(content, timeout=WAIT_SECONDS)
            else:
                list(answer)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()  # type: ignore[attr-defined]
            return code
        return grpc.StatusCode.OK

    def close(self) -> None:
        self._channel.close()


@contextmanager
def connected(target: str) -> Iterator[socket.socket]:
    """A bare connection."""
    host, port = target.rsplit(":", 1)
    with closing(socket.create_connection((host, int(port)), timeout=WAIT_SECONDS)) as connection:
        yield connection


def throw(target: str, content: bytes) -> None:
    """Send bytes over a connection of their own; the server may hang up at any of them."""
    with connected(target) as connection, suppress(OSError):
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)


def conversation(method: Method, content: bytes, prefix: bytes | None = None) -> bytes:
    """What a client sends for one call; ``prefix``: the five bytes before its message, made of it where None."""
    headers = [(":method", "POST"), (":scheme", "http"), (":path", method.path), (":authority", "x"), ("te", "trailers")]
    framed = (struct.pack(">BI", 0, len(content)) if prefix is None else prefix) + content
    frames = [
        SettingsFrame(0),
        HeadersFrame(1, Encoder().encode([*headers, ("content-type", "application/grpc")]), flags=["END_HEADERS"]),
        DataFrame(1, framed, flags=["END_STREAM"]),
    ]
    return PREFACE + b"".join(frame.serialize() for frame in frames)
