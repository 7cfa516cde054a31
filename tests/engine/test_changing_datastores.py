"""Whatever happens beside it, a request gets what it would get alone: tokens, keys, neighbours, scores.

A random schedule of arrivals (several samples, shared beginnings, tenants, mixes of datastores), lookups, texts to be scored,
cancellations, failures of one request and of one datastore, and datastores that are loaded, unloaded and opened again.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from knnlm.sampling import SamplingParams
from knnlm_server.datastores import Datastores
from knnlm_server.errors import DatastoreNotLoaded
from knnlm_server.sequence import (
    DatastoreChoice,
    DetailParams,
    FinishEvent,
    GenerationRequest,
    NeighborEvidence,
    RetrievalParams,
    RetrieveRequest,
    ScoreRequest,
    StoppingParams,
    TokenEvent,
)
from knnlm_server.served_stores import ServedStore
from tests.engine.harness import GREEDY, Answer, Parts, RecordingEngine, drive, make_engine, random_prompt, sample_name
from tests.engine.serving import store_of

Request = GenerationRequest | RetrieveRequest | ScoreRequest

NAMES = st.sampled_from(["news", "law", "wiki"])
SAMPLINGS = st.sampled_from(
    [GREEDY, GREEDY, SamplingParams(seed=7), SamplingParams(seed=3, temperature=0.7, top_p=0.9, repetition_penalty=1.3, top_k=20)]
)
RETRIEVALS = st.builds(
    RetrievalParams,
    weight=st.sampled_from([0.0, 0.3, 0.3, 1.0]),
    k=st.sampled_from([1, 5, 8]),
    temperature=st.sampled_from([2.0, 30.0]),
    datastores=st.lists(
        st.builds(DatastoreChoice, NAMES, st.sampled_from([0.2, 1.0, 5.0])), max_size=3, unique_by=lambda choice: choice.name
    ).map(tuple),
)
PROMPTS = st.tuples(st.integers(0, 20), st.integers(1, 12), st.integers(0, 5))


def prompt_of(parts: tuple[int, int, int]) -> tuple[int, ...]:
    """A beginning that others share, and an end of its own."""
    shared, own, seed = parts
    return (*random_prompt(20, 99)[:shared], *random_prompt(own, seed))


@dataclass
class Asked:
    """A request and the datastores that were served when it came, by name, in the order in which they were opened (which
    decides between equal neighbours), and the default one."""

    request: Request
    served: tuple[tuple[str, Path], ...]
    default: str | None

    def uses(self, name: str) -> bool:
        """Whether it searches the datastore of that name, as it was when it came."""
        retrieval = self.request.retrieval
        named = {choice.name for choice in retrieval.datastores} or {self.default}
        return retrieval.weight > 0 and name in named


class FaultyEngine(RecordingEngine):
    """Fails at the next token of the requests in ``broken``."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.broken: set[str] = set()
        super().__init__(*args, **options)

    def _event(self, row: int, completion: Any, *rest: Any) -> TokenEvent:
        if completion.request_id in self.broken:
            raise RuntimeError("this request alone")
        return super()._event(row, completion, *rest)


