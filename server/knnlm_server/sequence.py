"""What passes between the gRPC border and the engine, and one request's life. Knows no torch and no gRPC."""

from __future__ import annotations

import enum
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from knnlm.mixture import MOST_NEIGHBORS
from knnlm.sampling import SamplingParams

DATASTORE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a datastore may be called: 1 to 64 letters, digits, ``-``, ``_`` and ``.``, of which the first is a letter or digit."""

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
"""What ids of their own clients may give to their calls."""


class FinishReason(enum.Enum):
    """Why a completion ended."""

    EOS = "eos"
    STOP_STRING = "stop_string"
    STOP_TOKEN = "stop_token"
    LENGTH = "length"
    TIME = "time"


@dataclass(frozen=True)
class StoppingParams:
    """When a completion ends. ``stop_strings`` are left out of the text; ``ignore_eos`` goes on after the EOS token;
    ``max_seconds`` count from the request's arrival (None: no bound).
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_seconds: float | None = None


@dataclass(frozen=True)
class DatastoreChoice:
    """A datastore by its name, and how much its neighbours count relative to those of others in the same mix."""

    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class RetrievalParams:
    """The mixture of one request, defaults already filled in: p = weight·p_kNN + (1-weight)·p_LM.

    ``weight`` 0 to 1 (0: no search); ``k`` neighbours from each datastore; ``temperature`` of the softmax over negative
    squared distances; ``datastores`` that are searched (empty: the default one). ``adaptive``: the request left weight, k and
    temperature to its one datastore, whose gate says the weight of each token.
    """

    weight: float
    k: int
    temperature: float
    datastores: tuple[DatastoreChoice, ...] = ()
    adaptive: bool = False

    @property
    def searches(self) -> bool:
        """Whether any token may be searched for."""
        return self.weight > 0 or self.adaptive


