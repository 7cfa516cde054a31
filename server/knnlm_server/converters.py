"""Between protobuf messages and the dataclasses of ``sequence.py``, with all validation of requests.

Field names in errors are paths from the request (``options.sampling.top_p``). Knows no torch and no gRPC: the service
and the client both use it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from knnlm.errors import InvalidInput
from knnlm.sampling import SamplingParams
from knnlm_server.engine_protocol import PromptTokenizer
from knnlm_server.pb import generation_pb2 as pb
from knnlm_server.sequence import (
    Alternative,
    DetailParams,
    FinishEvent,
    FinishReason,
    GenerationRequest,
    Limits,
    NeighborEvidence,
    RetrievalParams,
    ScoreRequest,
    ScoreResult,
    ServerInfo,
    StoppingParams,
    TokenEvent,
)

_REASON_PREFIX = "FINISH_REASON_"


@dataclass(frozen=True)
class RequestReader:
    """Requests from messages, checked against what is served. Every method raises :class:`InvalidInput`."""

    tokenizer: PromptTokenizer
    info: ServerInfo

    def generation(self, message: pb.GenerateRequest | pb.StreamGenerateRequest, request_id: str) -> GenerationRequest:
        """The request with defaults filled in and the prompt tokenised, truncated where it asks for that."""
        _refuse_unknown(message)
        options = message.options
        stopping = self._stopping(options.stopping)
        return GenerationRequest(
            request_id=request_id,
            sampling=replace(SamplingParams(), **_given(options.sampling)).validate("options.sampling."),
            stopping=stopping,
            retrieval=self._retrieval(options.retrieval, "options.retrieval"),
            detail=self._detail(options.detail),
            prompt=self._prompt(message.prompt, stopping.max_new_tokens, options.truncate_prompt),
        )

    def score(self, message: pb.ScoreRequest, request_id: str) -> ScoreRequest:
        """The request with defaults filled in and the input tokenised."""
        _refuse_unknown(message)
        retrieval = self._retrieval(message.retrieval, "retrieval")
        tokens, field = self._tokens(message.input, "input")
        limit = self.info.limits.max_score_tokens
        _require(2 <= len(tokens) <= limit, field, f"has {_count(tokens, 'token')}, but must have from 2 to {limit}.")
        return ScoreRequest(request_id=request_id, tokens=tokens, retrieval=retrieval)

    def tokenize(self, message: pb.TokenizeRequest) -> list[int]:
        """The token ids of a text as a prompt."""
        _refuse_unknown(message)
        return self._encode(message.text, "text")

    def _prompt(self, message: pb.Input, max_new_tokens: int, truncate: bool) -> tuple[int, ...]:
        context = self.info.limits.context
        room = context - max_new_tokens
        _require(
            room >= 1,
            "options.stopping.max_new_tokens",
            f"is {max_new_tokens}, but the context holds {context} tokens, of which the prompt needs at least 1.",
        )
        tokens, field = self._tokens(message, "prompt")
        if truncate:
            return tokens[-room:]
        _require(
            len(tokens) <= room,
            field,
            f"has {_count(tokens, 'token')}, with max_new_tokens {max_new_tokens} together {len(tokens) + max_new_tokens}, but the context"
            f" holds {context}; shorten it to {room}, ask for fewer new tokens, or set options.truncate_prompt.",
        )
        return tokens

    def _tokens(self, message: pb.Input, path: str) -> tuple[tuple[int, ...], str]:
        """The token ids of an input, at least one, and the path of the field that holds them."""
        kind = message.WhichOneof("content")
        _require(kind is not None, path, "is not set; give text or token_ids.")
        if kind == "text":
            field = f"{path}.text"
            tokens = tuple(self._encode(message.text, field))
        else:
            field = f"{path}.token_ids.ids"
            tokens = tuple(message.token_ids.ids)
            self._check_token_ids(tokens, field)
        _require(len(tokens) > 0, field, "has no tokens.")
        return tokens, field

    def _encode(self, text: str, field: str) -> list[int]:
        size, limit = len(text.encode()), self.info.limits.max_text_bytes
        _require(size <= limit, field, f"has {size} bytes, but at most {limit} are taken.")
        return self.tokenizer.encode(text)

    def _check_token_ids(self, ids: Iterable[int], field: str) -> None:
        size = self.info.vocabulary_size
        outside = next(((position, token_id) for position, token_id in enumerate(ids) if token_id >= size), None)
        if outside is not None:
            raise InvalidInput(f"{field}[{outside[0]}]", f"is {outside[1]}, but the vocabulary has ids 0 to {size - 1}.")

    def _stopping(self, message: pb.StoppingOptions) -> StoppingParams:
        path, limits = "options.stopping", self.info.limits
        stopping = replace(StoppingParams(), **_given(message))
        _require(stopping.max_new_tokens >= 1, f"{path}.max_new_tokens", "is 0, but must be 1 or more.")
        _require(
            stopping.min_new_tokens <= stopping.max_new_tokens,
            f"{path}.min_new_tokens",
            f"is {stopping.min_new_tokens}, but must be at most max_new_tokens, which is {stopping.max_new_tokens}.",
        )
        strings = stopping.stop_strings
        _require(
            len(strings) <= limits.max_stop_strings,
            f"{path}.stop_strings",
            f"has {len(strings)} strings, but at most {limits.max_stop_strings} are taken.",
        )
        for position, string in enumerate(strings):
            _require(
                1 <= len(string) <= limits.max_stop_string_characters,
                f"{path}.stop_strings[{position}]",
                f"has {_count(string, 'character')}, but must have from 1 to {limits.max_stop_string_characters}.",
            )
        self._check_token_ids(stopping.stop_token_ids, f"{path}.stop_token_ids")
        return stopping

    def _retrieval(self, message: pb.RetrievalOptions, path: str) -> RetrievalParams:
        given = _given(message)
        if given.pop("off", False):
            _require(not given, f"{path}.off", f"is set together with {', '.join(given)}; set either.")
            return replace(self.info.default_retrieval, weight=0.0)
        names = {"interpolation_weight": "weight", "k": "k", "knn_temperature": "temperature"}
        retrieval = replace(self.info.default_retrieval, **{names[name]: value for name, value in given.items()})
        _require(0 <= retrieval.weight <= 1, f"{path}.interpolation_weight", f"is {retrieval.weight}, but must be from 0 to 1.")
        max_k = self.info.limits.max_k
        _require(1 <= retrieval.k <= max_k, f"{path}.k", f"is {retrieval.k}, but must be from 1 to {max_k}.")
        _require(
            0 < retrieval.temperature < math.inf,
            f"{path}.knn_temperature",
            f"is {retrieval.temperature}, but must be above 0, and finite.",
        )
        return retrieval

    def _detail(self, message: pb.DetailOptions) -> DetailParams:
        path, limits = "options.detail", self.info.limits
        detail = replace(DetailParams(), **_given(message))
        most = min(limits.max_alternatives, self.info.vocabulary_size)
        _require(detail.alternatives <= most, f"{path}.alternatives", f"is {detail.alternatives}, but must be at most {most}.")
        most = limits.max_neighbors
        _require(detail.neighbors <= most, f"{path}.neighbors", f"is {detail.neighbors}, but must be at most {most}.")
        return detail


def token_message(event: TokenEvent) -> pb.GeneratedToken:
    """The message of a token event; what was not asked for stays unset."""
    return pb.GeneratedToken(
        index=event.index,
        token_id=event.token_id,
        text=event.text,
        token_text=event.token_text,
        log_prob=event.log_prob,
        lm_log_prob=event.lm_log_prob,
        knn_log_prob=event.knn_log_prob,
        knn_share=event.knn_share,
        alternatives=[pb.Alternative(token_id=a.token_id, text=a.text, log_prob=a.log_prob) for a in event.alternatives],
        neighbors=[pb.Neighbor(**vars(neighbor)) for neighbor in event.neighbors],
    )


def read_token(message: pb.GeneratedToken) -> TokenEvent:
    """The token event of a message."""
    return TokenEvent(
        index=message.index,
        token_id=message.token_id,
        text=message.text,
        token_text=message.token_text,
        log_prob=_optional(message, "log_prob"),
        lm_log_prob=_optional(message, "lm_log_prob"),
        knn_log_prob=_optional(message, "knn_log_prob"),
        knn_share=_optional(message, "knn_share"),
        alternatives=tuple(Alternative(a.token_id, a.text, a.log_prob) for a in message.alternatives),
        neighbors=tuple(_read_neighbor(neighbor) for neighbor in message.neighbors),
    )


def _read_neighbor(message: pb.Neighbor) -> NeighborEvidence:
    return NeighborEvidence(
        entry=message.entry,
        token_id=message.token_id,
        text=message.text,
        weight=message.weight,
        distance=message.distance,
        document_id=message.document_id,
        source=message.source,
        character_start=_optional(message, "character_start"),
        character_end=_optional(message, "character_end"),
        line=_optional(message, "line"),
        left_context=message.left_context,
    )


def finish_message(event: FinishEvent) -> pb.Finish:
    """The message of a finish event."""
    return pb.Finish(
        finish_reason=_REASON_PREFIX + event.reason.name,
        text=event.text,
        prompt_tokens=event.prompt_tokens,
        completion_tokens=event.completion_tokens,
    )


def read_finish(message: pb.Finish | pb.GenerateResponse) -> FinishEvent:
    """The finish event of a stream's last message or of a whole completion, whose text it then holds."""
    return FinishEvent(
        reason=FinishReason[pb.FinishReason.Name(message.finish_reason).removeprefix(_REASON_PREFIX)],
        text=message.text,
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
    )