class ChangingDatastores(RuleBasedStateMachine):
    """See the module."""

    parts: ClassVar[Parts]
    paths: ClassVar[list[Path]]
    alone: ClassVar[dict[Any, tuple[dict[str, Answer], dict[str, list[torch.Tensor]]]]]

    @initialize(rows=st.integers(1, 4), step_tokens=st.sampled_from([3, 16, 512]), prefix_bytes=st.sampled_from([0, 1 << 20]))
    def set_up(self, rows: int, step_tokens: int, prefix_bytes: int) -> None:
        self.datastores = Datastores(self.parts.model, self.parts.knn_lm.tokenizer)
        self.loaded: dict[str, Path] = {}
        for name, path in zip(("news", "law"), self.paths, strict=False):
            self.load(name, path)
        limits = self.parts.limits(max_concurrent=rows)
        self.engine = FaultyEngine(
            self.parts.model, self.parts.knn_lm.tokenizer, self.datastores, limits, step_tokens, prefix_bytes=prefix_bytes, block_tokens=4
        )
        self.asked: dict[str, Asked] = {}
        self.answers: dict[str, Answer] = {}
        self.cancelled: set[str] = set()

    # Requests.

    @rule(
        prompt=PROMPTS, sampling=SAMPLINGS, retrieval=RETRIEVALS, tokens=st.integers(1, 10), samples=st.sampled_from([1, 1, 3]),
        tenant=st.sampled_from(["a", "b"]), stops=st.lists(st.integers(1, 299), max_size=40), ignore_eos=st.booleans(),
    )  # fmt: skip
    def arrive(
        self, prompt: Any, sampling: Any, retrieval: Any, tokens: int, samples: int, tenant: str, stops: Any, ignore_eos: bool
    ) -> None:
        stopping = StoppingParams(max_new_tokens=tokens, stop_token_ids=tuple(stops), ignore_eos=ignore_eos)
        detail = DetailParams(neighbors=3, evidence=bool(tokens % 2))
        self._ask(
            GenerationRequest(
                self._name(), prompt_of(prompt), sampling, stopping, retrieval, detail, samples=samples, mean_log_prob=True, tenant=tenant
            )
        )

    @rule(prompt=PROMPTS, retrieval=RETRIEVALS, tenant=st.sampled_from(["a", "b"]))
    def look_up(self, prompt: Any, retrieval: RetrievalParams, tenant: str) -> None:
        self._ask(RetrieveRequest(self._name(), prompt_of(prompt), replace(retrieval, weight=1.0), 9, tenant))

    @rule(length=st.integers(2, 90), retrieval=RETRIEVALS)
    def score(self, length: int, retrieval: RetrievalParams) -> None:
        self._ask(ScoreRequest(self._name(), tuple(random_prompt(length, length)), retrieval))

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            assert set(self._step()) <= self.engine.broken

    @precondition(lambda self: self._running())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self._running()))
        self.engine.cancel(name)
        self.cancelled.add(name)

    @precondition(lambda self: self._running())
    @rule(data=st.data())
    def break_one(self, data: st.DataObject) -> None:
        self.engine.broken.add(data.draw(st.sampled_from(self._running())))

    @precondition(lambda self: self.loaded)
    @rule(data=st.data())
    def lose_a_datastore_for_a_step(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.loaded)))
        lost = self.datastores.choose(RetrievalParams(1.0, 1, 1.0, (DatastoreChoice(name),))).weights[0][0]
        with _failing(lost.retriever):
            for failed in self._step():
                assert failed in self.engine.broken or self.asked[failed].uses(name), "only those who use it are harmed"

    # Datastores.

    @rule(name=NAMES, which=st.integers(0, 3), first=st.booleans())
    def load(self, name: str, which: int | Path, first: bool = False) -> None:
        path = which if isinstance(which, Path) else self.paths[which]
        if name not in self.loaded:
            self.datastores.load(name, path, make_default=first)
            self.loaded = {name: path, **self.loaded} if first else {**self.loaded, name: path}

    @rule(name=NAMES, which=st.integers(0, 3))
    def reload(self, name: str, which: int) -> None:
        if name in self.loaded:
            self.datastores.reload(name, self.paths[which])
            self.loaded[name] = self.paths[which]

    @rule(name=NAMES)
    def unload(self, name: str) -> None:
        if name in self.loaded:
            self.datastores.unload(name)
            del self.loaded[name]

    @invariant()
    def what_is_served_is_what_was_loaded(self) -> None:
        assert [info.name for info in self.datastores.info] == list(self.loaded)

    def teardown(self) -> None:
        """Everything to its end, and each one against itself alone."""
        if not hasattr(self, "answers"):
            return
        while not self.engine.idle:
            assert set(self._step()) <= self.engine.broken
        for name, asked in self.asked.items():
            self._compare(name, asked)
        assert len(self.datastores.in_use()) == len(self.loaded), "nobody holds a datastore that is not served"

    def _ask(self, request: Request) -> None:
        opened = sorted((served.number, served.name) for served in self.datastores.in_use() if self._serves(served))
        asked = Asked(request, tuple((name, self.loaded[name]) for _, name in opened), next(iter(self.loaded), None))
        retrieval = request.retrieval
        known = all(choice.name in self.loaded for choice in retrieval.datastores) and (self.loaded or retrieval.datastores)
        named = isinstance(request, ScoreRequest) and not all(choice.name in self.loaded for choice in retrieval.datastores[:1])
        if (retrieval.weight > 0 and not known) or named:
            with pytest.raises(DatastoreNotLoaded):
                _add(self.engine, request)
            return
        _add(self.engine, request)
        self.asked[request.request_id] = asked

    def _serves(self, served: ServedStore) -> bool:
        if served.name not in self.loaded:
            return False
        return self.datastores.choose(RetrievalParams(1.0, 1, 1.0, (DatastoreChoice(served.name),))).weights[0][0] is served

    def _step(self) -> list[str]:
        """Names of the requests that failed with it."""
        failed = []
        for output in self.engine.step():
            content = output.content
            sample = content.sample if isinstance(content, TokenEvent | FinishEvent) else 0
            answer = self.answers.setdefault(sample_name(output.request_id, sample), Answer())
            answer.take(output)
            if answer.failure is not None:
                failed.append(output.request_id)
                self.cancelled.add(output.request_id)
        return failed

    def _name(self) -> str:
        return f"r{len(self.asked)}"

    def _running(self) -> list[str]:
        ended = {name for name, answer in self.answers.items() if answer.scores or answer.neighbors or answer.failure}
        return [name for name in self.asked if name not in self.cancelled and name not in ended and not self._finished(name)]

    def _finished(self, name: str) -> bool:
        request = self.asked[name].request
        if not isinstance(request, GenerationRequest):
            return False
        answers = (self.answers.get(sample_name(name, sample)) for sample in range(request.samples))
        return all(answer is not None and answer.finish is not None for answer in answers)

    def _compare(self, name: str, asked: Asked) -> None:
        expected, keys = self._alone(asked)
        whole = name not in self.cancelled
        for sample in range(asked.request.samples if isinstance(asked.request, GenerationRequest) else 1):
            alone, mine = expected[sample_name("r", sample)], self.answers.get(sample_name(name, sample), Answer())
            if whole or mine.failure is None:
                _require_same(alone, mine, whole=whole)
            for one, other in zip(
                self.engine.keys.get(sample_name(name, sample), ()), keys.get(sample_name("r", sample), ()), strict=False
            ):
                assert float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())

    def _alone(self, asked: Asked) -> tuple[dict[str, Answer], dict[str, list[torch.Tensor]]]:
        request = replace(asked.request, request_id="r")
        told = replace(request, arrived=0.0) if not isinstance(request, ScoreRequest) else request
        key = (told, asked.served, asked.default)
        if key not in self.alone:
            datastores = Datastores(self.parts.model, self.parts.knn_lm.tokenizer)
            for name, path in asked.served:
                datastores.load(name, path, make_default=name == asked.default)
            engine = make_engine(self.parts, datastores=datastores, options={"prefix_bytes": 0})
            _add(engine, request)
            self.alone[key] = dict(drive(engine)), dict(engine.keys)
        return self.alone[key]