@dataclass(frozen=True)
class DetailParams:
    """What is reported with each token beside its id and text, and with each completion: only what was asked for."""

    log_probs: bool = False
    alternatives: int = 0
    neighbors: int = 0
    evidence: bool = False


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to be continued. ``prompt`` holds token ids, special tokens included.

    ``samples``: completions that are generated (num_samples, or best_of where that is more). ``mean_log_prob`` asks for it
    with each completion's end. ``tenant``: whose request it is; requests of different tenants share no computed prefix.
    ``arrived``: when, in seconds of ``time.monotonic``.
    """

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    stopping: StoppingParams
    retrieval: RetrievalParams
    detail: DetailParams = DetailParams()
    samples: int = 1
    mean_log_prob: bool = False
    tenant: str = ""
    arrived: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class ScoreRequest:
    """Tokens to be scored, special tokens included; token 0 is context only."""

    request_id: str
    tokens: tuple[int, ...]
    retrieval: RetrievalParams


@dataclass(frozen=True)
class RetrieveRequest:
    """A context whose neighbours are wanted. ``neighbors``: how many of those that vote are handed out, the heaviest first.

    ``retrieval.weight`` is 1: a search is what is asked for. ``tenant`` and ``arrived`` as in :class:`GenerationRequest`.
    """

    request_id: str
    tokens: tuple[int, ...]
    retrieval: RetrievalParams
    neighbors: int
    tenant: str = ""
    arrived: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Alternative:
    """One of the most probable tokens at a step; natural logarithms, before penalties and temperature.

    ``lm_log_prob`` and ``knn_log_prob`` are None where not asked for; the latter also where no neighbours were searched.
    """

    token_id: int
    text: str
    log_prob: float
    lm_log_prob: float | None = None
    knn_log_prob: float | None = None


@dataclass(frozen=True)
class NeighborEvidence:
    """A neighbour that voted for a token.

    ``weight``: its share of p_kNN (0 to 1). ``distance``: squared L2. ``document_id`` and ``source`` name the document;
    ``character_start``/``character_end`` is the span of its token there and ``line`` its line, counted from 1 (None
    where the store was built from token ids). ``left_context``: the text before the token. ``datastore``: its name.
    ``metadata``: further fields of the document.
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
    datastore: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenEvent:
    """A generated token. ``text`` is what became certain with it (may be empty, may hold text of tokens before it).

    ``token_text`` is the token alone, for display. Log-probabilities are natural, before penalties and temperature:
    of the mixture, of the LM, and of the neighbours (None where not asked for; ``knn_log_prob`` is -inf where no
    neighbour has the token, None where none were searched). ``knn_share`` is the part of the token's probability that came
    from the neighbours, 0 to 1.
    ``interpolation_weight`` is the λ that was used. ``sample``: which of the request's completions it belongs to.
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
    interpolation_weight: float | None = None
    sample: int = 0


@dataclass(frozen=True)
class DocumentWeight:
    """A document and what it contributed to a completion: ``weight`` in tokens, as ``generation.proto`` defines it."""

    datastore: str
    document_id: str
    source: str
    weight: float


@dataclass(frozen=True)
class VerbatimRun:
    """The longest run of a completion's tokens, ``tokens`` of them from number ``start`` on, that stands in a document just so.

    Characters [start, end) and line (from 1) in the document; None where the store was built from token ids.
    """

    start: int
    tokens: int
    text: str
    datastore: str
    document_id: str
    source: str
    character_start: int | None
    character_end: int | None
    line: int | None


@dataclass(frozen=True)
class CompletionEvidence:
    """What the datastores had to do with a completion; see ``generation.proto``."""

    changed_share: float
    searched_tokens: int
    documents: tuple[DocumentWeight, ...]
    verbatim: VerbatimRun | None


@dataclass(frozen=True)
class FinishEvent:
    """The end of a completion: why, the text that was still held back, and counts of tokens.

    ``mean_log_prob``: of its tokens under the mixture (None where not asked for; 0 without tokens).
    """

    reason: FinishReason
    text: str
    prompt_tokens: int
    completion_tokens: int
    sample: int = 0
    evidence: CompletionEvidence | None = None
    mean_log_prob: float | None = None


@dataclass(frozen=True)
class ScoreResult:
    """Natural log-probabilities of tokens 1..n-1: of the mixture, the LM, and the neighbours (-inf: not among them, or none
    were searched)."""

    log_probs: tuple[float, ...]
    lm_log_probs: tuple[float, ...]
    knn_log_probs: tuple[float, ...]


@dataclass(frozen=True)
class RetrieveResult:
    """Neighbours of a context, the heaviest first."""

    neighbors: tuple[NeighborEvidence, ...]


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and what the server takes on, as ``generation.proto`` documents it.

    ``context``: tokens of prompt and completion together; ``max_seconds`` None: no limit.
    """

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
    max_stop_token_ids: int = 1000
    max_text_bytes: int = 4_000_000
    max_samples: int = 8
    max_logit_biases: int = 1000
    max_bad_words: int = 100
    max_datastores: int = 8
    max_evidence_documents: int = 100
    max_message_bytes: int = 16 * 1024 * 1024
    max_seconds: float | None = None
    max_unread_events: int = 1024


@dataclass(frozen=True)
class DatastoreInfo:
    """A datastore that is loaded. ``entries`` and ``documents`` are those not removed; ``distance`` is exact or index."""

    name: str
    fingerprint: str
    entries: int
    documents: int
    index: str
    key_layer: str
    key_dimension: int
    distance: str
    default_retrieval: RetrievalParams
    defaults_source: str


@dataclass(frozen=True)
class ServerInfo:
    """What a client can know of the server: model, datastores (the default one first), limits, resolved configuration."""

    version: str
    model: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    vocabulary_size: int
    datastores: tuple[DatastoreInfo, ...]
    limits: Limits
    settings: dict[str, str] = field(default_factory=dict)
