"""What passes between the gRPC border and the engine, and one request's life. Knows no torch and no gRPC."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from knnlm.mixture import MOST_NEIGHBORS
from knnlm.sampling import SamplingParams


class FinishReason(enum.Enum):
    """Why a completion ended."""

    EOS = "eos"
    STOP_STRING = "stop_string"
    STOP_TOKEN = "stop_token"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class StoppingParams:
    """When a completion ends. ``stop_strings`` are left out of the text; ``ignore_eos`` goes on after the EOS token."""

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class RetrievalParams:
    """The mixture of one request, defaults already filled in: p = weight·p_kNN + (1-weight)·p_LM.

    ``weight`` 0 to 1 (0: no search); ``k`` neighbours; ``temperature`` of the softmax over negative squared distances.
    """

    weight: float
    k: int
    temperature: float


@dataclass(frozen=True)
class DetailParams:
    """What is reported with each token beside its id and text: only what was asked for."""

    log_probs: bool = False
    alternatives: int = 0
    neighbors: int = 0


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to be continued. ``prompt`` holds token ids, special tokens included."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    stopping: StoppingParams
    retrieval: RetrievalParams
    detail: DetailParams = DetailParams()


@dataclass(frozen=True)
class ScoreRequest:
    """Tokens to be scored, special tokens included; token 0 is context only. ``text`` is None for token input."""

    request_id: str
    tokens: tuple[int, ...]
    retrieval: RetrievalParams


@dataclass(frozen=True)
class Alternative:
    """One of the most probable tokens at a step; natural logarithm, before penalties and temperature."""

    token_id: int
    text: str
    log_prob: float


@dataclass(frozen=True)
class NeighborEvidence:
    """A neighbour that voted for a token.

    ``weight``: its share of p_kNN (0 to 1). ``distance``: squared L2. ``document_id`` and ``source`` name the document;
    ``character_start``/``character_end`` is the span of its token there and ``line`` its line, counted from 1 (None
    where the store was built from token ids). ``left_context``: the text before the token.
    """

    entry: int
    token_id: int
    text: str
    weight: float
    distance: float
    document_id: str
    source: str
    character_start: int | None
    character_end: int | None
    line: int | None
    left_context: str


@dataclass(frozen=True)
class TokenEvent:
    """A generated token. ``text`` is what became certain with it (may be empty, may hold text of tokens before it).

    ``token_text`` is the token alone, for display. Log-probabilities are natural, before penalties and temperature:
    of the mixture, of the LM, and of the neighbours (None where not asked for; ``knn_log_prob`` is -inf where no
    neighbour has the token, None at weight 0). ``knn_share`` is the part of the token's probability that came from the neighbours, 0 to 1.
    """

    index: int
    token_id: int
    text: str
    token_text: str
    log_prob: float | None = None
    lm_log_prob: float | None = None
    knn_log_prob: float | None = None
    knn_share: float | None = None
    alternatives: tuple[Alternative, ...] = ()
    neighbors: tuple[NeighborEvidence, ...] = ()


@dataclass(frozen=True)
class FinishEvent:
    """The end of a completion: why, the text that was still held back, and counts of tokens."""

    reason: FinishReason
    text: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class ScoreResult:
    """Natural log-probabilities of tokens 1..n-1: of the mixture, the LM, and the neighbours (-inf: not among them)."""

    log_probs: tuple[float, ...]
    lm_log_probs: tuple[float, ...]
    knn_log_probs: tuple[float, ...]


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and what the server takes on. ``context``: prompt and completion together."""

    context: int
    max_k: int = MOST_NEIGHBORS
    max_alternatives: int = 100
    max_neighbors: int = 100
    max_concurrent: int = 8
    max_waiting_requests: int = 256
    max_waiting_tokens: int = 1_000_000
    max_score_tokens: int = 1_000_000
    max_stop_strings: int = 16
    max_stop_string_characters: int = 1000
    max_text_bytes: int = 4_000_000


@dataclass(frozen=True)
class ServerInfo:
    """What a client can know of the server: facts from the store's manifest and the limits in force."""

    version: str
    model: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    vocabulary_size: int
    key_layer: str
    key_dimension: int
    store_fingerprint: str
    entries: int
    documents: int
    index: str
    default_retrieval: RetrievalParams
    defaults_source: str
    limits: Limits
    settings: dict[str, str] = field(default_factory=dict)
