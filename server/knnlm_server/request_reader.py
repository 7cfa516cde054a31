"""Requests from messages, with all validation: defaults filled in, text tokenised, every bound checked.

Field names in errors are paths from the request (``options.sampling.top_p``). Knows no torch and no gRPC.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from knnlm.errors import InvalidInput
from knnlm.sampling import SamplingParams
from knnlm_server.engine_protocol import PromptTokenizer
from knnlm_server.errors import DatastoreNotLoaded
from knnlm_server.pb import generation_pb2 as pb
from knnlm_server.sequence import (
    DatastoreChoice,
    DatastoreInfo,
    DetailParams,
    GenerationRequest,
    RetrievalParams,
    RetrieveRequest,
    ScoreRequest,
    ServerInfo,
    StoppingParams,
)


@dataclass(frozen=True)
class RequestReader:
    """Requests from messages, checked against what is served. Every method raises :class:`InvalidInput`, and
    :class:`DatastoreNotLoaded` where a datastore is named that is not there."""

    tokenizer: PromptTokenizer
    info: ServerInfo

    def generation(self, message: pb.GenerateRequest | pb.StreamGenerateRequest, request_id: str, tenant: str = "") -> GenerationRequest:
        """The request with defaults filled in and the prompt tokenised, truncated where it asks for that."""
        refuse_unknown(message)
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
        refuse_unknown(message)
        given, most = _given(message), self.info.limits.max_neighbors
        wanted = pb.RetrievalOptions(**{name: given[name] for name in ("k", "knn_temperature", "datastores") if name in given})
        retrieval = replace(self._retrieval(wanted, ""), weight=1.0, adaptive=False)
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
        refuse_unknown(message)
        ids, limit = tuple(message.token_ids), self.info.limits.max_score_tokens
        _require(len(ids) <= limit, "token_ids", f"has {_count(ids, 'token')}, but at most {limit} are taken.")
        self._check_token_ids(ids, "token_ids")
        return ids

    def score(self, message: pb.ScoreRequest, request_id: str) -> ScoreRequest:
        """The request with defaults filled in and the input tokenised."""
        refuse_unknown(message)
        retrieval = self._retrieval(message.retrieval, "retrieval")
        tokens, field = self._tokens(message.input, "input")
        limit = self.info.limits.max_score_tokens
        _require(2 <= len(tokens) <= limit, field, f"has {_count(tokens, 'token')}, but must have from 2 to {limit}.")
        return ScoreRequest(request_id=request_id, tokens=tokens, retrieval=retrieval)

    def tokenize(self, message: pb.TokenizeRequest) -> list[int]:
        """The token ids of a text as a prompt."""
        refuse_unknown(message)
        tokens, limit = self._encode(message.text, "text"), self.info.limits.max_score_tokens
        _require(len(tokens) <= limit, "text", f"has {_count(tokens, 'token')}, but at most {limit} are taken.")
        return tokens

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
        path, given = "options.sampling", _given(message)
        given["logit_bias"] = self._logit_bias(message.logit_bias, f"{path}.logit_bias")
        given["bad_words"] = self._bad_words(message.bad_words, f"{path}.bad_words")
        return replace(SamplingParams(), **given).validate(f"{path}.")

    def _logit_bias(self, biases: Mapping[int, float], path: str) -> tuple[tuple[int, float], ...]:
        """What is added to tokens, by id; ranges of the values are those of :class:`SamplingParams`."""
        most, size = self.info.limits.max_logit_biases, self.info.vocabulary_size
        _require(len(biases) <= most, path, f"has {_count(biases, 'token')}, but at most {most} are taken.")
        for token_id in sorted(biases):
            _require(token_id < size, f"{path}[{token_id}]", f"is for a token outside the vocabulary, which has ids 0 to {size - 1}.")
        return tuple(sorted(biases.items()))

    def _bad_words(self, words: Sequence[pb.Input], path: str) -> tuple[tuple[int, ...], ...]:
        """Token sequences that spell them, each once."""
        most = self.info.limits.max_bad_words
        _require(len(words) <= most, path, f"has {len(words)}, but at most {most} are taken.")
        return tuple(dict.fromkeys(tokens for at, word in enumerate(words) for tokens in self._bad_word(word, f"{path}[{at}]")))

    def _bad_word(self, message: pb.Input, path: str) -> list[tuple[int, ...]]:
        """Token sequences that spell it: text as it stands and after a space."""
        if message.WhichOneof("content") != "text":
            tokens, field = self._tokens(message, path)
            self._check_spelling(tokens, field)
            return [tokens]
        field = f"{path}.text"
        _require(message.text != "", field, "is empty.")
        self._check_size(message.text, field)
        spelled = [tuple(self.tokenizer.encode_plain(text)) for text in (message.text, f" {message.text}")]
        # A sequence of no tokens would forbid everything.
        _require(all(spelled), field, "has no tokens.")
        for tokens in spelled:
            self._check_spelling(tokens, field)
        return spelled

    def _check_spelling(self, tokens: Sequence[int], field: str) -> None:
        """Every bad word is looked at before every token, so none may be as long as a message."""
        most = self.info.limits.context
        _require(len(tokens) <= most, field, f"has {_count(tokens, 'token')}, but the context holds {most}.")

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
        ids, most = stopping.stop_token_ids, limits.max_stop_token_ids
        _require(len(ids) <= most, f"{path}.stop_token_ids", f"has {_count(ids, 'token')}, but at most {most} are taken.")
        self._check_token_ids(ids, f"{path}.stop_token_ids")
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
            adaptive=chosen[0].default_retrieval.adaptive and not given and len(chosen) == 1,
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


def _given(message: Message) -> dict[str, Any]:
    """The fields that are set, by name; lists as tuples."""
    return {field.name: tuple(value) if field.is_repeated else value for field, value in message.ListFields()}


def refuse_unknown(message: Message, path: str = "") -> None:
    """Raise for a field of a newer client that this server would otherwise ignore."""
    unknown = UnknownFieldSet(message)
    if len(unknown) > 0:
        raise InvalidInput(path or "request", f"has field number {unknown[0].field_number}, which this server does not know.")
    for field, value in message.ListFields():
        place = _at(path, field.name)
        if isinstance(value, Message):
            refuse_unknown(value, place)
        elif field.is_repeated and field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for at, part in enumerate(value):
                refuse_unknown(part, f"{place}[{at}]")


def _count(things: Any, name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _require(condition: bool, field: str, problem: str) -> None:
    if not condition:
        raise InvalidInput(field, problem)
