"""Between protobuf messages and the dataclasses of ``sequence.py``, with all validation of requests.

Field names in errors are paths from the request (``options.sampling.top_p``). Knows no torch and no gRPC: the service
and the client both use it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from google.protobuf import json_format, struct_pb2
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from knnlm.errors import InvalidInput
from knnlm.sampling import SamplingParams
from knnlm_server.engine_protocol import PromptTokenizer
from knnlm_server.errors import DatastoreNotLoaded
from knnlm_server.pb import generation_pb2 as pb
from knnlm_server.sequence import (
    Alternative,
    CompletionEvidence,
    DatastoreChoice,
    DatastoreInfo,
    DetailParams,
    DocumentWeight,
    FinishEvent,
    FinishReason,
    GenerationRequest,
    Limits,
    NeighborEvidence,
    RetrievalParams,
    RetrieveRequest,
    RetrieveResult,
    ScoreRequest,
    ScoreResult,
    ServerInfo,
    StoppingParams,
    TokenEvent,
    VerbatimRun,
)

_REASON_PREFIX = "FINISH_REASON_"


@dataclass(frozen=True)
class RequestReader:
    """Requests from messages, checked against what is served. Every method raises :class:`InvalidInput`, and
    :class:`DatastoreNotLoaded` where a datastore is named that is not there."""

    tokenizer: PromptTokenizer
    info: ServerInfo

    def generation(self, message: pb.GenerateRequest | pb.StreamGenerateRequest, request_id: str, tenant: str = "") -> GenerationRequest:
        """The request with defaults filled in and the prompt tokenised, truncated where it asks for that."""
        _refuse_unknown(message)
        options = message.options
        stopping = self._stopping(options.stopping)
        wanted, samples = self._samples(options, stream=isinstance(message, pb.StreamGenerateRequest))
        return GenerationRequest(
            request_id=request_id,
            sampling=self._sampling(options.sampling),
            stopping=stopping,
            retrieval=self._retrieval(options.retrieval, "options.retrieval"),
            detail=self._detail(options.detail),
            prompt=self._prompt(message.prompt, stopping.max_new_tokens, options.truncate_prompt),
            samples=samples,
            mean_log_prob=samples > wanted,
            tenant=tenant,
        )

    def retrieve(self, message: pb.RetrieveRequest, request_id: str, tenant: str = "") -> RetrieveRequest:
        """The request with defaults filled in and the context tokenised, truncated where it asks for that."""
        _refuse_unknown(message)
        given, most = _given(message), self.info.limits.max_neighbors
        wanted = pb.RetrievalOptions(**{name: given[name] for name in ("k", "knn_temperature", "datastores") if name in given})
        retrieval = replace(self._retrieval(wanted, ""), weight=1.0)
        neighbors = given.get("neighbors", min(retrieval.k * max(1, len(retrieval.datastores)), most))
        _require(1 <= neighbors <= most, "neighbors", f"is {neighbors}, but must be from 1 to {most}.")
        tokens, field = self._tokens(message.context, "context")
        room = self.info.limits.context
        if not message.truncate_context:
            _require(
                len(tokens) <= room,
                field,
                f"has {_count(tokens, 'token')}, but the context holds {room}; shorten it, or set truncate_context.",
            )
        return RetrieveRequest(request_id=request_id, tokens=tokens[-room:], retrieval=retrieval, neighbors=neighbors, tenant=tenant)

    def detokenize(self, message: pb.DetokenizeRequest) -> tuple[int, ...]:
        """Token ids whose text is wanted."""
        _refuse_unknown(message)
        ids, limit = tuple(message.token_ids), self.info.limits.max_score_tokens
        _require(len(ids) <= limit, "token_ids", f"has {_count(ids, 'token')}, but at most {limit} are taken.")
        self._check_token_ids(ids, "token_ids")
        return ids

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

    def _samples(self, options: pb.GenerationOptions, stream: bool) -> tuple[int, int]:
        """How many completions are returned, and how many are generated for that."""
        given, most = _given(options), self.info.limits.max_samples
        wanted = given.get("num_samples", 1)
        _require(1 <= wanted <= most, "options.num_samples", f"is {wanted}, but must be from 1 to {most}.")
        best_of = given.get("best_of", wanted)
        _require(wanted <= best_of <= most, "options.best_of", f"is {best_of}, but must be from num_samples, which is {wanted}, to {most}.")
        _require(
            not stream or best_of == wanted, "options.best_of", "can't be more than num_samples in a stream, which can't take tokens back."
        )
        return wanted, best_of

    def _sampling(self, message: pb.SamplingOptions) -> SamplingParams:
        path, given, limits = "options.sampling", _given(message), self.info.limits
        biases, words = dict(message.logit_bias), message.bad_words
        _require(
            len(biases) <= limits.max_logit_biases,
            f"{path}.logit_bias",
            f"has {len(biases)} tokens, but at most {limits.max_logit_biases} are taken.",
        )
        self._check_token_ids(biases, f"{path}.logit_bias")
        _require(
            len(words) <= limits.max_bad_words, f"{path}.bad_words", f"has {len(words)}, but at most {limits.max_bad_words} are taken."
        )
        sequences = [tokens for at, word in enumerate(words) for tokens in self._bad_word(word, f"{path}.bad_words[{at}]")]
        given |= {"logit_bias": tuple(sorted(biases.items())), "bad_words": tuple(dict.fromkeys(sequences))}
        return replace(SamplingParams(), **given).validate(f"{path}.")

    def _bad_word(self, message: pb.Input, path: str) -> list[tuple[int, ...]]:
        """Token sequences that spell it: text as it stands and after a space."""
        if message.WhichOneof("content") == "text" and message.text:
            self._check_size(message.text, f"{path}.text")
            return [tuple(self.tokenizer.encode_plain(text)) for text in (message.text, f" {message.text}")]
        return [self._tokens(message, path)[0]]

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
        self._check_size(text, field)
        return self.tokenizer.encode(text)

    def _check_size(self, text: str, field: str) -> None:
        size, limit = len(text.encode()), self.info.limits.max_text_bytes
        _require(size <= limit, field, f"has {size} bytes, but at most {limit} are taken.")

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
        return replace(stopping, max_seconds=self._seconds(stopping.max_seconds, f"{path}.max_seconds"))

    def _seconds(self, seconds: float | None, path: str) -> float | None:
        limit = self.info.limits.max_seconds
        if seconds is None:
            return limit
        _require(0 < seconds < math.inf, path, f"is {seconds}, but must be above 0, and finite.")
        _require(limit is None or seconds <= limit, path, f"is {seconds}, but must be at most {limit}.")
        return seconds

    def _retrieval(self, message: pb.RetrievalOptions, path: str) -> RetrievalParams:
        given = _given(message)
        if given.pop("off", False):
            _require(not given, _at(path, "off"), f"is set together with {', '.join(given)}; set either.")
            return RetrievalParams(weight=0.0, k=1, temperature=1.0)
        given.pop("datastores", None)
        chosen = self._datastores(message.datastores, _at(path, "datastores"))
        names = {"interpolation_weight": "weight", "k": "k", "knn_temperature": "temperature"}
        retrieval = replace(
            chosen[0].default_retrieval,
            datastores=tuple(_choice(choice) for choice in message.datastores),
            **{names[name]: value for name, value in given.items()},
        )
        _require(0 <= retrieval.weight <= 1, _at(path, "interpolation_weight"), f"is {retrieval.weight}, but must be from 0 to 1.")
        max_k = self.info.limits.max_k
        _require(1 <= retrieval.k <= max_k, _at(path, "k"), f"is {retrieval.k}, but must be from 1 to {max_k}.")
        _require(
            0 < retrieval.temperature < math.inf,
            _at(path, "knn_temperature"),
            f"is {retrieval.temperature}, but must be above 0, and finite.",
        )
        return retrieval

    def _datastores(self, choices: Sequence[pb.DatastoreWeight], path: str) -> list[DatastoreInfo]:
        """The datastores that are meant, at least one."""
        loaded = {info.name: info for info in self.info.datastores}
        if not loaded:
            raise DatastoreNotLoaded("No datastore is loaded; a request can only be answered by the base model alone (retrieval off).")
        most = self.info.limits.max_datastores
        _require(len(choices) <= most, path, f"has {len(choices)}, but at most {most} are taken.")
        for at, choice in enumerate(choices):
            _require(choice.name != "", f"{path}[{at}].name", "is empty.")
            _require(choice.name not in {c.name for c in choices[:at]}, f"{path}[{at}].name", f"is {choice.name!r} a second time.")
            weight = choice.weight if choice.HasField("weight") else 1.0
            _require(0 < weight < math.inf, f"{path}[{at}].weight", f"is {weight}, but must be above 0, and finite.")
            if choice.name not in loaded:
                raise DatastoreNotLoaded(f"No datastore {choice.name!r} is loaded; there are {', '.join(sorted(loaded))}.")
        chosen = [loaded[choice.name] for choice in choices] or [self.info.datastores[0]]
        kinds = {(info.key_layer, info.key_dimension, info.distance) for info in chosen}
        _require(len(kinds) == 1, path, f"can't be mixed: {', '.join(_kind(info) for info in chosen)}.")
        return chosen

    def _detail(self, message: pb.DetailOptions) -> DetailParams:
        path, limits = "options.detail", self.info.limits
        detail = replace(DetailParams(), **_given(message))
        most = min(limits.max_alternatives, self.info.vocabulary_size)
        _require(detail.alternatives <= most, f"{path}.alternatives", f"is {detail.alternatives}, but must be at most {most}.")
        most = limits.max_neighbors
        _require(detail.neighbors <= most, f"{path}.neighbors", f"is {detail.neighbors}, but must be at most {most}.")
        return detail


def _choice(message: pb.DatastoreWeight) -> DatastoreChoice:
    return DatastoreChoice(message.name, message.weight if message.HasField("weight") else 1.0)


def _kind(info: DatastoreInfo) -> str:
    return f"{info.name} has keys {info.key_layer} of width {info.key_dimension} and distances of the kind {info.distance!r}"


def _at(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


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
        alternatives=[pb.Alternative(**vars(alternative)) for alternative in event.alternatives],
        neighbors=[_neighbor_message(neighbor) for neighbor in event.neighbors],
        interpolation_weight=event.interpolation_weight,
        sample=event.sample,
    )


def _neighbor_message(neighbor: NeighborEvidence) -> pb.Neighbor:
    fields = vars(neighbor) | {"metadata": _struct(neighbor.metadata) if neighbor.metadata else None}
    return pb.Neighbor(**fields)


def _struct(values: Mapping[str, Any]) -> struct_pb2.Struct:
    struct = struct_pb2.Struct()
    struct.update(values)
    return struct


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
        alternatives=tuple(
            Alternative(a.token_id, a.text, a.log_prob, _optional(a, "lm_log_prob"), _optional(a, "knn_log_prob"))
            for a in message.alternatives
        ),
        neighbors=tuple(read_neighbor(neighbor) for neighbor in message.neighbors),
        interpolation_weight=_optional(message, "interpolation_weight"),
        sample=message.sample,
    )


def read_neighbor(message: pb.Neighbor) -> NeighborEvidence:
    """The neighbour of a message."""
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
        datastore=message.datastore,
        metadata=json_format.MessageToDict(message.metadata),
    )


def finish_message(event: FinishEvent) -> pb.Finish:
    """The message of a finish event."""
    return pb.Finish(
        finish_reason=_REASON_PREFIX + event.reason.name,
        text=event.text,
        prompt_tokens=event.prompt_tokens,
        completion_tokens=event.completion_tokens,
        sample=event.sample,
        evidence=None if event.evidence is None else _evidence_message(event.evidence),
    )


def _evidence_message(evidence: CompletionEvidence) -> pb.CompletionEvidence:
    run = evidence.verbatim
    return pb.CompletionEvidence(
        changed_share=evidence.changed_share,
        searched_tokens=evidence.searched_tokens,
        documents=[pb.DocumentWeight(**vars(document)) for document in evidence.documents],
        verbatim=None if run is None else pb.VerbatimRun(**vars(run)),
    )


def _read_evidence(message: pb.CompletionEvidence) -> CompletionEvidence:
    return CompletionEvidence(
        message.changed_share,
        message.searched_tokens,
        tuple(DocumentWeight(d.datastore, d.document_id, d.source, d.weight) for d in message.documents),
        _read_run(message.verbatim) if message.HasField("verbatim") else None,
    )


def _read_run(message: pb.VerbatimRun) -> VerbatimRun:
    facts = {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
    places = {name: _optional(message, name) for name in ("character_start", "character_end", "line")}
    return VerbatimRun(**facts | places)


def read_finish(message: pb.Finish) -> FinishEvent:
    """The finish event of a completion's last message."""
    return FinishEvent(
        reason=_read_reason(message.finish_reason),
        text=message.text,
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        sample=message.sample,
        evidence=_read_evidence(message.evidence) if message.HasField("evidence") else None,
    )


