from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_EOS: _ClassVar[FinishReason]
    FINISH_REASON_STOP_STRING: _ClassVar[FinishReason]
    FINISH_REASON_STOP_TOKEN: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_TIME: _ClassVar[FinishReason]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_EOS: FinishReason
FINISH_REASON_STOP_STRING: FinishReason
FINISH_REASON_STOP_TOKEN: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_TIME: FinishReason

class Input(_message.Message):
    __slots__ = ("text", "token_ids")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: TokenIds
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class GenerationOptions(_message.Message):
    __slots__ = ("sampling", "stopping", "retrieval", "detail", "truncate_prompt", "num_samples", "best_of")
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    RETRIEVAL_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    BEST_OF_FIELD_NUMBER: _ClassVar[int]
    sampling: SamplingOptions
    stopping: StoppingOptions
    retrieval: RetrievalOptions
    detail: DetailOptions
    truncate_prompt: bool
    num_samples: int
    best_of: int
    def __init__(self, sampling: _Optional[_Union[SamplingOptions, _Mapping]] = ..., stopping: _Optional[_Union[StoppingOptions, _Mapping]] = ..., retrieval: _Optional[_Union[RetrievalOptions, _Mapping]] = ..., detail: _Optional[_Union[DetailOptions, _Mapping]] = ..., truncate_prompt: _Optional[bool] = ..., num_samples: _Optional[int] = ..., best_of: _Optional[int] = ...) -> None: ...

class SamplingOptions(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "typical_p", "frequency_penalty", "presence_penalty", "logit_bias", "bad_words")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TYPICAL_P_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    typical_p: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    bad_words: _containers.RepeatedCompositeFieldContainer[Input]
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., typical_p: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., bad_words: _Optional[_Iterable[_Union[Input, _Mapping]]] = ...) -> None: ...

class StoppingOptions(_message.Message):
    __slots__ = ("max_new_tokens", "min_new_tokens", "stop_strings", "stop_token_ids", "ignore_eos", "max_seconds")
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_STRINGS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    MAX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    max_new_tokens: int
    min_new_tokens: int
    stop_strings: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    max_seconds: float
    def __init__(self, max_new_tokens: _Optional[int] = ..., min_new_tokens: _Optional[int] = ..., stop_strings: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., max_seconds: _Optional[float] = ...) -> None: ...

class RetrievalOptions(_message.Message):
    __slots__ = ("interpolation_weight", "k", "knn_temperature", "off", "datastores")
    INTERPOLATION_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    KNN_TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    OFF_FIELD_NUMBER: _ClassVar[int]
    DATASTORES_FIELD_NUMBER: _ClassVar[int]
    interpolation_weight: float
    k: int
    knn_temperature: float
    off: bool
    datastores: _containers.RepeatedCompositeFieldContainer[DatastoreWeight]
    def __init__(self, interpolation_weight: _Optional[float] = ..., k: _Optional[int] = ..., knn_temperature: _Optional[float] = ..., off: _Optional[bool] = ..., datastores: _Optional[_Iterable[_Union[DatastoreWeight, _Mapping]]] = ...) -> None: ...

class DatastoreWeight(_message.Message):
    __slots__ = ("name", "weight")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    name: str
    weight: float
    def __init__(self, name: _Optional[str] = ..., weight: _Optional[float] = ...) -> None: ...