def completion_message(tokens: list[TokenEvent], finish: FinishEvent) -> pb.GenerateResponse:
    """The message of a whole completion from the events of its stream."""
    return pb.GenerateResponse(
        text="".join(token.text for token in tokens) + finish.text,
        tokens=[token_message(token) for token in tokens],
        finish_reason=_REASON_PREFIX + finish.reason.name,
        prompt_tokens=finish.prompt_tokens,
        completion_tokens=finish.completion_tokens,
    )


def score_message(request: ScoreRequest, result: ScoreResult) -> pb.ScoreResponse:
    """The message of scored tokens."""
    return pb.ScoreResponse(
        token_ids=request.tokens,
        log_probs=result.log_probs,
        lm_log_probs=result.lm_log_probs,
        knn_log_probs=result.knn_log_probs if request.retrieval.weight > 0 else (),
    )


def server_info_message(info: ServerInfo) -> pb.GetServerInfoResponse:
    """The message of what is served."""
    retrieval = info.default_retrieval
    facts = {name: value for name, value in vars(info).items() if name not in ("default_retrieval", "limits")}
    return pb.GetServerInfoResponse(
        **facts,
        default_retrieval=pb.DefaultRetrieval(interpolation_weight=retrieval.weight, k=retrieval.k, knn_temperature=retrieval.temperature),
        limits=pb.Limits(**vars(info.limits)),
    )