def _read_reason(value: pb.FinishReason) -> FinishReason:
    return FinishReason[pb.FinishReason.Name(value).removeprefix(_REASON_PREFIX)]


def completion_message(tokens: list[TokenEvent], finish: FinishEvent) -> pb.Completion:
    """The message of a whole completion from the events of its stream."""
    return pb.Completion(
        sample=finish.sample,
        text="".join(token.text for token in tokens) + finish.text,
        tokens=[token_message(token) for token in tokens],
        finish_reason=_REASON_PREFIX + finish.reason.name,
        completion_tokens=finish.completion_tokens,
        evidence=None if finish.evidence is None else _evidence_message(finish.evidence),
    )


def read_completion(message: pb.Completion, prompt_tokens: int) -> tuple[list[TokenEvent], FinishEvent]:
    """The token events of a whole completion, and its finish event, which holds all of its text."""
    finish = FinishEvent(
        reason=_read_reason(message.finish_reason),
        text=message.text,
        prompt_tokens=prompt_tokens,
        completion_tokens=message.completion_tokens,
        sample=message.sample,
        evidence=_read_evidence(message.evidence) if message.HasField("evidence") else None,
    )
    return [read_token(token) for token in message.tokens], finish


def retrieve_message(request: RetrieveRequest, result: RetrieveResult) -> pb.RetrieveResponse:
    """The message of a context's neighbours."""
    return pb.RetrieveResponse(token_ids=request.tokens, neighbors=[_neighbor_message(neighbor) for neighbor in result.neighbors])


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
    facts = {name: value for name, value in vars(info).items() if name not in ("datastores", "limits")}
    return pb.GetServerInfoResponse(
        **facts, datastores=[_datastore_message(datastore) for datastore in info.datastores], limits=pb.Limits(**vars(info.limits))
    )


