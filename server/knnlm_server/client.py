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
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar, Unpack

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from knnlm.errors import InvalidInput, KNNLMError
from knnlm_server.converters import read_completion, read_finish, read_server_info, read_token
from knnlm_server.pb import generation_pb2 as pb
from knnlm_server.pb.generation_pb2_grpc import GenerationServiceStub
from knnlm_server.sequence import FinishEvent, FinishReason, ScoreResult, ServerInfo, TokenEvent

MAX_RESPONSE_BYTES = 64 * 1024 * 1024

Prompt = str | Sequence[int]
RequestT = TypeVar("RequestT", pb.GenerateRequest, pb.StreamGenerateRequest)

# A server that comes up is found within a second, not after gRPC's usual minute of growing waits.
_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_READY_POLL_SECONDS = 0.05


class RetrievalOptions(TypedDict, total=False):
    """The mixture; None or absent: the server's default. ``retrieval=False``: the base model alone."""

    weight: float | None
    k: int | None
    knn_temperature: float | None
    retrieval: bool


class GenerationOptions(RetrievalOptions, total=False):
    """What a completion may be asked for; None or absent: the server's default, as ``generation.proto`` documents it."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    max_new_tokens: int | None
    min_new_tokens: int | None
    stop_strings: Iterable[str]
    stop_token_ids: Iterable[int]
    ignore_eos: bool
    log_probs: bool
    alternatives: int
    neighbors: int
    truncate_prompt: bool


_RETRIEVAL_FIELDS = {"weight": "interpolation_weight", "k": "k", "knn_temperature": "knn_temperature"}
_PLACES = {
    **dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"), "sampling"),
    **dict.fromkeys(("max_new_tokens", "min_new_tokens", "stop_strings", "stop_token_ids", "ignore_eos"), "stopping"),
    **dict.fromkeys(("log_probs", "alternatives", "neighbors"), "detail"),
}


@dataclass(frozen=True)
class Completion:
    """A whole completion: ``text`` without the prompt, its tokens, why it ended, and how many tokens were read and made."""

    text: str
    tokens: tuple[TokenEvent, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class ScoredTokens(ScoreResult):
    """Log-probabilities of ``token_ids[1:]``; ``knn_log_probs`` is empty where no search was made."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Token:
    """A token of a text, with its text for display."""

    token_id: int
    text: str


@dataclass(frozen=True)
class FieldViolation:
    """A field that the server can't use: its path in the request, and why."""

    field: str
    problem: str


class RequestFailed(KNNLMError):
    """The server refused a request or failed on it.

    ``code`` is gRPC's; ``reason`` the server's name for the error (``QUEUE_FULL``), None where it came from gRPC
    itself; ``retry_seconds`` when to try again, where the server says; ``request_id`` under which its log has the
    error, where it says.
    """

    def __init__(self, code: grpc.StatusCode, message: str, details: Sequence[Any] = ()) -> None:
        KNNLMError.__init__(self, message)
        self.code = code
        self.message = message
        retry = _detail(details, error_details_pb2.RetryInfo())
        self.reason: str | None = _detail(details, error_details_pb2.ErrorInfo()).reason or None
        self.retry_seconds: float | None = retry.retry_delay.ToTimedelta().total_seconds() if retry.HasField("retry_delay") else None
        self.request_id: str | None = _detail(details, error_details_pb2.RequestInfo()).request_id or None


class FieldsRefused(RequestFailed, InvalidInput):
    """The server can't use some fields of the request: ``violations``, of which ``field`` and ``problem`` are the first."""

    def __init__(self, code: grpc.StatusCode, message: str, details: Sequence[Any], violations: Sequence[FieldViolation]) -> None:
        super().__init__(code, message, details)
        self.violations = tuple(violations)
        self.field, self.problem = violations[0].field, violations[0].problem


class ServerUnavailable(RequestFailed):
    """No server answers at the target, or it is starting or being stopped; the same request may succeed later."""


