"""Under any schedule every sample is what it would be alone: arrivals, cancels, stops, failures and shared beginnings at random.

:class:`BatchEqualsAlone` is a state machine to build on: a subclass may add rules that change the world between steps, as
long as :meth:`~BatchEqualsAlone.alone` says what a request that arrived then would be given with nobody beside it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from torch import Tensor

from knnlm.knn_lm import Mixed
from knnlm.sampling import SamplingParams
from knnlm_server.completion import Completion
from knnlm_server.engine import Output, _Ready
from knnlm_server.errors import EngineFailed
from knnlm_server.prefix_blocks import PrefixBlocks
from knnlm_server.sequence import FinishEvent, GenerationRequest, RetrievalParams, TokenEvent
from tests.engine.harness import GREEDY, Answer, Parts, RecordingEngine, complete, make_engine, random_prompt, request, sample_name
from tests.gates import tiny_gate

BLOCK = 4
BEGINNINGS = [random_prompt(30, seed) for seed in (1, 2)]
SAMPLINGS = [GREEDY, SamplingParams(temperature=0.9, seed=5), SamplingParams(temperature=1.1, top_k=30, repetition_penalty=1.3, seed=7)]
ADAPTIVE = RetrievalParams(0.3, 8, 10.0, adaptive=True)
RETRIEVALS = [
    RetrievalParams(0.0, 1, 10.0), RetrievalParams(0.3, 3, 10.0), RetrievalParams(1.0, 8, 1.0), RetrievalParams(0.3, 8, 10.0), ADAPTIVE,
    ADAPTIVE,
]  # fmt: skip
STOPS: list[dict[str, Any]] = [{"ignore_eos": True}, {}, {"stop_token_ids": tuple(range(1, 40))}, {"stop_strings": ("e", "th")}]


@dataclass(frozen=True)
class Fault:
    """Where the work on a request breaks, and after how many tokens."""

    place: str
    tokens: int


class FaultyEngine(RecordingEngine):
    """Breaks where it is told to, for the requests that it is told."""

    faults: dict[str, Fault]

    def _broken(self, sequence: Any, place: str) -> bool:
        fault = self.faults.get(sequence.request_id)
        return fault is not None and fault.place == place and sequence.generated >= fault.tokens

    def _mix(self, ready: _Ready[Any]) -> tuple[Tensor, Mixed]:
        if any(self._broken(sequence, "retrieval") for sequence in ready.sequences):
            raise RuntimeError("a retrieval that breaks the search of the whole batch")
        return super()._mix(ready)

    def _event(self, row: int, completion: Completion, *args: Any) -> TokenEvent:
        if self._broken(completion, "event"):
            raise OSError("evidence that can't be read")
        return super()._event(row, completion, *args)


class Drew:
    """What each sample of one request is given alone."""

    def __init__(self, engine: RecordingEngine, asked: GenerationRequest) -> None:
        self.answers = complete(engine, asked)
        self.keys = engine.keys


class BatchEqualsAlone(RuleBasedStateMachine):
    """An engine under any schedule, compared with one that has a single row, keeps no prompts and serves one request."""

    parts: ClassVar[Parts]
    exact: ClassVar[bool]  # tokens are compared in float64 models, keys alone in float32
    known: ClassVar[dict[GenerationRequest, Drew]]

    @initialize(
        slots=st.integers(1, 6), step_tokens=st.sampled_from([3, 8, 20, 512]), pool=st.sampled_from([0, 8192, 2**20, 2**20]),
        overlap=st.booleans(),
    )  # fmt: skip
    def set_up(self, slots: int, step_tokens: int, pool: int, overlap: bool) -> None:
        options: dict[str, Any] = {"prefix_bytes": pool, "block_tokens": BLOCK, "overlap": overlap}
        limits = self.parts.limits(max_concurrent=slots)
        self.engine = FaultyEngine(self.parts.model, self.parts.knn_lm.tokenizer, self.parts.datastores(), limits, step_tokens, **options)
        self.engine.faults = {}
        self.asked: dict[str, GenerationRequest] = {}
        self.given_up: set[str] = set()
        self.answers: dict[str, Answer] = defaultdict(Answer)

    @rule(
        beginning=st.integers(0, 1), shared=st.sampled_from([0, 3, 9, 17, 30]), own=st.integers(0, 8), sampling=st.sampled_from(SAMPLINGS),
        retrieval=st.sampled_from(RETRIEVALS), stops=st.sampled_from(STOPS), most=st.integers(1, 10),
        samples=st.sampled_from([1, 1, 1, 2, 4]), tenant=st.sampled_from(["a", "a", "b"]),
        fault=st.one_of(st.none(), st.none(), st.none(), st.builds(Fault, st.sampled_from(["retrieval", "event"]), st.integers(0, 4))),
    )  # fmt: skip
    def arrive(
        self, beginning: int, shared: int, own: int, sampling: SamplingParams, retrieval: RetrievalParams, stops: dict[str, Any],
        most: int, samples: int, tenant: str, fault: Fault | None,
    ) -> None:  # fmt: skip
        name, prompt = str(len(self.asked)), BEGINNINGS[beginning][:shared] + random_prompt(own or (0 if shared else 1), own + 10)
        made = request(name, prompt, sampling, retrieval, max_new_tokens=most, **stops)
        self.asked[name] = replace(made, samples=samples, tenant=tenant)
        self.engine.add(self.asked[name])
        if fault is not None:
            self.engine.faults[name] = fault

    @rule(times=st.integers(1, 5))
    def steps_pass(self, times: int) -> None:
        for _ in range(times):
            self._one_step()

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.asked)))
        self.engine.cancel(name)
        if any(self._answer(name, sample).finish is None for sample in range(self.asked[name].samples)):
            self.given_up.add(name)

    def alone(self, asked: GenerationRequest) -> Drew:
        """What a request is given that has an engine for itself."""
        place = replace(asked, request_id="alone", arrived=0.0)
        if place not in self.known:
            self.known[place] = Drew(make_engine(self.parts, options={"prefix_bytes": 0}, max_concurrent=1), place)
        return self.known[place]

    def _answer(self, name: str, sample: int) -> Answer:
        return self.answers[sample_name(name, sample)]

    def _one_step(self) -> None:
        if self.engine.idle:
            return
        for output in self.engine.step():
            self._take(output)

    def _take(self, output: Output) -> None:
        assert output.request_id not in self.given_up, "something comes for a request that was given up or has failed"
        sample = output.content.sample if isinstance(output.content, TokenEvent | FinishEvent) else 0
        answer = self._answer(output.request_id, sample)
        if isinstance(output.content, EngineFailed):
            assert output.request_id in self.engine.faults, str(output.content)
            self.given_up.add(output.request_id)
            return
        answer.take(output)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(500):
            self._one_step()
        assert self.engine.idle
        for name, asked in self.asked.items():
            for sample in range(asked.samples):
                self._check(name, asked, sample)

    def _check(self, name: str, asked: GenerationRequest, sample: int) -> None:
        reference = self.alone(asked)
        answer, expected = self._answer(name, sample), reference.answers[sample_name("alone", sample)]
        tokens = answer.tokens
        keys, same = self.engine.keys[sample_name(name, sample)], len(tokens)
        if self.exact:
            assert tokens == expected.tokens[: len(tokens)]
            if name not in self.given_up:
                assert answer.finish == expected.finish
                assert answer.text == expected.text
        else:
            # Where two tokens are as likely up to rounding, texts may part; until then every key is the same.
            same = next((i + 1 for i, (a, b) in enumerate(zip(tokens, expected.tokens, strict=False)) if a != b), len(tokens))
            assert name in self.given_up or answer.finish is not None
        for found, wanted in zip(keys[:same], reference.keys[sample_name("alone", sample)][:same], strict=True):
            assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def play(parts: Parts, *, exact: bool, examples: int, phases: Collection[Phase] = tuple(Phase)) -> None:
    parts = parts.gated(tiny_gate(2))
    machine = type("Machine", (BatchEqualsAlone,), {"parts": parts, "exact": exact, "known": {}})
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=14, deadline=None, phases=phases))


def test_every_sample_is_the_one_alone_token_for_token_in_float64(parts: Parts) -> None:
    assert parts.model._model.dtype == torch.float64
    play(parts, exact=True, examples=40)


def test_every_sample_has_the_keys_it_has_alone_in_float32(single_parts: Parts) -> None:
    play(single_parts, exact=False, examples=20)


def test_the_machine_sees_a_row_that_is_not_its_own(gpt2: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that gives one prompt's beginning to another is noticed, so a pass says something."""
    for name in ("find", "add"):
        real = getattr(PrefixBlocks, name)
        monkeypatch.setattr(PrefixBlocks, name, lambda self, tokens, tenant, real=real: real(self, [0] * len(tokens), tenant))
    with pytest.raises((AssertionError, ExceptionGroup)):
        play(gpt2, exact=True, examples=40, phases=[Phase.generate])
