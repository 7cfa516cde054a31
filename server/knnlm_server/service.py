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
from knnlm_server.errors import QueueFull, ReadTooSlowly
from knnlm_server.metrics import Metrics
from knnlm_server.pb import generation_pb2 as pb
from knnlm_server.pb.generation_pb2_grpc import GenerationServiceServicer
from knnlm_server.reading_lanes import ReadingLanes
from knnlm_server.request_gate import RequestGate
from knnlm_server.request_reader import RequestReader
from knnlm_server.sequence import FinishEvent, GenerationRequest, TokenEvent

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name
STALL_SECONDS = 30.0

Handler = Callable[["GenerationService", Any, Any], Awaitable[Any]]

_log = logging.getLogger(__name__)


def _gated(handler: Handler) -> Handler:
    """Let a request through the gate, which says when to come again where there is no room for it, here or further in."""

    @functools.wraps(handler)
    async def gated(service: GenerationService, request: Any, context: Any) -> Any:
        try:
            with service.gate.request(current_call().caller.name):
                return await handler(service, request, context)
        except QueueFull as error:
            error.retry_seconds = service.gate.retry_seconds
            raise

    return gated


class GenerationService(GenerationServiceServicer):
    """``knnlm.v1.GenerationService`` over an engine.

    ``settings``: the resolved configuration, for GetServerInfo. ``stall_seconds``: how long a client may leave a stream's
    next event unread. ``log_prompts``: whether prompts go to the log. ``reading``: where requests are read, closed by whoever
    made it.
    """

    def __init__(
        self,
        engine: Engine,
        gate: RequestGate,
        metrics: Metrics,
        *,
        settings: dict[str, str] | None = None,
        stall_seconds: float = STALL_SECONDS,
        log_prompts: bool = False,
        reading: ReadingLanes | None = None,
    ) -> None:
        self.gate = gate
        self._engine, self._metrics, self._reading = engine, metrics, reading or ReadingLanes()
        self._settings, self._stall_seconds, self._log_prompts = settings or {}, stall_seconds, log_prompts

    @property
    def _reader(self) -> RequestReader:
        # Made anew for each request: which datastores are served may change.
        return RequestReader(self._engine.tokenizer, self._engine.info)

    @_gated
    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        """Whole completions."""
        tokens: dict[int, list[pb.GeneratedToken]] = defaultdict(list)
        ends: list[FinishEvent] = []
        async with aclosing(self._events(request)) as events:
            async for event in events:
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
        """Completions, token by token. Writes through ``context``, so that the events are closed when it is cancelled."""
        async with aclosing(self._events(request)) as events:
            async for event in events:
                await self._send(context, _stream_message(event))

    @_gated
    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:
        """Log-probabilities of given tokens."""
        call = current_call()
        score_request = await self._reading.read(request, lambda: self._reader.score(request, call.key, tenant=call.caller.name))
        call.prompt_tokens = len(score_request.tokens)
        result = await self._engine.score(score_request)
        self.gate.note_end()
        return converters.score_message(score_request, result)

    @_gated
    async def Retrieve(self, request: pb.RetrieveRequest, context: Any) -> pb.RetrieveResponse:
        """Neighbours of a context."""
        call = current_call()
        retrieve_request = await self._reading.read(request, lambda: self._reader.retrieve(request, call.key, tenant=call.caller.name))
        call.prompt_tokens = len(retrieve_request.tokens)
        result = await self._engine.retrieve(retrieve_request)
        self.gate.note_end()
        return converters.retrieve_message(retrieve_request, result)

    @_gated
    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        """Token ids and texts of a text."""
        return await self._reading.read(request, lambda: self._tokenize(request))

    @_gated
    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        """Text of token ids."""
        return await self._reading.read(request, lambda: self._detokenize(request))

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Any) -> pb.GetServerInfoResponse:
        """What is served; answered also while the gate is closed."""
        info = self._engine.info
        # What the engine made of a setting says more than that it was not set.
        return converters.server_info_message(replace(info, settings=self._settings | info.settings))

    async def _events(self, request: pb.GenerateRequest | pb.StreamGenerateRequest) -> AsyncGenerator[TokenEvent | FinishEvent, None]:
        generation = await self._reading.read(request, lambda: self._generation(request))
        call, arrived = current_call(), self._metrics.watch(generation)
        call.prompt_tokens = len(generation.prompt)
        async with aclosing(self._engine.generate(generation)) as events:
            async for event in events:
                arrived(event)
                call.completion_tokens += isinstance(event, TokenEvent)
                yield event
        self.gate.note_end()

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


def _stream_message(event: TokenEvent | FinishEvent) -> pb.StreamGenerateResponse:
    if isinstance(event, FinishEvent):
        return pb.StreamGenerateResponse(finish=converters.finish_message(event))
    return pb.StreamGenerateResponse(token=converters.token_message(event))
