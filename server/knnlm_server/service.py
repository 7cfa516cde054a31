"""The gRPC servicer: messages in, engine, messages out. Knows no torch, no port and no process.

Every request passes the gate, which counts those that run and turns away new ones while the server is stopping or has
more than it can take on. A cancelled call or an expired deadline cancels the handler's task, which closes the engine's
generator at once. Errors are raised as they are; ``calls.py`` makes statuses of them.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from knnlm_server import converters
from knnlm_server.calls import current_call
from knnlm_server.engine_protocol import Engine
from knnlm_server.errors import QueueFull, ReadTooSlowly, ShuttingDown
from knnlm_server.metrics import Metrics
from knnlm_server.pb import generation_pb2 as pb
from knnlm_server.pb.generation_pb2_grpc import GenerationServiceServicer
from knnlm_server.request_reader import RequestReader
from knnlm_server.sequence import FinishEvent, GenerationRequest, TokenEvent

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name
STALL_SECONDS = 30.0
# Twenty messages a second read as a flow; a model that takes longer for a token sends each in a message of its own.
STREAM_INTERVAL = 0.05

Handler = Callable[["GenerationService", Any, Any], Awaitable[Any]]

_log = logging.getLogger(__name__)


class RequestGate:
    """Counts requests as they run (``with gate:``) and turns new ones away while closed or full. Closed at first, for ``reason``.

    ``room``: requests that may run or wait at the same time. It bounds what is held in memory before the engine knows of
    it; the engine's queue has narrower bounds of its own.
    """

    def __init__(self, reason: str, room: int) -> None:
        self._closed: str | None = reason
        self._room = room
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
        """Count a request in; raise :class:`ShuttingDown` while closed and :class:`QueueFull` while full."""
        if self._closed is not None:
            raise ShuttingDown(self._closed)
        if self._running >= self._room:
            raise QueueFull(f"{self._running} requests are running or waiting, and the server takes no more; try again soon.")
        self._running += 1
        self._idle.clear()

    def __exit__(self, *_: object) -> None:
        """Count a request out."""
        self._running -= 1
        if self._running == 0:
            self._idle.set()


def _gated(handler: Handler) -> Handler:
    """Let a request through the gate."""

    @functools.wraps(handler)
    async def gated(service: GenerationService, request: Any, context: Any) -> Any:
        with service.gate:
            return await handler(service, request, context)

    return gated


class GenerationService(GenerationServiceServicer):
    """``knnlm.v1.GenerationService`` over an engine.

    ``settings``: the resolved configuration, for GetServerInfo. ``stream_interval``: seconds that a message of a stream is
    apart from the last one at least. ``stall_seconds``: how long a client may leave a stream's next message unread.
    ``log_prompts``: whether prompts go to the log.
    """

    def __init__(
        self,
        engine: Engine,
        gate: RequestGate,
        metrics: Metrics,
        *,
        settings: dict[str, str] | None = None,
        stream_interval: float = STREAM_INTERVAL,
        stall_seconds: float = STALL_SECONDS,
        log_prompts: bool = False,
    ) -> None:
        self.gate = gate
        self._engine, self._metrics = engine, metrics
        self._settings, self._log_prompts = settings or {}, log_prompts
        self._stream_interval, self._stall_seconds = stream_interval, stall_seconds

    @property
    def _reader(self) -> RequestReader:
        # Made anew for each request: which datastores are served may change.
        return RequestReader(self._engine.tokenizer, self._engine.info)

    @_gated
    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        """Whole completions."""
        tokens: dict[int, list[pb.GeneratedToken]] = defaultdict(list)
        ends: list[FinishEvent] = []
        async with aclosing(self._events(request)) as batches:
            async for batch in batches:
                for event in batch:
                    if isinstance(event, FinishEvent):
                        ends.append(event)
                    else:
                        # At once: thousands with all details in one piece would hold up every other stream for seconds.
                        tokens[event.sample].append(converters.token_message(event))
        chosen = best(ends, max(1, request.options.num_samples))
        return pb.GenerateResponse(
            completions=[converters.completion_message(tokens[end.sample], end) for end in chosen], prompt_tokens=ends[0].prompt_tokens
        )

    @_gated
    async def StreamGenerate(self, request: pb.StreamGenerateRequest, context: Any) -> None:
        """Completions as they grow. Writes through ``context``, so that the events are closed when it is cancelled."""
        async with aclosing(self._events(request)) as batches:
            async for batch in batches:
                for message in converters.stream_messages(batch):
                    await self._send(context, message)

    @_gated
    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:
        """Log-probabilities of given tokens."""
        call = current_call()
        score_request = await asyncio.to_thread(self._reader.score, request, call.key)
        call.prompt_tokens = len(score_request.tokens)
        return converters.score_message(score_request, await self._engine.score(score_request))

    @_gated
    async def Retrieve(self, request: pb.RetrieveRequest, context: Any) -> pb.RetrieveResponse:
        """Neighbours of a context."""
        call = current_call()
        retrieve_request = await asyncio.to_thread(self._reader.retrieve, request, call.key, tenant=call.caller.name)
        call.prompt_tokens = len(retrieve_request.tokens)
        return converters.retrieve_message(retrieve_request, await self._engine.retrieve(retrieve_request))

    @_gated
    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        """Token ids and texts of a text."""
        return await asyncio.to_thread(self._tokenize, request)

    @_gated
    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        """Text of token ids."""
        return await asyncio.to_thread(self._detokenize, request)

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Any) -> pb.GetServerInfoResponse:
        """What is served; answered also while the gate is closed."""
        info = self._engine.info
        # What the engine made of a setting says more than that it was not set.
        return converters.server_info_message(replace(info, settings=self._settings | info.settings))

    async def _events(self, request: pb.GenerateRequest | pb.StreamGenerateRequest) -> AsyncGenerator[list[TokenEvent | FinishEvent], None]:
        # A long prompt takes long to tokenise; on a thread it holds up nobody else.
        generation = await asyncio.to_thread(self._generation, request)
        call, arrived = current_call(), self._metrics.watch(generation)
        call.prompt_tokens = len(generation.prompt)
        async with aclosing(self._engine.stream(generation, self._stream_interval)) as batches:
            async for batch in batches:
                for arrival in batch:
                    arrived(arrival)
                    call.completion_tokens += isinstance(arrival.event, TokenEvent)
                yield [arrival.event for arrival in batch]

    def _generation(self, request: pb.GenerateRequest | pb.StreamGenerateRequest) -> GenerationRequest:
        call = current_call()
        generation = self._reader.generation(request, call.key, tenant=call.caller.name)
        if self._log_prompts:
            _log.info("prompt: %s", self._engine.tokenizer.decode(generation.prompt))
        return replace(generation, arrived=call.began)

    async def _send(self, context: Any, message: pb.StreamGenerateResponse) -> None:
        try:
            async with asyncio.timeout(self._stall_seconds):
                await context.write(message)
        except TimeoutError as error:
            raise ReadTooSlowly(
                f"The client has read nothing of this stream for {self._stall_seconds:g} seconds, so it was ended; read them as they come."
            ) from error

    def _tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        tokens = self._reader.tokenize(request)
        texts = {token: self._engine.tokenizer.token_text(token) for token in set(tokens)}
        return pb.TokenizeResponse(tokens=[pb.TokenizedToken(token_id=token, text=texts[token]) for token in tokens])

    def _detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        return pb.DetokenizeResponse(text=self._engine.tokenizer.decode(self._reader.detokenize(request)))


def best(ends: Sequence[FinishEvent], count: int) -> list[FinishEvent]:
    """The ``count`` completions of the highest mean log-probability, best first; all in their order where that is not known."""
    if len(ends) <= count:
        return sorted(ends, key=lambda end: end.sample)
    return sorted(ends, key=lambda end: (-(end.mean_log_prob or 0.0), end.sample))[:count]
