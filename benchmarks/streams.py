"""Streams of a server, as a client sees them: each call with its tokens, when they came, and how it ended.

The plain generated stub, nothing retried and nothing hidden, so that a call's end is what the server said.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from knnlm_server.pb import generation_pb2 as pb
from knnlm_server.pb.generation_pb2_grpc import GenerationServiceStub

OK = "OK"


@dataclass(frozen=True)
class Manner:
    """How a client behaves. It cancels after ``cancel_after`` tokens, gives the call ``deadline`` seconds, and waits
    ``pause`` seconds before it reads each event (None: none of these)."""

    cancel_after: int | None = None
    deadline: float | None = None
    pause: float | None = None


PATIENT = Manner()


@dataclass
class Answer:
    """What a call brought: ``sent`` and ``moments`` (of each message with tokens) in seconds of ``time.perf_counter``, the ids, the
    finish, and the status it ended with: its code's name, ErrorInfo's reason, whether RetryInfo came with it."""

    sent: float
    moments: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    finishes: list[pb.Finish] = field(default_factory=list)
    code: str = OK
    reason: str = ""
    message: str = ""
    says_when_to_retry: bool = False
    ended: float = 0.0

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.moments[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between messages with tokens: how long a reader waits for more."""
        return [later - earlier for earlier, later in zip(self.moments, self.moments[1:], strict=False)]

    def take(self, message: pb.StreamGenerateResponse) -> None:
        """Write a message down."""
        if message.tokens:
            self.moments.append(time.perf_counter())
        self.ids += [token.token_id for token in message.tokens]
        self.indices += [token.index for token in message.tokens]
        self.finishes += message.finishes

    def fail(self, error: grpc.aio.AioRpcError) -> None:
        """Write the status down that the call ended with."""
        self.code, self.message = error.code().name, error.details() or ""
        status = rpc_status.from_call(error)
        for packed in () if status is None else status.details:
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            if packed.Unpack(info):
                self.reason = info.reason
            self.says_when_to_retry |= packed.Unpack(retry)


def greedy(prompt: Sequence[int], tokens: int, *, retrieval: bool, neighbors: int = 0) -> pb.StreamGenerateRequest:
    """The request for exactly so many most probable tokens, with so many neighbours shown with each."""
    request = pb.StreamGenerateRequest()
    request.prompt.token_ids.ids.extend(prompt)
    request.options.sampling.temperature = 0.0
    request.options.stopping.max_new_tokens = tokens
    request.options.stopping.ignore_eos = True
    request.options.detail.neighbors = neighbors
    if not retrieval:
        request.options.retrieval.off = True
    return request


class Streams:
    """Calls to one server over one connection, from one event loop. ``options`` are gRPC's for the channel."""

    def __init__(self, address: str, options: Sequence[tuple[str, Any]] = ()) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=list(options))
        self._stub = GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]  # generated

    async def call(self, request: pb.StreamGenerateRequest, manner: Manner = PATIENT) -> Answer:
        """Make a call and read it to its end, whatever that is."""
        answer = Answer(time.perf_counter())
        call = self._stub.StreamGenerate(request, timeout=manner.deadline)
        try:
            while (event := await call.read()) is not grpc.aio.EOF:
                answer.take(event)
                if manner.cancel_after is not None and len(answer.ids) >= manner.cancel_after:
                    call.cancel()
                if manner.pause is not None:
                    await asyncio.sleep(manner.pause)
        except grpc.aio.AioRpcError as error:
            answer.fail(error)
        except asyncio.CancelledError:
            # The call was cancelled by this very client; a task that was is not caught here by mistake.
            if not call.cancelled():
                raise
            answer.code = grpc.StatusCode.CANCELLED.name
        answer.ended = time.perf_counter()
        return answer

    async def together(self, requests: Sequence[pb.StreamGenerateRequest]) -> list[Answer]:
        """All calls at once, to their ends."""
        return await asyncio.gather(*(self.call(request) for request in requests))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        await self._channel.close()