def read_server_info(message: pb.GetServerInfoResponse) -> ServerInfo:
    """What is served, from its message."""
    retrieval = message.default_retrieval
    names = [field.name for field in message.DESCRIPTOR.fields]
    facts = {name: getattr(message, name) for name in names if name not in ("default_retrieval", "limits", "settings")}
    return ServerInfo(
        **facts,
        default_retrieval=RetrievalParams(retrieval.interpolation_weight, retrieval.k, retrieval.knn_temperature),
        limits=Limits(**{field.name: getattr(message.limits, field.name) for field in message.limits.DESCRIPTOR.fields}),
        settings=dict(message.settings),
    )


def _given(message: Message) -> dict[str, Any]:
    """The fields that are set, by name; lists as tuples."""
    return {field.name: tuple(value) if field.is_repeated else value for field, value in message.ListFields()}


def _optional(message: Message, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def _refuse_unknown(message: Message, path: str = "") -> None:
    """Raise for a field of a newer client that this server would otherwise ignore."""
    unknown = UnknownFieldSet(message)
    if len(unknown) > 0:
        raise InvalidInput(path or "request", f"has field number {unknown[0].field_number}, which this server does not know.")
    for field, value in message.ListFields():
        if isinstance(value, Message):
            _refuse_unknown(value, f"{path}.{field.name}" if path else field.name)


def _count(things: Any, name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _require(condition: bool, field: str, problem: str) -> None:
    if not condition:
        raise InvalidInput(field, problem)