class GenerationClient:
    """A client for threads; safe to share between them. ``target`` is ``host:port``.

    Every method takes ``timeout``, the seconds after which the call ends with DEADLINE_EXCEEDED (None: never), and
    raises :class:`RequestFailed`, or :class:`InvalidInput` for an option that can't be put into a request.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self._channel = grpc.insecure_channel(target, options=_CHANNEL_OPTIONS)
        self._stub = GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]  # generated
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def generate(self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerationOptions]) -> Completion:
        """Continue a prompt (text or token ids) and return the whole completion."""
        request = _generation_request(pb.GenerateRequest(), prompt, options)
        return _completion(self._call(self._stub.Generate, request, timeout))

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerationOptions]
    ) -> Generator[TokenEvent | FinishEvent, None, None]:
        """Continue a prompt: each token as it is made, then one finish. Closing the generator cancels the request."""
        return self._events(_generation_request(pb.StreamGenerateRequest(), prompt, options), timeout)

    def score(self, tokens: Prompt, *, timeout: float | None = None, **options: Unpack[RetrievalOptions]) -> ScoredTokens:
        """Log-probability of each token of a text (or of token ids) but the first."""
        return _scored(self._call(self._stub.Score, _score_request(tokens, options), timeout))

    def tokenize(self, text: str, *, timeout: float | None = None) -> tuple[Token, ...]:
        """The tokens of a text as a prompt, special tokens included."""
        return _tokens(self._call(self._stub.Tokenize, _tokenize_request(text), timeout))

    def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """What is served: model, datastore, defaults and limits."""
        return read_server_info(self._call(self._stub.GetServerInfo, pb.GetServerInfoRequest(), timeout))

    def wait_until_ready(self, timeout: float) -> None:
        """Return when the server takes requests; raise :class:`ServerUnavailable` after ``timeout`` seconds."""
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
        raise _not_ready(self.target, timeout)

    def close(self) -> None:
        """End the connection; calls that run are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _call(self, method: Any, request: Message, timeout: float | None) -> Any:
        try:
            return method(request, timeout=timeout)
        except grpc.RpcError as error:
            raise _failure(error, self.target) from error

    def _events(self, request: pb.StreamGenerateRequest, timeout: float | None) -> Generator[TokenEvent | FinishEvent, None, None]:
        call = self._stub.StreamGenerate(request, timeout=timeout)
        try:
            for response in call:
                yield _event(response)
        except grpc.RpcError as error:
            raise _failure(error, self.target) from error
        finally:
            call.cancel()


class AsyncGenerationClient:
    """A client for one asyncio event loop; the same methods as :class:`GenerationClient`."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._channel = grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS)
        self._stub = GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]  # generated
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def generate(self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerationOptions]) -> Completion:
        """Continue a prompt (text or token ids) and return the whole completion."""
        request = _generation_request(pb.GenerateRequest(), prompt, options)
        return _completion(await self._call(self._stub.Generate, request, timeout))

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerationOptions]
    ) -> AsyncGenerator[TokenEvent | FinishEvent, None]:
        """Continue a prompt: each token as it is made, then one finish. Closing the generator cancels the request."""
        return self._events(_generation_request(pb.StreamGenerateRequest(), prompt, options), timeout)

    async def score(self, tokens: Prompt, *, timeout: float | None = None, **options: Unpack[RetrievalOptions]) -> ScoredTokens:
        """Log-probability of each token of a text (or of token ids) but the first."""
        return _scored(await self._call(self._stub.Score, _score_request(tokens, options), timeout))

    async def tokenize(self, text: str, *, timeout: float | None = None) -> tuple[Token, ...]:
        """The tokens of a text as a prompt, special tokens included."""
        return _tokens(await self._call(self._stub.Tokenize, _tokenize_request(text), timeout))

    async def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """What is served: model, datastore, defaults and limits."""
        return read_server_info(await self._call(self._stub.GetServerInfo, pb.GetServerInfoRequest(), timeout))

    async def wait_until_ready(self, timeout: float) -> None:
        """Return when the server takes requests; raise :class:`ServerUnavailable` after ``timeout`` seconds."""
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
        raise _not_ready(self.target, timeout)

    async def close(self) -> None:
        """End the connection; calls that run are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        await self.close()

    async def _call(self, method: Any, request: Message, timeout: float | None) -> Any:
        try:
            return await method(request, timeout=timeout)
        except grpc.RpcError as error:
            raise _failure(error, self.target) from error

    async def _events(self, request: pb.StreamGenerateRequest, timeout: float | None) -> AsyncGenerator[TokenEvent | FinishEvent, None]:
        call = self._stub.StreamGenerate(request, timeout=timeout)
        try:
            async for response in call:
                yield _event(response)
        except grpc.RpcError as error:
            raise _failure(error, self.target) from error
        finally:
            call.cancel()


