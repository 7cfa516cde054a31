"""Requests from messages, with all validation: defaults filled in, text tokenised, every bound checked.

Field names in errors are paths from the request (``options.sampling.top_p``). Knows no torch and no gRPC.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from knnlm.sampling import SamplingParams
from knnlm_server.engine_protocol import PromptTokenizer
from knnlm_server.errors import DatastoreNotLoaded
from knnlm_server.field_checks import at, count, refuse_unknown, require, values_of
from knnlm_server.input_reader import InputReader, Room
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

    @property
    def _inputs(self) -> InputReader:
        return InputReader(self.tokenizer, self.info)

    def generation(self, message: pb.GenerateRequest | pb.StreamGenerateRequest, request_id: str, tenant: str = "") -> GenerationRequest:
        """The request with defaults filled in and the prompt tokenised, truncated where it asks for that."""
        refuse_unknown(message)
        options = message.options
        stopping = self._stopping(options.stopping)
        stream = isinstance(message, pb.StreamGenerateRequest)
        wanted, samples = self._samples(options, stream)
        detail = self._detail(options.detail)
        if not stream:
            self._check_answer(samples, stopping.max_new_tokens, detail)
        return GenerationRequest(
            request_id=request_id,
            sampling=self._sampling(options.sampling),
            stopping=stopping,
            retrieval=self._retrieval(options.retrieval, "options.retrieval"),
            detail=detail,
            prompt=self._prompt(message.prompt, stopping.max_new_tokens, options.truncate_prompt),
            samples=samples,
            mean_log_prob=samples > wanted,
            tenant=tenant,
        )

    def retrieve(self, message: pb.RetrieveRequest, request_id: str, tenant: str = "") -> RetrieveRequest:
        """The request with defaults filled in and the context tokenised, truncated where it asks for that."""
        refuse_unknown(message)
        given, most = values_of(message), self.info.limits.max_neighbors
        wanted = pb.RetrievalOptions(**{name: given[name] for name in ("k", "knn_temperature", "datastores") if name in given})
        retrieval = replace(self._retrieval(wanted, ""), weight=1.0, adaptive=False)
        neighbors = given.get("neighbors", min(retrieval.k * max(1, len(retrieval.datastores)), most))
        require(1 <= neighbors <= most, "neighbors", f"is {neighbors}, but must be from 1 to {most}.")
        room = self.info.limits.context

        def problem(length: int) -> str:
            return f"has {count(length, 'token')}, but the context holds {room}; shorten it, or set truncate_context."

        tokens = self._inputs.tokens(message.context, "context", Room(room, None if message.truncate_context else problem))
        return RetrieveRequest(request_id=request_id, tokens=tokens, retrieval=retrieval, neighbors=neighbors, tenant=tenant)

    def detokenize(self, message: pb.DetokenizeRequest) -> tuple[int, ...]:
        """Token ids whose text is wanted."""
        refuse_unknown(message)
        ids, limit = message.token_ids, self.info.limits.max_score_tokens
        require(len(ids) <= limit, "token_ids", f"has {count(len(ids), 'token')}, but at most {limit} are taken.")
        self._inputs.check_ids(ids, "token_ids")
        return tuple(ids)

    def score(self, message: pb.ScoreRequest, request_id: str, tenant: str = "") -> ScoreRequest:
        """The request with defaults filled in and the input tokenised."""
        refuse_unknown(message)
        retrieval = self._retrieval(message.retrieval, "retrieval")
        limit = self.info.limits.max_score_tokens
        room = Room(limit, lambda length: f"has {count(length, 'token')}, but must have from 2 to {limit}.", least=2)
        tokens = self._inputs.tokens(message.input, "input", room)
        return ScoreRequest(request_id=request_id, tokens=tokens, retrieval=retrieval, tenant=tenant)

    def tokenize(self, message: pb.TokenizeRequest) -> list[int]:
        """The token ids of a text as a prompt."""
        refuse_unknown(message)
        tokens, limit = self._inputs.encode(message.text, "text"), self.info.limits.max_score_tokens
        require(len(tokens) <= limit, "text", f"has {count(len(tokens), 'token')}, but at most {limit} are taken.")
        return tokens

    def _samples(self, options: pb.GenerationOptions, stream: bool) -> tuple[int, int]:
        """How many completions are returned, and how many are generated for that."""
        given, most = values_of(options), self.info.limits.max_samples
        wanted = given.get("num_samples", 1)
        require(1 <= wanted <= most, "options.num_samples", f"is {wanted}, but must be from 1 to {most}.")
        best_of = given.get("best_of", wanted)
        require(wanted <= best_of <= most, "options.best_of", f"is {best_of}, but must be from num_samples, which is {wanted}, to {most}.")
        require(
            not stream or best_of == wanted, "options.best_of", "can't be more than num_samples in a stream, which can't take tokens back."
        )
        return wanted, best_of

    def _check_answer(self, samples: int, tokens: int, detail: DetailParams) -> None:
        """What is answered in one message is held in memory until its end; a stream hands it out as it comes."""
        most, entries = self.info.limits.max_answer_entries, samples * tokens * (1 + detail.alternatives + detail.neighbors)
        require(
            entries <= most,
            _largest(samples, tokens, detail),
            f"is too large for one answer: {count(samples, 'sample')} of up to {count(tokens, 'token')}, each with {detail.alternatives}"
            f" alternatives and {detail.neighbors} neighbors, have {entries} entries, but at most {most} are answered; lower one of"
            " num_samples or best_of, max_new_tokens, alternatives and neighbors, or use StreamGenerate.",
        )

    def _sampling(self, message: pb.SamplingOptions) -> SamplingParams:
        path, given = "options.sampling", values_of(message)
        given["logit_bias"] = self._logit_bias(message.logit_bias, f"{path}.logit_bias")
        given["bad_words"] = self._inputs.bad_words(message.bad_words, f"{path}.bad_words")
        return replace(SamplingParams(), **given).validate(f"{path}.")

    def _logit_bias(self, biases: Mapping[int, float], path: str) -> tuple[tuple[int, float], ...]:
        """What is added to tokens, by id; ranges of the values are those of :class:`SamplingParams`."""
        most, size = self.info.limits.max_logit_biases, self.info.vocabulary_size
        require(len(biases) <= most, path, f"has {count(len(biases), 'token')}, but at most {most} are taken.")
        for token_id in sorted(biases):
            require(token_id < size, f"{path}[{token_id}]", f"is for a token outside the vocabulary, which has ids 0 to {size - 1}.")
        return tuple(sorted(biases.items()))

    def _prompt(self, message: pb.Input, max_new_tokens: int, truncate: bool) -> tuple[int, ...]:
        context = self.info.limits.context
        room = context - max_new_tokens
        require(
            room >= 1,
            "options.stopping.max_new_tokens",
            f"is {max_new_tokens}, but the context holds {context} tokens, of which the prompt needs at least 1.",
        )

        def problem(length: int) -> str:
            return (
                f"has {count(length, 'token')}, with max_new_tokens {max_new_tokens} together {length + max_new_tokens}, but the context"
                f" holds {context}; shorten it to {room}, ask for fewer new tokens, or set options.truncate_prompt."
            )

        return self._inputs.tokens(message, "prompt", Room(room, None if truncate else problem))

    def _stopping(self, message: pb.StoppingOptions) -> StoppingParams:
        path = "options.stopping"
        self._check_stops(message, path)
        stopping = replace(StoppingParams(), **values_of(message))
        require(stopping.max_new_tokens >= 1, f"{path}.max_new_tokens", "is 0, but must be 1 or more.")
        require(
            stopping.min_new_tokens <= stopping.max_new_tokens,
            f"{path}.min_new_tokens",
            f"is {stopping.min_new_tokens}, but must be at most max_new_tokens, which is {stopping.max_new_tokens}.",
        )
        return replace(stopping, max_seconds=self._seconds(stopping.max_seconds, f"{path}.max_seconds"))

    def _check_stops(self, message: pb.StoppingOptions, path: str) -> None:
        """Strings and ids that end a completion: how many, how long, and whether the vocabulary has them."""
        limits, strings, ids = self.info.limits, message.stop_strings, message.stop_token_ids
        most = limits.max_stop_strings
        require(len(strings) <= most, f"{path}.stop_strings", f"has {len(strings)} strings, but at most {most} are taken.")
        longest = limits.max_stop_string_characters
        for position, string in enumerate(strings):
            require(
                1 <= len(string) <= longest,
                f"{path}.stop_strings[{position}]",
                f"has {count(len(string), 'character')}, but must have from 1 to {longest}.",
            )
        most = limits.max_stop_token_ids
        require(len(ids) <= most, f"{path}.stop_token_ids", f"has {count(len(ids), 'token')}, but at most {most} are taken.")
        self._inputs.check_ids(ids, f"{path}.stop_token_ids")

    def _seconds(self, seconds: float | None, path: str) -> float | None:
        limit = self.info.limits.max_seconds
        if seconds is None:
            return limit
        require(0 < seconds < math.inf, path, f"is {seconds}, but must be above 0, and finite.")
        require(limit is None or seconds <= limit, path, f"is {seconds}, but must be at most {limit}.")
        return seconds

    def _retrieval(self, message: pb.RetrievalOptions, path: str) -> RetrievalParams:
        given = values_of(message)
        if given.pop("off", False):
            require(not given, at(path, "off"), f"is set together with {', '.join(given)}; set either.")
            return RetrievalParams(weight=0.0, k=1, temperature=1.0)
        given.pop("datastores", None)
        chosen = self._datastores(message.datastores, at(path, "datastores"))
        names = {"interpolation_weight": "weight", "k": "k", "knn_temperature": "temperature"}
        retrieval = replace(
            chosen[0].default_retrieval,
            datastores=tuple(_choice(choice) for choice in message.datastores),
            adaptive=chosen[0].default_retrieval.adaptive and not given and len(chosen) == 1,
            **{names[name]: value for name, value in given.items()},
        )
        require(0 <= retrieval.weight <= 1, at(path, "interpolation_weight"), f"is {retrieval.weight}, but must be from 0 to 1.")
        max_k = self.info.limits.max_k
        require(1 <= retrieval.k <= max_k, at(path, "k"), f"is {retrieval.k}, but must be from 1 to {max_k}.")
        require(
            0 < retrieval.temperature < math.inf,
            at(path, "knn_temperature"),
            f"is {retrieval.temperature}, but must be above 0, and finite.",
        )
        return retrieval

    def _datastores(self, choices: Sequence[pb.DatastoreWeight], path: str) -> list[DatastoreInfo]:
        """The datastores that are meant, at least one."""
        loaded = {info.name: info for info in self.info.datastores}
        if not loaded:
            raise DatastoreNotLoaded("No datastore is loaded; a request can only be answered by the base model alone (retrieval off).")
        most = self.info.limits.max_datastores
        require(len(choices) <= most, path, f"has {len(choices)}, but at most {most} are taken.")
        for number, choice in enumerate(choices):
            require(choice.name != "", f"{path}[{number}].name", "is empty.")
            require(choice.name not in {c.name for c in choices[:number]}, f"{path}[{number}].name", f"is {choice.name!r} a second time.")
            weight = choice.weight if choice.HasField("weight") else 1.0
            require(0 < weight < math.inf, f"{path}[{number}].weight", f"is {weight}, but must be above 0, and finite.")
            if choice.name not in loaded:
                raise DatastoreNotLoaded(f"No datastore {choice.name!r} is loaded; there are {', '.join(sorted(loaded))}.")
        chosen = [loaded[choice.name] for choice in choices] or [self.info.datastores[0]]
        kinds = {(info.key_layer, info.key_dimension, info.distance) for info in chosen}
        require(len(kinds) == 1, path, f"can't be mixed: {', '.join(_kind(info) for info in chosen)}.")
        return chosen

    def _detail(self, message: pb.DetailOptions) -> DetailParams:
        path, limits = "options.detail", self.info.limits
        detail = replace(DetailParams(), **values_of(message))
        most = min(limits.max_alternatives, self.info.vocabulary_size)
        require(detail.alternatives <= most, f"{path}.alternatives", f"is {detail.alternatives}, but must be at most {most}.")
        most = limits.max_neighbors
        require(detail.neighbors <= most, f"{path}.neighbors", f"is {detail.neighbors}, but must be at most {most}.")
        return detail


def _largest(samples: int, tokens: int, detail: DetailParams) -> str:
    """The field that makes an answer large, most of all."""
    factors = {
        "options.stopping.max_new_tokens": tokens,
        "options.best_of": samples,
        "options.detail.alternatives": detail.alternatives,
        "options.detail.neighbors": detail.neighbors,
    }
    return max(factors, key=lambda field: factors[field])


def _choice(message: pb.DatastoreWeight) -> DatastoreChoice:
    return DatastoreChoice(message.name, message.weight if message.HasField("weight") else 1.0)


def _kind(info: DatastoreInfo) -> str:
    return f"{info.name} has keys {info.key_layer} of width {info.key_dimension} and distances of the kind {info.distance!r}"