def _add(engine: RecordingEngine, request: Request) -> None:
    match request:
        case GenerationRequest():
            engine.add(request)
        case RetrieveRequest():
            engine.add_retrieve(request)
        case ScoreRequest():
            engine.add_score(request)


@contextlib.contextmanager
def _failing(retriever: Any) -> Iterator[None]:
    def lost(*_: object) -> None:
        raise RuntimeError("the datastore is lost")

    retriever.retrieve = lost
    try:
        yield
    finally:
        del retriever.retrieve


def _require_same(alone: Answer, mine: Answer, *, whole: bool) -> None:
    """``mine`` is ``alone``, or its beginning where it was not to come to its end."""
    assert mine.tokens == alone.tokens[: len(mine.tokens)]
    for event, other in zip(mine.events, alone.events, strict=False):
        assert event.text == other.text
        _require_same_neighbors(event.neighbors, other.neighbors)
    if not whole:
        return
    assert len(mine.events) == len(alone.events)
    if alone.finish is not None:
        assert mine.finish is not None
        assert (mine.finish.reason, mine.finish.text) == (alone.finish.reason, alone.finish.text)
        assert mine.finish.mean_log_prob == pytest.approx(alone.finish.mean_log_prob, abs=1e-5)
        assert (mine.finish.evidence is None) == (alone.finish.evidence is None)
        if alone.finish.evidence is not None and mine.finish.evidence is not None:
            assert mine.finish.evidence.verbatim == alone.finish.evidence.verbatim
            assert mine.finish.evidence.changed_share == alone.finish.evidence.changed_share
    if alone.neighbors is not None:
        assert mine.neighbors is not None
        _require_same_neighbors(mine.neighbors.neighbors, alone.neighbors.neighbors)
    if alone.scores is not None:
        assert mine.scores is not None
        np.testing.assert_allclose(mine.scores.log_probs, alone.scores.log_probs, atol=1e-5)


def _require_same_neighbors(mine: tuple[NeighborEvidence, ...], alone: tuple[NeighborEvidence, ...]) -> None:
    assert [(n.datastore, n.entry, n.document_id) for n in mine] == [(n.datastore, n.entry, n.document_id) for n in alone]
    assert [n.weight for n in mine] == pytest.approx([n.weight for n in alone], abs=1e-5)


@pytest.fixture(scope="module")
def pool(gpt2: Parts, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pool")
    return [store_of(gpt2.model, folder / f"store-{seed}", 4 + 2 * seed, seed) for seed in range(4)]


def test_requests_keep_what_they_began_with_under_any_schedule(gpt2: Parts, pool: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    # Failures are logged with their frames, which would hold datastores that nobody else does.
    caplog.set_level(logging.CRITICAL, logger="knnlm_server")

    class Machine(ChangingDatastores):
        parts, paths, alone = gpt2, pool, {}

    run_state_machine_as_test(
        Machine, settings=settings(max_examples=25, stateful_step_count=30, phases=[Phase.generate], report_multiple_bugs=False)
    )
