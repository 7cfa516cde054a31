"""How requests under load may end, and that everything else is seen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.streams import Answer
from benchmarks.traffic import Ended, Kind, Wanted
from benchmarks.verdicts import rejected, wrong
from knnlm_server.pb import generation_pb2 as pb

WANTED = Wanted(Kind.WHOLE, (5, 6), 3)
FULL = {"code": "RESOURCE_EXHAUSTED", "reason": "QUEUE_FULL", "says_when_to_retry": True}


def answer(count: int = 3, *, finished: bool = True, **status: object) -> Answer:
    finish = pb.Finish(finish_reason=pb.FINISH_REASON_LENGTH, completion_tokens=count)
    made = Answer(10.0, [11.0 + n for n in range(count)], [7 + n for n in range(count)], list(range(count)), [finish] if finished else [])
    return replace(made, **status)  # type: ignore[arg-type]


def judge(given: Answer, kind: Kind = Kind.WHOLE, stopping: float | None = None, known: int | None = None) -> str | None:
    return wrong(Ended(replace(WANTED, kind=kind, known=known), given), {0: [7, 8, 9]}, stopping)


def test_all_tokens_and_one_finish_are_right() -> None:
    assert judge(answer()) is None
    assert judge(answer(), known=0) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (answer(2), "2 tokens of 3"),
        (answer(4), "4 tokens came, 3 were asked for"),
        (answer(finished=False), "0 finishes"),
        (replace(answer(), finishes=[*answer().finishes, *answer().finishes]), "2 finishes"),
        (replace(answer(), finishes=[pb.Finish(finish_reason=pb.FINISH_REASON_EOS, completion_tokens=3)]), "3 tokens of 3"),
        (replace(answer(), finishes=[pb.Finish(finish_reason=pb.FINISH_REASON_LENGTH, completion_tokens=2)]), "the finish says 2"),
        (replace(answer(), indices=[0, 2, 1]), r"[0, 2, 1]"),
        (replace(answer(), indices=[0, 1, 1]), r"[0, 1, 1]"),
        (answer(0, finished=False, code="INTERNAL", reason="ENGINE_FAILED", message="it broke"), "INTERNAL ENGINE_FAILED: it broke"),
        (answer(0, finished=False, code="UNAVAILABLE"), "UNAVAILABLE"),
        (answer(0, finished=False, code="CANCELLED"), "CANCELLED"),
        (answer(0, finished=False, code="DEADLINE_EXCEEDED"), "DEADLINE_EXCEEDED"),
        (answer(1, finished=False, **FULL), "after it had tokens"),
        (answer(0, finished=False, **(FULL | {"says_when_to_retry": False})), "without RetryInfo"),
        (answer(2, finished=False, code="RESOURCE_EXHAUSTED", reason="READ_TOO_SLOWLY"), "READ_TOO_SLOWLY"),
    ],
)
def test_what_a_whole_request_must_not_get(given: Answer, said: str) -> None:
    fault = judge(given)
    assert fault is not None
    assert said in fault


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (Kind.WHOLE, FULL),
        (Kind.CANCELLED, {"code": "CANCELLED"}),
        (Kind.HURRIED, {"code": "DEADLINE_EXCEEDED"}),
        (Kind.HURRIED, FULL),
        (Kind.SLOW, {"code": "RESOURCE_EXHAUSTED", "reason": "READ_TOO_SLOWLY"}),
    ],
)
def test_statuses_that_are_right_for_their_kind(kind: Kind, status: dict[str, object]) -> None:
    given = answer(0, finished=False, **status)
    assert judge(given, kind) is None
    assert rejected(Ended(replace(WANTED, kind=kind), given)) == (status == FULL)


def test_other_tokens_than_alone_are_seen_in_whatever_came() -> None:
    assert "than when the prompt was alone" in str(judge(replace(answer(), ids=[7, 8, 1]), known=0))
    cancelled = answer(2, finished=False, code="CANCELLED")
    assert judge(cancelled, Kind.CANCELLED, known=0) is None
    assert "alone" in str(judge(replace(cancelled, ids=[7, 1]), Kind.CANCELLED, known=0))


@pytest.mark.parametrize("kind", Kind)
def test_a_server_that_stops_may_refuse_what_came_after(kind: Kind) -> None:
    refused = answer(0, finished=False, code="UNAVAILABLE", reason="SHUTTING_DOWN")
    assert judge(refused, kind, stopping=9.0) is None
    assert "UNAVAILABLE" in str(judge(refused, kind, stopping=10.5))
    assert "UNAVAILABLE" in str(judge(answer(1, finished=False, code="UNAVAILABLE"), kind, stopping=9.0))
