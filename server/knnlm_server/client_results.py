"""What the clients return, made of the server's messages. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from knnlm_server.converters import read_completion, read_finish, read_neighbor, read_token
from knnlm_server.pb import generation_pb2 as pb
from knnlm_server.sequence import CompletionEvidence, FinishEvent, FinishReason, NeighborEvidence, ScoreResult, TokenEvent


@dataclass(frozen=True)
class Completion:
    """A whole completion: ``text`` without the prompt, its tokens, why it ended, and how many tokens were read and made.

    ``sample``: its number among the completions of the prompt. ``evidence``: what the datastores had to do with it,
    None where not asked for.
    """

    text: str
    tokens: tuple[TokenEvent, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    sample: int = 0
    evidence: CompletionEvidence | None = None


@dataclass(frozen=True)
class ScoredTokens(ScoreResult):
    """Log-probabilities of ``token_ids[1:]``; ``knn_log_probs`` is empty where no search was made."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Retrieved:
    """Neighbours of the context ``token_ids`` (special tokens included), the largest weight first."""

    token_ids: tuple[int, ...]
    neighbors: tuple[NeighborEvidence, ...]


@dataclass(frozen=True)
class Token:
    """A token of a text, with its text for display."""

    token_id: int
    text: str


def read_events(response: pb.StreamGenerateResponse) -> list[TokenEvent | FinishEvent]:
    """The events of one message of a stream, in order."""
    return [*map(read_token, response.tokens), *map(read_finish, response.finishes)]


def read_completions(response: pb.GenerateResponse) -> tuple[Completion, ...]:
    """All completions of a prompt, in the order in which the server sent them."""
    return tuple(_completion(*read_completion(message, response.prompt_tokens)) for message in response.completions)


def read_scored(response: pb.ScoreResponse) -> ScoredTokens:
    """The scores of a text."""
    return ScoredTokens(
        log_probs=tuple(response.log_probs),
        lm_log_probs=tuple(response.lm_log_probs),
        knn_log_probs=tuple(response.knn_log_probs),
        token_ids=tuple(response.token_ids),
    )


def read_retrieved(response: pb.RetrieveResponse) -> Retrieved:
    """The neighbours of a context."""
    return Retrieved(tuple(response.token_ids), tuple(read_neighbor(neighbor) for neighbor in response.neighbors))


def read_tokens(response: pb.TokenizeResponse) -> tuple[Token, ...]:
    """The tokens of a text."""
    return tuple(Token(token.token_id, token.text) for token in response.tokens)


def _completion(tokens: list[TokenEvent], finish: FinishEvent) -> Completion:
    return Completion(
        text=finish.text,
        tokens=tuple(tokens),
        finish_reason=finish.reason,
        prompt_tokens=finish.prompt_tokens,
        completion_tokens=finish.completion_tokens,
        sample=finish.sample,
        evidence=finish.evidence,
    )
