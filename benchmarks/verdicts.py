"""Whether a request ended as it may: with exactly its tokens, or with one status that is right for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.streams import OK
from benchmarks.traffic import Ended, Kind
from knnlm_server.pb import generation_pb2 as pb

QUEUE_FULL = ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
READ_TOO_SLOWLY = ("RESOURCE_EXHAUSTED", "READ_TOO_SLOWLY")
REASONS = {Kind.CANCELLED: ("CANCELLED", ""), Kind.SLOW: READ_TOO_SLOWLY}
DEADLINE = "DEADLINE_EXCEEDED"
UNAVAILABLE = "UNAVAILABLE"


def rejected(end: Ended) -> bool:
    """Whether the server refused it for want of room, before any work."""
    return (end.answer.code, end.answer.reason) == QUEUE_FULL


def wrong(end: Ended, known: Mapping[int, Sequence[int]], stopping: float | None = None) -> str | None:
    """What is wrong with how a request ended; None: nothing is.

    ``known``: the tokens of known prompts that other answers must begin with. ``stopping``: when the server was asked to
    stop, in seconds of ``time.perf_counter``; what was sent before must still get its tokens.
    """
    answer, wanted = end.answer, end.wanted
    if answer.indices != list(range(len(answer.indices))):
        return f"tokens came as {answer.indices}"
    if len(answer.ids) > wanted.tokens:
        return f"{len(answer.ids)} tokens came, {wanted.tokens} were asked for"
    if wanted.known is not None and wanted.known in known and answer.ids != list(known[wanted.known][: len(answer.ids)]):
        return "other tokens came than when the prompt was alone"
    return _wrong_finish(end) if answer.code == OK else _wrong_status(end, stopping)


def _wrong_finish(end: Ended) -> str | None:
    """A call that ended well has all its tokens and one finish that says so."""
    finishes, asked = end.answer.finishes, end.wanted.tokens
    if len(finishes) != 1:
        return f"ended with OK and {len(finishes)} finishes"
    if finishes[0].finish_reason != pb.FINISH_REASON_LENGTH or not len(end.answer.ids) == finishes[0].completion_tokens == asked:
        return f"ended with OK and {len(end.answer.ids)} tokens of {asked}; the finish says {finishes[0].completion_tokens}"
    return None


def _wrong_status(end: Ended, stopping: float | None) -> str | None:
    answer, kind = end.answer, end.wanted.kind
    status = (answer.code, answer.reason)
    if status == QUEUE_FULL:
        if answer.ids:
            return "was refused for want of room after it had tokens"
        return None if answer.says_when_to_retry else "was refused for want of room without RetryInfo"
    if kind in REASONS and status == REASONS[kind]:
        return None
    if kind is Kind.HURRIED and answer.code == DEADLINE:
        return None
    if answer.code == UNAVAILABLE and stopping is not None and answer.sent > stopping and not answer.ids:
        return None
    return f"ended with {answer.code} {answer.reason}: {answer.message}".strip()
