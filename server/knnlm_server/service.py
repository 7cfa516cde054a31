"""The gRPC servicer: messages in, engine, messages out. Knows no torch, no port and no process.

Every request passes the gate, which counts those that run and turns away new ones while the server is stopping. A
cancelled call or an expired deadline cancels the handler's task, which closes the engine's generator at once.
"""

from __future__ import annotations

import asyncio
import functools
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

from knnlm_server import converters
from knnlm_server.engine_protocol import Engine
from knnlm_server.errors import ShuttingDown
from knnlm_server.pb import generation_pb2 as pb
from knnlm_server.pb.generation_pb2_grpc import GenerationServiceServicer
from knnlm_server.request_reader import RequestReader
from knnlm_server.sequence import FinishEvent, TokenEvent
from knnlm_server.status import status_of

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name


Handler = Callable[["GenerationService", Any, Any, str], Awaitable[Any]]


class RequestGate:
    """Counts requests as they run (``with gate:``); while closed, turns new ones away. Closed at first, for ``reason``."""

    def __init__(self, reason: str) -> None:
        self._closed: str | None = reason
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def open(self) -> None:
        """Let requests in."""
        self._closed = None

    def close(self, reason: str) -> None:
        """Turn requests away with a sentence; those that run go on."""
        self._closed = reason

    async def idle(self) -> None:
        """Return when no request runs."""
        await self._idle.wait()

    def __enter__(self) -> None:
        """Count a request in; raise :class:`ShuttingDown` while closed."""
        if self._closed is not None:
            raise ShuttingDown(self._closed)
        self._running += 1
        self._idle.clear()

    def __exit__(self, *_: object) -> None:
        """Count a request out."""
        self._running -= 1
        if self._running == 0:
            self._idle.set()


def _guarded(handler: Handler) -> Callable[[GenerationService, Any, Any], Awaitable[Any]]:
    """Let a request through the gate under an id of its own, and end its call with the right status when it fails."""

    @functools.wraps(handler)
    async def guarded(service: GenerationService, request: Any, context: Any) -> Any:
        request_id = uuid.uuid4().hex
        try:
            with service.gate:
                return await handler(service, request, context, request_id)
        except Exception as error:
            status = status_of(error, request_id)
            return await context.abort(status.code, status.details, status.trailing_metadata)

    return guarded


class GenerationService(GenerationServiceServicer):
    """``knnlm.v1.GenerationService`` over an engine."""

    def __init__(self, engine: Engine, gate: RequestGate) -> None:
        self.gate = gate
        self._engine = engine

    @property
    def _reader(self) -> RequestReader:
        # Made anew for each request: which datastores are served may change.
        return RequestReader(self._engine.tokenizer, self._engine.info)

    @_guarded
    async def Generate(self, request: pb.GenerateRequest, context: Any, request_id: str) -> pb.GenerateResponse:
        """Whole completions."""
        tokens: dict[int, list[TokenEvent]] = defaultdict(list)
        ends: list[FinishEvent] = []
        async with aclosing(self._events(request, request_id)) as events:
            async for event in events:
                if isinstance(event, FinishEvent):
                    ends.append(event)
                else:
                    tokens[event.sample].append(event)
        chosen = best(ends, max(1, request.options.num_samples))
        return pb.GenerateResponse(
            completions=[converters.completion_message(tokens[end.sample], end) for end in chosen], prompt_tokens=ends[0].prompt_tokens
        )

    @_guarded
    async def StreamGenerate(self, request: pb.StreamGenerateRequest, context: Any, request_id: str) -> None:
        """A completion, token by token. Writes through ``context``, so that the events are closed when it is cancelled."""
        async with aclosing(self._events(request, request_id)) as events:
            async for event in events:
                await context.write(_stream_message(event))

    @_guarded
    async def Score(self, request: pb.ScoreRequest, context: Any, request_id: str) -> pb.ScoreResponse:
        """Log-probabilities of given tokens."""
        score_request = await asyncio.to_thread(self._reader.score, request, request_id)
        return converters.score_message(score_request, await self._engine.score(score_request))

    @_guarded
    async def Retrieve(self, request: pb.RetrieveRequest, context: Any, request_id: str) -> pb.RetrieveResponse:
        """Neighbours of a context."""
        retrieve_request = await asyncio.to_thread(self._reader.retrieve, request, request_id)
        return converters.retrieve_message(retrieve_request, await self._engine.retrieve(retrieve_request))

    @_guarded
    async def Tokenize(self, request: pb.TokenizeRequest, context: Any, request_id: str) -> pb.TokenizeResponse:
        """Token ids and texts of a text."""
        return await asyncio.to_thread(self._tokenize, request)

    @_guarded
    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any, request_id: str) -> pb.DetokenizeResponse:
        """Text of token ids."""
        ids = self._reader.detokenize(request)
        return pb.DetokenizeResponse(text=await asyncio.to_thread(self._engine.tokenizer.decode, ids))

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Any) -> pb.GetServerInfoResponse:
        """What is served; answered also while the gate is closed."""
        return converters.server_info_message(self._engine.info)

    async def _events(
        self, request: pb.GenerateRequest | pb.StreamGenerateRequest, request_id: str
    ) -> AsyncGenerator[TokenEvent | FinishEvent, None]:
        # A long prompt takes long to tokenise; on a thread it holds up nobody else.
        generation = await asyncio.to_thread(self._reader.generation, request, request_id)
        async with aclosing(self._engine.generate(generation)) as events:
            async for event in events:
                yield event

    def _tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        text = self._engine.tokenizer.token_text
        return pb.TokenizeResponse(tokens=[pb.TokenizedToken(token_id=i, text=text(i)) for i in self._reader.tokenize(request)])


def best(ends: Sequence[FinishEvent], count: int) -> list[FinishEvent]:
    """The ``count`` completions of the highest mean log-probability, best first; all in their order where that is not known."""
    if len(ends) <= count:
        return sorted(ends, key=lambda end: end.sample)
    return sorted(ends, key=lambda end: (-(end.mean_log_prob or 0.0), end.sample))[:count]


def _stream_message(event: TokenEvent | FinishEvent) -> pb.StreamGenerateResponse:
    if isinstance(event, FinishEvent):
        return pb.StreamGenerateResponse(finish=converters.finish_message(event))
    return pb.StreamGenerateResponse(token=converters.token_message(event))