def _generation_request(request: RequestT, prompt: Prompt, options: GenerationOptions) -> RequestT:
    """Fill a Generate or StreamGenerate request, which have the same fields."""
    values: dict[str, Any] = dict(options)
    _put_input(request.prompt, "prompt", prompt)
    retrieval = {name: values.pop(name) for name in RetrievalOptions.__annotations__ if name in values}
    _put_retrieval(request.options.retrieval, "options.retrieval", retrieval)
    _put(request.options, "options", "truncate_prompt", values.pop("truncate_prompt", None))
    for name, value in values.items():
        _require_known(name, _PLACES)
        place = _PLACES[name]
        _put(getattr(request.options, place), f"options.{place}", name, value)
    return request


def _score_request(tokens: Prompt, options: RetrievalOptions) -> pb.ScoreRequest:
    request = pb.ScoreRequest()
    _put_input(request.input, "input", tokens)
    _put_retrieval(request.retrieval, "retrieval", dict(options))
    return request


def _tokenize_request(text: str) -> pb.TokenizeRequest:
    request = pb.TokenizeRequest()
    _put(request, "", "text", text)
    return request


def _put_input(message: pb.Input, path: str, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        _put(message, path, "text", prompt)
    else:
        message.token_ids.SetInParent()
        _put(message.token_ids, f"{path}.token_ids", "ids", prompt)


def _put_retrieval(message: pb.RetrievalOptions, path: str, options: dict[str, Any]) -> None:
    _put(message, path, "off", None if options.pop("retrieval", True) else True)
    for name, value in options.items():
        _require_known(name, _RETRIEVAL_FIELDS)
        _put(message, path, _RETRIEVAL_FIELDS[name], value)


def _put(message: Message, path: str, name: str, value: Any) -> None:
    """Set a field unless ``value`` is None; raise :class:`InvalidInput` where its type can't hold the value."""
    if value is None:
        return
    try:
        if message.DESCRIPTOR.fields_by_name[name].is_repeated:
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    except (TypeError, ValueError) as error:
        problem = f"is {value}, which is negative or too large" if isinstance(value, int) else f"can't be sent: {error}"
        raise InvalidInput(f"{path}.{name}".lstrip("."), f"{problem}.") from error


def _require_known(name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise TypeError(f"unexpected option {name!r}; known are {', '.join(sorted(known))}")


def _event(response: pb.StreamGenerateResponse) -> TokenEvent | FinishEvent:
    return read_token(response.token) if response.HasField("token") else read_finish(response.finish)


def _completion(response: pb.GenerateResponse) -> Completion:
    tokens, finish = read_completion(response.completions[0], response.prompt_tokens)
    return Completion(finish.text, tuple(tokens), finish.reason, finish.prompt_tokens, finish.completion_tokens)


def _scored(response: pb.ScoreResponse) -> ScoredTokens:
    return ScoredTokens(
        log_probs=tuple(response.log_probs),
        lm_log_probs=tuple(response.lm_log_probs),
        knn_log_probs=tuple(response.knn_log_probs),
        token_ids=tuple(response.token_ids),
    )


def _tokens(response: pb.TokenizeResponse) -> tuple[Token, ...]:
    return tuple(Token(token.token_id, token.text) for token in response.tokens)


def _failure(error: Any, target: str) -> RequestFailed:
    """The typed form of an error that a call ended with."""
    code = error.code()
    status = rpc_status.from_call(error)
    details = () if status is None else status.details
    message = error.details() or code.name
    violations = [FieldViolation(v.field, v.description) for v in _detail(details, error_details_pb2.BadRequest()).field_violations]
    if violations:
        return FieldsRefused(code, message, details, violations)
    if code is grpc.StatusCode.UNAVAILABLE:
        return ServerUnavailable(code, message if status else f"No server answers at {target} ({message}).", details)
    return RequestFailed(code, message, details)


def _detail(details: Sequence[Any], empty: Any) -> Any:
    """The detail that has the type of ``empty``, or ``empty`` where there is none."""
    for packed in details:
        if packed.Unpack(empty):
            break
    return empty


def _raise_unless_not_ready(error: Any, target: str) -> None:
    if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        raise _failure(error, target) from error


def _not_ready(target: str, timeout: float) -> ServerUnavailable:
    return ServerUnavailable(grpc.StatusCode.UNAVAILABLE, f"No server was ready at {target} within {timeout:g} seconds.")
