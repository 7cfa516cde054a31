"""Between protobuf messages and the dataclasses of ``sequence.py``: results, both ways. Knows no torch and no gRPC.

The service and the client both use it; requests are read in ``request_reader.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf.message import Message

from knnlm_server.metadata import metadata_message, read_metadata
from knnlm_server.pb import generation_pb2 as pb
from knnlm_server.sequence import (
    Alternative,
    CompletionEvidence,
    DatastoreInfo,
    DocumentWeight,
    FinishEvent,
    FinishReason,
    Limits,
    NeighborEvidence,
    RetrievalParams,
    RetrieveRequest,
    RetrieveResult,
    ScoreRequest,
    ScoreResult,
    ServerInfo,
    TokenEvent,
    VerbatimRun,
)

_REASON_PREFIX = "FINISH_REASON_"


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
    fields = vars(neighbor) | {"metadata": metadata_message(neighbor.metadata) if neighbor.metadata else None}
    return pb.Neighbor(**fields)


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
        metadata=read_metadata(message.metadata),
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


def completion_message(tokens: Sequence[pb.GeneratedToken], finish: FinishEvent) -> pb.Completion:
    """The message of a whole completion from the messages of its tokens."""
    return pb.Completion(
        sample=finish.sample,
        text="".join(token.text for token in tokens) + finish.text,
        tokens=tokens,
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
        knn_log_probs=result.knn_log_probs if request.retrieval.searches else (),
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
    defaults = pb.DefaultRetrieval(
        interpolation_weight=retrieval.weight, k=retrieval.k, knn_temperature=retrieval.temperature, adaptive_weight=retrieval.adaptive
    )
    return pb.DatastoreInfo(**facts, default_retrieval=defaults)


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
    default = RetrievalParams(retrieval.interpolation_weight, retrieval.k, retrieval.knn_temperature, adaptive=retrieval.adaptive_weight)
    return DatastoreInfo(**facts | {"default_retrieval": default})


def _optional(message: Message, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None