class DetailOptions(_message.Message):
    __slots__ = ("log_probs", "alternatives", "neighbors", "evidence")
    LOG_PROBS_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    NEIGHBORS_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    log_probs: bool
    alternatives: int
    neighbors: int
    evidence: bool
    def __init__(self, log_probs: _Optional[bool] = ..., alternatives: _Optional[int] = ..., neighbors: _Optional[int] = ..., evidence: _Optional[bool] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("prompt", "options")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    prompt: Input
    options: GenerationOptions
    def __init__(self, prompt: _Optional[_Union[Input, _Mapping]] = ..., options: _Optional[_Union[GenerationOptions, _Mapping]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("completions", "prompt_tokens")
    COMPLETIONS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    completions: _containers.RepeatedCompositeFieldContainer[Completion]
    prompt_tokens: int
    def __init__(self, completions: _Optional[_Iterable[_Union[Completion, _Mapping]]] = ..., prompt_tokens: _Optional[int] = ...) -> None: ...

class Completion(_message.Message):
    __slots__ = ("sample", "text", "tokens", "finish_reason", "completion_tokens", "evidence")
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    sample: int
    text: str
    tokens: _containers.RepeatedCompositeFieldContainer[GeneratedToken]
    finish_reason: FinishReason
    completion_tokens: int
    evidence: CompletionEvidence
    def __init__(self, sample: _Optional[int] = ..., text: _Optional[str] = ..., tokens: _Optional[_Iterable[_Union[GeneratedToken, _Mapping]]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., completion_tokens: _Optional[int] = ..., evidence: _Optional[_Union[CompletionEvidence, _Mapping]] = ...) -> None: ...

class StreamGenerateRequest(_message.Message):
    __slots__ = ("prompt", "options")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    prompt: Input
    options: GenerationOptions
    def __init__(self, prompt: _Optional[_Union[Input, _Mapping]] = ..., options: _Optional[_Union[GenerationOptions, _Mapping]] = ...) -> None: ...

class StreamGenerateResponse(_message.Message):
    __slots__ = ("token", "finish")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    token: GeneratedToken
    finish: Finish
    def __init__(self, token: _Optional[_Union[GeneratedToken, _Mapping]] = ..., finish: _Optional[_Union[Finish, _Mapping]] = ...) -> None: ...

class Finish(_message.Message):
    __slots__ = ("finish_reason", "text", "prompt_tokens", "completion_tokens", "sample", "evidence")
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    finish_reason: FinishReason
    text: str
    prompt_tokens: int
    completion_tokens: int
    sample: int
    evidence: CompletionEvidence
    def __init__(self, finish_reason: _Optional[_Union[FinishReason, str]] = ..., text: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., sample: _Optional[int] = ..., evidence: _Optional[_Union[CompletionEvidence, _Mapping]] = ...) -> None: ...

class CompletionEvidence(_message.Message):
    __slots__ = ("changed_share", "searched_tokens", "documents", "verbatim")
    CHANGED_SHARE_FIELD_NUMBER: _ClassVar[int]
    SEARCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    VERBATIM_FIELD_NUMBER: _ClassVar[int]
    changed_share: float
    searched_tokens: int
    documents: _containers.RepeatedCompositeFieldContainer[DocumentWeight]
    verbatim: VerbatimRun
    def __init__(self, changed_share: _Optional[float] = ..., searched_tokens: _Optional[int] = ..., documents: _Optional[_Iterable[_Union[DocumentWeight, _Mapping]]] = ..., verbatim: _Optional[_Union[VerbatimRun, _Mapping]] = ...) -> None: ...

class DocumentWeight(_message.Message):
    __slots__ = ("datastore", "document_id", "source", "weight")
    DATASTORE_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_ID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    datastore: str
    document_id: str
    source: str
    weight: float
    def __init__(self, datastore: _Optional[str] = ..., document_id: _Optional[str] = ..., source: _Optional[str] = ..., weight: _Optional[float] = ...) -> None: ...

class VerbatimRun(_message.Message):
    __slots__ = ("start", "tokens", "text", "datastore", "document_id", "source", "character_start", "character_end", "line")
    START_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    DATASTORE_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_ID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    CHARACTER_START_FIELD_NUMBER: _ClassVar[int]
    CHARACTER_END_FIELD_NUMBER: _ClassVar[int]
    LINE_FIELD_NUMBER: _ClassVar[int]
    start: int
    tokens: int
    text: str
    datastore: str
    document_id: str
    source: str
    character_start: int
    character_end: int
    line: int
    def __init__(self, start: _Optional[int] = ..., tokens: _Optional[int] = ..., text: _Optional[str] = ..., datastore: _Optional[str] = ..., document_id: _Optional[str] = ..., source: _Optional[str] = ..., character_start: _Optional[int] = ..., character_end: _Optional[int] = ..., line: _Optional[int] = ...) -> None: ...

class GeneratedToken(_message.Message):
    __slots__ = ("index", "token_id", "text", "token_text", "log_prob", "lm_log_prob", "knn_log_prob", "knn_share", "alternatives", "neighbors", "interpolation_weight", "sample")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_TEXT_FIELD_NUMBER: _ClassVar[int]
    LOG_PROB_FIELD_NUMBER: _ClassVar[int]
    LM_LOG_PROB_FIELD_NUMBER: _ClassVar[int]
    KNN_LOG_PROB_FIELD_NUMBER: _ClassVar[int]
    KNN_SHARE_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    NEIGHBORS_FIELD_NUMBER: _ClassVar[int]
    INTERPOLATION_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    index: int
    token_id: int
    text: str
    token_text: str
    log_prob: float
    lm_log_prob: float
    knn_log_prob: float
    knn_share: float
    alternatives: _containers.RepeatedCompositeFieldContainer[Alternative]
    neighbors: _containers.RepeatedCompositeFieldContainer[Neighbor]
    interpolation_weight: float
    sample: int
    def __init__(self, index: _Optional[int] = ..., token_id: _Optional[int] = ..., text: _Optional[str] = ..., token_text: _Optional[str] = ..., log_prob: _Optional[float] = ..., lm_log_prob: _Optional[float] = ..., knn_log_prob: _Optional[float] = ..., knn_share: _Optional[float] = ..., alternatives: _Optional[_Iterable[_Union[Alternative, _Mapping]]] = ..., neighbors: _Optional[_Iterable[_Union[Neighbor, _Mapping]]] = ..., interpolation_weight: _Optional[float] = ..., sample: _Optional[int] = ...) -> None: ...

class Alternative(_message.Message):
    __slots__ = ("token_id", "text", "log_prob", "lm_log_prob", "knn_log_prob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOG_PROB_FIELD_NUMBER: _ClassVar[int]
    LM_LOG_PROB_FIELD_NUMBER: _ClassVar[int]
    KNN_LOG_PROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    text: str
    log_prob: float
    lm_log_prob: float
    knn_log_prob: float
    def __init__(self, token_id: _Optional[int] = ..., text: _Optional[str] = ..., log_prob: _Optional[float] = ..., lm_log_prob: _Optional[float] = ..., knn_log_prob: _Optional[float] = ...) -> None: ...

class Neighbor(_message.Message):
    __slots__ = ("entry", "token_id", "text", "weight", "distance", "document_id", "source", "character_start", "character_end", "line", "left_context", "datastore", "metadata")
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    DISTANCE_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_ID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    CHARACTER_START_FIELD_NUMBER: _ClassVar[int]
    CHARACTER_END_FIELD_NUMBER: _ClassVar[int]
    LINE_FIELD_NUMBER: _ClassVar[int]
    LEFT_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    DATASTORE_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    entry: int
    token_id: int
    text: str
    weight: float
    distance: float
    document_id: str
    source: str
    character_start: int
    character_end: int
    line: int
    left_context: str
    datastore: str
    metadata: _struct_pb2.Struct
    def __init__(self, entry: _Optional[int] = ..., token_id: _Optional[int] = ..., text: _Optional[str] = ..., weight: _Optional[float] = ..., distance: _Optional[float] = ..., document_id: _Optional[str] = ..., source: _Optional[str] = ..., character_start: _Optional[int] = ..., character_end: _Optional[int] = ..., line: _Optional[int] = ..., left_context: _Optional[str] = ..., datastore: _Optional[str] = ..., metadata: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("input", "retrieval")
    INPUT_FIELD_NUMBER: _ClassVar[int]
    RETRIEVAL_FIELD_NUMBER: _ClassVar[int]
    input: Input
    retrieval: RetrievalOptions
    def __init__(self, input: _Optional[_Union[Input, _Mapping]] = ..., retrieval: _Optional[_Union[RetrievalOptions, _Mapping]] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("token_ids", "log_probs", "lm_log_probs", "knn_log_probs")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOG_PROBS_FIELD_NUMBER: _ClassVar[int]
    LM_LOG_PROBS_FIELD_NUMBER: _ClassVar[int]
    KNN_LOG_PROBS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    log_probs: _containers.RepeatedScalarFieldContainer[float]
    lm_log_probs: _containers.RepeatedScalarFieldContainer[float]
    knn_log_probs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., log_probs: _Optional[_Iterable[float]] = ..., lm_log_probs: _Optional[_Iterable[float]] = ..., knn_log_probs: _Optional[_Iterable[float]] = ...) -> None: ...

class RetrieveRequest(_message.Message):
    __slots__ = ("context", "datastores", "k", "knn_temperature", "neighbors", "truncate_context")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    DATASTORES_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    KNN_TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    NEIGHBORS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    context: Input
    datastores: _containers.RepeatedCompositeFieldContainer[DatastoreWeight]
    k: int
    knn_temperature: float
    neighbors: int
    truncate_context: bool
    def __init__(self, context: _Optional[_Union[Input, _Mapping]] = ..., datastores: _Optional[_Iterable[_Union[DatastoreWeight, _Mapping]]] = ..., k: _Optional[int] = ..., knn_temperature: _Optional[float] = ..., neighbors: _Optional[int] = ..., truncate_context: _Optional[bool] = ...) -> None: ...

class RetrieveResponse(_message.Message):
    __slots__ = ("token_ids", "neighbors")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NEIGHBORS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    neighbors: _containers.RepeatedCompositeFieldContainer[Neighbor]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., neighbors: _Optional[_Iterable[_Union[Neighbor, _Mapping]]] = ...) -> None: ...

class TokenizeRequest(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class TokenizeResponse(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[TokenizedToken]
    def __init__(self, tokens: _Optional[_Iterable[_Union[TokenizedToken, _Mapping]]] = ...) -> None: ...

class TokenizedToken(_message.Message):
    __slots__ = ("token_id", "text")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    text: str
    def __init__(self, token_id: _Optional[int] = ..., text: _Optional[str] = ...) -> None: ...

class DetokenizeRequest(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class DetokenizeResponse(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "model", "model_fingerprint", "tokenizer_fingerprint", "vocabulary_size", "datastores", "limits", "settings")
    class SettingsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_SIZE_FIELD_NUMBER: _ClassVar[int]
    DATASTORES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    version: str
    model: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    vocabulary_size: int
    datastores: _containers.RepeatedCompositeFieldContainer[DatastoreInfo]
    limits: Limits
    settings: _containers.ScalarMap[str, str]
    def __init__(self, version: _Optional[str] = ..., model: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., tokenizer_fingerprint: _Optional[str] = ..., vocabulary_size: _Optional[int] = ..., datastores: _Optional[_Iterable[_Union[DatastoreInfo, _Mapping]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., settings: _Optional[_Mapping[str, str]] = ...) -> None: ...

class DatastoreInfo(_message.Message):
    __slots__ = ("name", "fingerprint", "entries", "documents", "index", "key_layer", "key_dimension", "distance", "default_retrieval", "defaults_source")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    KEY_LAYER_FIELD_NUMBER: _ClassVar[int]
    KEY_DIMENSION_FIELD_NUMBER: _ClassVar[int]
    DISTANCE_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_RETRIEVAL_FIELD_NUMBER: _ClassVar[int]
    DEFAULTS_SOURCE_FIELD_NUMBER: _ClassVar[int]
    name: str
    fingerprint: str
    entries: int
    documents: int
    index: str
    key_layer: str
    key_dimension: int
    distance: str
    default_retrieval: DefaultRetrieval
    defaults_source: str
    def __init__(self, name: _Optional[str] = ..., fingerprint: _Optional[str] = ..., entries: _Optional[int] = ..., documents: _Optional[int] = ..., index: _Optional[str] = ..., key_layer: _Optional[str] = ..., key_dimension: _Optional[int] = ..., distance: _Optional[str] = ..., default_retrieval: _Optional[_Union[DefaultRetrieval, _Mapping]] = ..., defaults_source: _Optional[str] = ...) -> None: ...

class DefaultRetrieval(_message.Message):
    __slots__ = ("interpolation_weight", "k", "knn_temperature", "adaptive_weight")
    INTERPOLATION_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    KNN_TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    ADAPTIVE_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    interpolation_weight: float
    k: int
    knn_temperature: float
    adaptive_weight: bool
    def __init__(self, interpolation_weight: _Optional[float] = ..., k: _Optional[int] = ..., knn_temperature: _Optional[float] = ..., adaptive_weight: _Optional[bool] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("context", "max_k", "max_alternatives", "max_neighbors", "max_concurrent", "max_waiting_requests", "max_waiting_tokens", "max_score_tokens", "max_stop_strings", "max_stop_string_characters", "max_text_bytes", "max_samples", "max_logit_biases", "max_bad_words", "max_datastores", "max_evidence_documents", "max_message_bytes", "max_seconds", "max_unread_events", "max_stop_token_ids")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    MAX_K_FIELD_NUMBER: _ClassVar[int]
    MAX_ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    MAX_NEIGHBORS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONCURRENT_FIELD_NUMBER: _ClassVar[int]
    MAX_WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_SCORE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_STOP_STRINGS_FIELD_NUMBER: _ClassVar[int]
    MAX_STOP_STRING_CHARACTERS_FIELD_NUMBER: _ClassVar[int]
    MAX_TEXT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    MAX_LOGIT_BIASES_FIELD_NUMBER: _ClassVar[int]
    MAX_BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    MAX_DATASTORES_FIELD_NUMBER: _ClassVar[int]
    MAX_EVIDENCE_DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MAX_UNREAD_EVENTS_FIELD_NUMBER: _ClassVar[int]
    MAX_STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    context: int
    max_k: int
    max_alternatives: int
    max_neighbors: int
    max_concurrent: int
    max_waiting_requests: int
    max_waiting_tokens: int
    max_score_tokens: int
    max_stop_strings: int
    max_stop_string_characters: int
    max_text_bytes: int
    max_samples: int
    max_logit_biases: int
    max_bad_words: int
    max_datastores: int
    max_evidence_documents: int
    max_message_bytes: int
    max_seconds: float
    max_unread_events: int
    max_stop_token_ids: int
    def __init__(self, context: _Optional[int] = ..., max_k: _Optional[int] = ..., max_alternatives: _Optional[int] = ..., max_neighbors: _Optional[int] = ..., max_concurrent: _Optional[int] = ..., max_waiting_requests: _Optional[int] = ..., max_waiting_tokens: _Optional[int] = ..., max_score_tokens: _Optional[int] = ..., max_stop_strings: _Optional[int] = ..., max_stop_string_characters: _Optional[int] = ..., max_text_bytes: _Optional[int] = ..., max_samples: _Optional[int] = ..., max_logit_biases: _Optional[int] = ..., max_bad_words: _Optional[int] = ..., max_datastores: _Optional[int] = ..., max_evidence_documents: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., max_seconds: _Optional[float] = ..., max_unread_events: _Optional[int] = ..., max_stop_token_ids: _Optional[int] = ...) -> None: ...