def _datastore_message(info: DatastoreInfo) -> pb.DatastoreInfo:
    retrieval = info.default_retrieval
    facts = {name: value for name, value in vars(info).items() if name != "default_retrieval"}
    return pb.DatastoreInfo(
        **facts,
        default_retrieval=pb.DefaultRetrieval(interpolation_weight=retrieval.weight, k=retrieval.k, knn_temperature=retrieval.temperature),
    )


def read_server_info(message: pb.GetServerInfoResponse) -> ServerInfo:
    """What is served, from its message."""
    names = [field.name for field in message.DESCRIPTOR.fields]
    facts = {name: getattr(message, name) for name in names if name not in ("datastores", "limits", "settings")}
    limits = {field.name: getattr(message.limits, field.name) for field in message.limits.DESCRIPTOR.fields}
    return ServerInfo(
        **facts,
        datastores=tuple(_read_datastore(datastore) for datastore in message.datastores),
        limits=Limits(**limits | {"max_seconds": _optional(message.limits, "max_seconds")}),
        settings=dict(message.settings),
    )


def _read_datastore(message: pb.DatastoreInfo) -> DatastoreInfo:
    retrieval = message.default_retrieval
    facts = {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
    default = RetrievalParams(retrieval.interpolation_weight, retrieval.k, retrieval.knn_temperature)
    return DatastoreInfo(**facts | {"default_retrieval": default})


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
        place = _at(path, field.name)
        if isinstance(value, Message):
            _refuse_unknown(value, place)
        elif field.is_repeated and field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for at, part in enumerate(value):
                _refuse_unknown(part, f"{place}[{at}]")


def _count(things: Any, name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _require(condition: bool, field: str, problem: str) -> None:
    if not condition:
        raise InvalidInput(field, problem)
