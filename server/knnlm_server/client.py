"""Clients of a generation server, for threads and for asyncio. Import no torch.

::

    with GenerationClient("localhost:50051") as client:
        print(client.generate("The try statement", max_new_tokens=64, temperature=0).text)

Errors::

    KNNLMError
    ├── InvalidInput              an option can't be put into a request (names the field)
    └── RequestFailed             the server refused or failed: code, message, reason
        ├── FieldsRefused         it can't use fields of the request (an InvalidInput as well)
        └── ServerUnavailable     no server answers, or it is starting or being stopped
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from knnlm_server import client_calls as calls
from knnlm_server.client_calls import Call, ResultT
from knnlm_server.client_channel import Connection, Retries, Tls
from knnlm_server.client_errors import FieldsRefused, FieldViolation, RequestFailed, ServerUnavailable, failure_of, not_ready
from knnlm_server.client_options import Datastores, GenerationOptions, Prompt, RetrievalOptions, RetrieveOptions
from knnlm_server.client_results import Completion, Retrieved, ScoredTokens, Token, read_event
from knnlm_server.pb import generation_pb2 as pb
from knnlm_server.pb.generation_pb2_grpc import GenerationServiceStub
from knnlm_server.sequence import FinishEvent, ServerInfo, TokenEvent

__all__ = [
    "AsyncGenerationClient",
    "Completion",
    "Datastores",
    "FieldViolation",
    "FieldsRefused",
    "GenerationClient",
    "GenerationOptions",
    "Prompt",
    "RequestFailed",
    "Retries",
    "RetrievalOptions",
    "RetrieveOptions",
    "Retrieved",
    "ScoredTokens",
    "ServerUnavailable",
    "Tls",
    "Token",
]

_READY_POLL_SECONDS = 0.05


class GenerationClient:
    """A client for threads; safe to share between them.

    ``target``: ``host:port``, or several, between which calls are balanced. ``tls``: None for a connection in the clear.
    ``token``: the bearer token that the server may ask for. ``retries``: None for the defaults of :class:`Retries`.

    Every method takes ``timeout``, the seconds after which the call ends with DEADLINE_EXCEEDED, retries included (None:
    never), and ``request_id``, under which the server logs the call (None: the server makes one): 1 to 64 letters,
    digits, ``.``, ``_``, ``:`` and ``-``. It raises :class:`RequestFailed`, or :class:`InvalidInput` for an option that
    can't be put into a request.
    """

    def __init__(
        self, target: str | Sequence[str], *, tls: Tls | None = None, token: str | None = None, retries: Retries | None = None
    ) -> None:
        self._connection = Connection(target, tls, token, retries)
        self.target = self._connection.name
        self._channel = self._connection.channel()
        self._stub = GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]  # generated
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def generate(
        self,
        prompt: Prompt,
        *,
        best_of: int | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Completion:
        """Continue a prompt (text or token ids) and return the whole completion, the best of ``best_of``."""
        return self._call(calls.generate(prompt, options, best_of), timeout, request_id)

    def samples(
        self,
        prompt: Prompt,
        num_samples: int,
        *,
        best_of: int | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
        **options: Unpack[GenerationOptions],
    ) -> tuple[Completion, ...]:
        """Continue a prompt ``num_samples`` times, in the order of their numbers; or the best of ``best_of``, best first."""
        return self._call(calls.samples(prompt, options, num_samples, best_of), timeout, request_id)

    def stream(
        self,
        prompt: Prompt,
        *,
        num_samples: int | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Generator[TokenEvent | FinishEvent, None, None]:
        """Continue a prompt: each token as it is made, then for each sample one finish. Closing the generator cancels the request."""
        return self._events(calls.stream(prompt, options, num_samples), timeout, request_id)

    def score(
        self, tokens: Prompt, *, timeout: float | None = None, request_id: str | None = None, **options: Unpack[RetrievalOptions]
    ) -> ScoredTokens:
        """Log-probability of each token of a text (or of token ids) but the first."""
        return self._call(calls.score(tokens, options), timeout, request_id)

    def retrieve(
        self, context: Prompt, *, timeout: float | None = None, request_id: str | None = None, **options: Unpack[RetrieveOptions]
    ) -> Retrieved:
        """The datastore entries that would vote on the token after a context (text or token ids)."""
        return self._call(calls.retrieve(context, options), timeout, request_id)

    def tokenize(self, text: str, *, timeout: float | None = None, request_id: str | None = None) -> tuple[Token, ...]:
        """The tokens of a text as a prompt, special tokens included."""
        return self._call(calls.tokenize(text), timeout, request_id)

    def detokenize(self, token_ids: Iterable[int], *, timeout: float | None = None, request_id: str | None = None) -> str:
        """The text of token ids, special tokens left out."""
        return self._call(calls.detokenize(token_ids), timeout, request_id)

    def server_info(self, *, timeout: float | None = None, request_id: str | None = None) -> ServerInfo:
        """What is served: model, datastores, defaults and limits."""
        return self._call(calls.server_info(), timeout, request_id)

    def wait_until_ready(self, timeout: float) -> None:
        """Return when a server takes requests; raise :class:`ServerUnavailable` after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            try:
                response = self._health.Check(health_pb2.HealthCheckRequest(), timeout=left, wait_for_ready=True)
            except grpc.RpcError as error:
                _raise_unless_not_ready(error, self.target)
            else:
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            time.sleep(_READY_POLL_SECONDS)
        raise not_ready(self.target, timeout, self._connection.diagnosis())

    def close(self) -> None:
        """End the connection; calls that run are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _call(self, call: Call[ResultT], timeout: float | None, request_id: str | None) -> ResultT:
        try:
            response = getattr(self._stub, call.method)(call.request, timeout=timeout, metadata=self._connection.metadata(request_id))
        except grpc.RpcError as error:
            raise failure_of(error, self.target, self._connection.diagnosis) from error
        return call.read(response)

    def _events(
        self, request: pb.StreamGenerateRequest, timeout: float | None, request_id: str | None
    ) -> Generator[TokenEvent | FinishEvent, None, None]:
        call = self._stub.StreamGenerate(request, timeout=timeout, metadata=self._connection.metadata(request_id))
        try:
            for response in call:
                yield read_event(response)
        except grpc.RpcError as error:
            raise failure_of(error, self.target, self._connection.diagnosis) from error
        finally:
            call.cancel()


class AsyncGenerationClient:
    """A client for one asyncio event loop; the same arguments and methods as :class:`GenerationClient`."""

    def __init__(
        self, target: str | Sequence[str], *, tls: Tls | None = None, token: str | None = None, retries: Retries | None = None
    ) -> None:
        self._connection = Connection(target, tls, token, retries)
        self.target = self._connection.name
        self._channel = self._connection.aio_channel()
        self._stub = GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]  # generated
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def generate(
        self,
        prompt: Prompt,
        *,
        best_of: int | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Completion:
        """Continue a prompt (text or token ids) and return the whole completion, the best of ``best_of``."""
        return await self._call(calls.generate(prompt, options, best_of), timeout, request_id)

    async def samples(
        self,
        prompt: Prompt,
        num_samples: int,
        *,
        best_of: int | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
        **options: Unpack[GenerationOptions],
    ) -> tuple[Completion, ...]:
        """Continue a prompt ``num_samples`` times, in the order of their numbers; or the best of ``best_of``, best first."""
        return await self._call(calls.samples(prompt, options, num_samples, best_of), timeout, request_id)

    def stream(
        self,
        prompt: Prompt,
        *,
        num_samples: int | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
        **options: Unpack[GenerationOptions],
    ) -> AsyncGenerator[TokenEvent | FinishEvent, None]:
        """Continue a prompt: each token as it is made, then for each sample one finish. Closing the generator cancels the request."""
        return self._events(calls.stream(prompt, options, num_samples), timeout, request_id)

    async def score(
        self, tokens: Prompt, *, timeout: float | None = None, request_id: str | None = None, **options: Unpack[RetrievalOptions]
    ) -> ScoredTokens:
        """Log-probability of each token of a text (or of token ids) but the first."""
        return await self._call(calls.score(tokens, options), timeout, request_id)

    async def retrieve(
        self, context: Prompt, *, timeout: float | None = None, request_id: str | None = None, **options: Unpack[RetrieveOptions]
    ) -> Retrieved:
        """The datastore entries that would vote on the token after a context (text or token ids)."""
        return await self._call(calls.retrieve(context, options), timeout, request_id)

    async def tokenize(self, text: str, *, timeout: float | None = None, request_id: str | None = None) -> tuple[Token, ...]:
        """The tokens of a text as a prompt, special tokens included."""
        return await self._call(calls.tokenize(text), timeout, request_id)

    async def detokenize(self, token_ids: Iterable[int], *, timeout: float | None = None, request_id: str | None = None) -> str:
        """The text of token ids, special tokens left out."""
        return await self._call(calls.detokenize(token_ids), timeout, request_id)

    async def server_info(self, *, timeout: float | None = None, request_id: str | None = None) -> ServerInfo:
        """What is served: model, datastores, defaults and limits."""
        return await self._call(calls.server_info(), timeout, request_id)

    async def wait_until_ready(self, timeout: float) -> None:
        """Return when a server takes requests; raise :class:`ServerUnavailable` after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            try:
                response = await self._health.Check(health_pb2.HealthCheckRequest(), timeout=left, wait_for_ready=True)
            except grpc.RpcError as error:
                _raise_unless_not_ready(error, self.target)
            else:
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            await asyncio.sleep(_READY_POLL_SECONDS)
        raise not_ready(self.target, timeout, await asyncio.to_thread(self._connection.diagnosis))

    async def close(self) -> None:
        """End the connection; calls that run are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        await self.close()

    async def _call(self, call: Call[ResultT], timeout: float | None, request_id: str | None) -> ResultT:
        try:
            response = await getattr(self._stub, call.method)(call.request, timeout=timeout, metadata=self._connection.metadata(request_id))
        except grpc.RpcError as error:
            raise await asyncio.to_thread(failure_of, error, self.target, self._connection.diagnosis) from error
        return call.read(response)

    async def _events(
        self, request: pb.StreamGenerateRequest, timeout: float | None, request_id: str | None
    ) -> AsyncGenerator[TokenEvent | FinishEvent, None]:
        call = self._stub.StreamGenerate(request, timeout=timeout, metadata=self._connection.metadata(request_id))
        try:
            async for response in call:
                yield read_event(response)
        except grpc.RpcError as error:
            raise await asyncio.to_thread(failure_of, error, self.target, self._connection.diagnosis) from error
        finally:
            call.cancel()


def _raise_unless_not_ready(error: Any, target: str) -> None:
    if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        raise failure_of(error, target) from error
