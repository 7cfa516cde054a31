"""The calls that clients make: which method, with which message, and how its response is read. Shared by all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from knnlm_server import client_options as options_
from knnlm_server import client_results as results
from knnlm_server.client_options import GenerationOptions, Prompt, RetrievalOptions, RetrieveOptions
from knnlm_server.converters import read_server_info
from knnlm_server.pb import generation_pb2 as pb
from knnlm_server.sequence import ServerInfo

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Call(Generic[ResultT]):
    """A call of one request and one response: the method's name, the request, and how the response is read."""

    method: str
    request: Message
    read: Callable[[Any], ResultT]


def generate(prompt: Prompt, options: GenerationOptions, best_of: int | None) -> Call[results.Completion]:
    """One completion."""
    request = options_.generation_request(pb.GenerateRequest(), prompt, options, best_of=best_of)
    return Call("Generate", request, lambda response: results.read_completions(response)[0])


def samples(prompt: Prompt, options: GenerationOptions, num_samples: int, best_of: int | None) -> Call[tuple[results.Completion, ...]]:
    """Several completions."""
    request = options_.generation_request(pb.GenerateRequest(), prompt, options, num_samples=num_samples, best_of=best_of)
    return Call("Generate", request, results.read_completions)


def stream(prompt: Prompt, options: GenerationOptions, num_samples: int | None) -> pb.StreamGenerateRequest:
    """The request of a stream."""
    return options_.generation_request(pb.StreamGenerateRequest(), prompt, options, num_samples=num_samples)


def score(tokens: Prompt, options: RetrievalOptions) -> Call[results.ScoredTokens]:
    """Scores of a text."""
    return Call("Score", options_.score_request(tokens, options), results.read_scored)


def retrieve(context: Prompt, options: RetrieveOptions) -> Call[results.Retrieved]:
    """Neighbours of a context."""
    return Call("Retrieve", options_.retrieve_request(context, options), results.read_retrieved)


def tokenize(text: str) -> Call[tuple[results.Token, ...]]:
    """Tokens of a text."""
    return Call("Tokenize", options_.tokenize_request(text), results.read_tokens)


def detokenize(token_ids: Iterable[int]) -> Call[str]:
    """Text of tokens."""
    return Call("Detokenize", options_.detokenize_request(token_ids), _text)


def server_info() -> Call[ServerInfo]:
    """What is served."""
    return Call("GetServerInfo", pb.GetServerInfoRequest(), read_server_info)


def _text(response: pb.DetokenizeResponse) -> str:
    return response.text
