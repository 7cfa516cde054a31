"""Several samples of a request, limits of time, and what is told of the engine's work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from knnlm.sampling import SamplingParams
from knnlm_server.errors import EngineFailed, QueueFull
from knnlm_server.sequence import DetailParams, FinishReason, RetrievalParams, ScoreRequest
from knnlm_server.telemetry import StepReport
from knnlm_server.text_stream import TextStream
from tests.engine.harness import CountingIndex, Parts, complete, drive, make_engine, random_prompt, request

MIXED = RetrievalParams(0.5, 8, 10.0)
HOT = SamplingParams(temperature=1.5, seed=11)


class SetClock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_to(self, now: float) -> Callable[[], None]:
        return lambda: setattr(self, "now", now)


# --- Samples ---


def test_samples_differ_and_each_is_the_same_every_time(gpt2: Parts) -> None:
    asked = replace(request("a", random_prompt(9, 1), HOT, MIXED, max_new_tokens=12, ignore_eos=True), samples=4)
    answers = complete(make_engine(gpt2, max_concurrent=4), asked)
    again = complete(make_engine(gpt2, max_concurrent=2), asked)
    assert set(answers) == {"a", "a/1", "a/2", "a/3"}
    assert len({tuple(answer.tokens) for answer in answers.values()}) == 4
    assert {name: answer.tokens for name, answer in again.items()} == {name: answer.tokens for name, answer in answers.items()}


def test_sample_0_is_what_the_request_would_be_alone(gpt2: Parts) -> None:
    asked = request("a", random_prompt(9, 1), HOT, MIXED, max_new_tokens=12, ignore_eos=True)
    alone = complete(make_engine(gpt2), asked)["a"]
    assert complete(make_engine(gpt2), replace(asked, samples=3))["a"].tokens == alone.tokens


def test_a_request_is_over_when_all_of_its_samples_are(gpt2: Parts) -> None:
    engine = make_engine(gpt2, max_concurrent=1)
    engine.add(replace(request("a", [5, 6], max_new_tokens=3, ignore_eos=True), samples=3))
    reasons = []
    while not engine.idle:
        assert "a" in engine._requests
        reasons += [o.content.reason for o in engine.step() if hasattr(o.content, "reason")]
    assert reasons == [FinishReason.LENGTH] * 3
    assert not engine._requests


def test_a_cancelled_request_ends_with_all_of_its_samples(gpt2: Parts) -> None:
    engine = make_engine(gpt2, max_concurrent=2)
    engine.add(replace(request("a", [5, 6], max_new_tokens=30, ignore_eos=True), samples=5))
    engine.step()
    engine.cancel("a")
    assert engine.idle


def test_a_sample_that_fails_ends_its_request_and_that_is_said_once(gpt2: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    index = CountingIndex(gpt2.knn_lm.retriever.index)
    engine = make_engine(gpt2.searched_by(index), max_concurrent=4)
    broken = replace(request("a", random_prompt(4, 1), HOT, MIXED, max_new_tokens=30, ignore_eos=True), samples=3)
    engine.add(broken)
    for _ in range(2):
        engine.step()
    index.failure = RuntimeError("index lost")
    outputs = engine.step()
    assert [(output.request_id, type(output.content)) for output in outputs] == [("a", EngineFailed)]
    assert engine.idle


def test_a_full_queue_refuses_all_samples_or_none(gpt2: Parts) -> None:
    engine = make_engine(gpt2, max_concurrent=1, max_waiting_requests=1)
    engine.add(replace(request("a", [5], max_new_tokens=2, ignore_eos=True), samples=3))
    with pytest.raises(QueueFull, match="1 requests are waiting, the limit is 1"):
        engine.add(replace(request("b", [5], max_new_tokens=2), samples=2))
    assert set(drive(engine)) == {"a", "a/1", "a/2"}


def test_the_mean_log_probability_is_that_of_the_tokens(gpt2: Parts) -> None:
    detail = DetailParams(log_probs=True)
    asked = replace(request("a", random_prompt(6, 2), HOT, MIXED, detail, max_new_tokens=9, ignore_eos=True), mean_log_prob=True, samples=2)
    for answer in complete(make_engine(gpt2), asked).values():
        log_probs = [event.log_prob for event in answer.events if event.log_prob is not None]
        assert answer.finish is not None
        assert len(log_probs) == 9
        assert answer.finish.mean_log_prob == pytest.approx(sum(log_probs) / 9)
    plain = complete(make_engine(gpt2), replace(asked, mean_log_prob=False))["a"]
    assert plain.finish is not None
    assert plain.finish.mean_log_prob is None


# --- Time ---


def test_a_completion_ends_with_what_there_is_when_its_time_is_over(gpt2: Parts) -> None:
    clock = SetClock()
    engine = make_engine(gpt2, options={"clock": clock})
    limited = replace(request("a", [5, 6], max_new_tokens=40, ignore_eos=True, max_seconds=5.0), arrived=0.0)
    other = replace(request("b", [5, 6], max_new_tokens=10, ignore_eos=True), arrived=0.0)
    for asked in (limited, other):
        engine.add(asked)
    answers = drive(engine, {3: [clock.pass_to(4.9)], 4: [clock.pass_to(5.0)]})
    assert answers["a"].finish is not None
    assert answers["b"].finish is not None
    assert (answers["a"].finish.reason, len(answers["a"].tokens)) == (FinishReason.TIME, 4)
    assert answers["a"].text == gpt2.knn_lm.tokenizer.decode(answers["a"].tokens)
    assert answers["b"].finish.reason is FinishReason.LENGTH


def test_time_runs_while_a_request_waits(gpt2: Parts) -> None:
    clock = SetClock()
    engine = make_engine(gpt2, options={"clock": clock}, max_concurrent=1)
    engine.add(replace(request("first", [5, 6], max_new_tokens=10, ignore_eos=True), arrived=0.0))
    waiting = request("a", [5, 6], max_new_tokens=40, ignore_eos=True, max_seconds=5.0)
    engine.add(replace(waiting, arrived=0.0, samples=2, mean_log_prob=True))
    answers = drive(engine, {2: [clock.pass_to(5.5)]})
    for name in ("a", "a/1"):
        finish = answers[name].finish
        assert finish is not None
        assert (finish.reason, finish.completion_tokens, finish.text, finish.mean_log_prob) == (FinishReason.TIME, 0, "", 0.0)
    assert len(answers["first"].tokens) == 10


# --- What is told ---


def test_steps_are_reported_as_they_were(gpt2: Parts) -> None:
    engine = make_engine(gpt2, max_concurrent=2)
    searching = request("searches", random_prompt(7, 1), retrieval=MIXED, max_new_tokens=4, ignore_eos=True)
    complete(
        engine, searching, request("plain", random_prompt(5, 2), max_new_tokens=6, ignore_eos=True), replace(searching, request_id="late")
    )
    first, second, last = engine.observed.steps[0], engine.observed.steps[1], engine.observed.steps[-1]
    assert (first.prompt_tokens, first.decoded_rows, first.searched_rows, first.skipped_rows) == (12, 2, 1, 1)
    assert (first.running, first.waiting, first.waiting_tokens, first.cache_tokens) == (2, 1, 7, 12)
    assert (second.prompt_tokens, second.decoded_rows, second.cache_tokens) == (0, 2, 14)
    assert (last.running, last.waiting, last.cache_tokens) == (0, 0, 0)
    reports = engine.observed.steps
    assert sum(report.decoded_rows for report in reports) == 4 + 6 + 4
    assert sum(report.searched_rows for report in reports) == 4 + 4
    for report in reports:
        parts = (report.forward_seconds, report.retrieval_seconds, report.mix_seconds, report.sample_seconds, report.score_seconds)
        assert min(parts) >= 0
        assert 0 < sum(parts) <= report.seconds


def test_a_step_without_a_search_has_no_time_of_one(gpt2: Parts) -> None:
    engine = make_engine(gpt2)
    complete(engine, request("plain", [5, 6], max_new_tokens=3, ignore_eos=True))
    assert [report.retrieval_seconds for report in engine.observed.steps] == [0.0] * 3
    complete(engine, request("searches", [5, 6], retrieval=MIXED, max_new_tokens=1, ignore_eos=True))
    assert engine.observed.steps[-1].retrieval_seconds > 0


def test_admissions_are_told_with_the_time_in_the_queue(gpt2: Parts) -> None:
    clock = SetClock()
    engine = make_engine(gpt2, options={"clock": clock}, max_concurrent=1)
    engine.add(replace(request("a", [5, 6], max_new_tokens=3, ignore_eos=True), arrived=0.0))
    engine.add(replace(request("b", [5, 6], max_new_tokens=1, ignore_eos=True), arrived=0.0, samples=2))
    clock.now = 0.5
    drive(engine, {2: [clock.pass_to(7.0)]})
    assert engine.observed.waited == {"a": 0.5, "b": 7.0}


class Raising:
    """An observer that raises."""

    def step(self, report: StepReport) -> None:
        raise ValueError("no more room for counts")

    def admitted(self, *told: Any) -> None:
        raise ValueError("no more room for counts")


def test_an_observer_that_raises_harms_nobody(gpt2: Parts) -> None:
    asked = request("a", random_prompt(7, 1), retrieval=MIXED, max_new_tokens=8, ignore_eos=True)
    answer = complete(make_engine(gpt2, options={"observer": Raising()}), asked)["a"]
    assert answer.failure is None
    assert answer.tokens == complete(make_engine(gpt2), asked)["a"].tokens


# --- Faults ---


def test_a_prompt_that_the_tokenizer_can_not_read_is_refused_and_leaves_no_trace(gpt2: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, init = make_engine(gpt2), TextStream.__init__

    def failing(self: TextStream, tokenizer: Any, prompt: Any, stop_strings: Any = ()) -> None:
        if "boom" in stop_strings:
            raise UnicodeError("no text")
        init(self, tokenizer, prompt, stop_strings)

    monkeypatch.setattr(TextStream, "__init__", failing)
    engine.add(request("good", [5, 6], max_new_tokens=3, ignore_eos=True))
    with pytest.raises(UnicodeError):
        engine.add(replace(request("bad", [5, 6], max_new_tokens=3, stop_strings=("boom",)), samples=2))
    assert set(drive(engine)) == {"good"}


def test_scoring_that_fails_in_its_search_ends_its_own_request(gpt2: Parts) -> None:
    index = CountingIndex(gpt2.knn_lm.retriever.index)
    engine = make_engine(gpt2.searched_by(index))
    index.failure = RuntimeError("index lost")
    engine.add_score(ScoreRequest("s", tuple(random_prompt(40, 1)), MIXED))
    engine.add(request("a", random_prompt(4, 1), max_new_tokens=5, ignore_eos=True))
    answers = drive(engine)
    assert isinstance(answers["s"].failure, EngineFailed)
    assert len(answers["a"].tokens) == 5
