"""An engine around a tiny model and its datastore, driven step by step, with everything that it hands out written down."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knnlm.datastore.reader import Datastore
from knnlm.entry_mask import EntryMask
from knnlm.gate import Gate
from knnlm.gated import StoreGate
from knnlm.index import Candidates, NeighborIndex
from knnlm.knn_lm import KNNLanguageModel, Mixed
from knnlm.model import HFLanguageModel
from knnlm.opening import SearchableStore
from knnlm.retrieval import Retriever
from knnlm.sampling import SamplingParams
from knnlm_server.completion import Completion
from knnlm_server.datastores import Datastores
from knnlm_server.engine import DecodingEngine, Output, _Ready
from knnlm_server.errors import EngineFailed
from knnlm_server.sequence import (
    DetailParams,
    FinishEvent,
    GenerationRequest,
    Limits,
    RetrievalParams,
    RetrieveResult,
    ScoreResult,
    StoppingParams,
    TokenEvent,
)
from knnlm_server.telemetry import StepReport

GREEDY = SamplingParams(temperature=0.0)
LM_ALONE = RetrievalParams(0.0, 8, 10.0)
MOST_STEPS = 2000


@dataclass(frozen=True)
class Parts:
    """What an engine is made of, and where the model lies."""

    knn_lm: KNNLanguageModel
    model: HFLanguageModel
    store: Datastore
    path: Path

    def limits(self, **given: int) -> Limits:
        return replace(Limits(context=self.model.context), **given)

    def datastores(self) -> Datastores:
        """The store, served alone."""
        served = Datastores(self.model, self.knn_lm.tokenizer)
        served.serve("default", self.searchable)
        return served

    @property
    def searchable(self) -> SearchableStore:
        """The store as it is opened, with the gate of the model."""
        gate = None if self.knn_lm.gate is None else self.knn_lm.gate.gate
        return SearchableStore(self.store, self.knn_lm.retriever, self.knn_lm.mixture, "the test", gate)

    def gated(self, gate: Gate) -> Parts:
        """The same with a gate."""
        knn_lm = self.knn_lm
        gated = KNNLanguageModel(knn_lm.model, knn_lm.tokenizer, knn_lm.retriever, knn_lm.mixture, StoreGate(gate, self.store))
        return replace(self, knn_lm=gated)

    def searched_by(self, index: NeighborIndex) -> Parts:
        """The same with another index in front of the stored keys."""
        retriever = Retriever(index, self.store.keys, self.store.values)
        return replace(self, knn_lm=KNNLanguageModel(self.knn_lm.model, self.knn_lm.tokenizer, retriever, self.knn_lm.mixture))


class Quiet:
    """The progress of a build, told to nobody."""

    def update(self, stage: str, done: int, total: int | None) -> None:
        pass


class CountingIndex:
    """Counts the queries that reach an index, and fails on demand."""

    def __init__(self, index: NeighborIndex) -> None:
        self._index = index
        self.queries = 0
        self.failure: Exception | None = None

    @property
    def description(self) -> str:
        return self._index.description

    @property
    def nlist(self) -> int:
        return self._index.nlist

    @property
    def entries(self) -> int:
        return self._index.entries

    def search(self, queries: Tensor, k: int, count: int, *, probes: int, allowed: EntryMask | None = None) -> Candidates:
        if self.failure is not None:
            raise self.failure
        self.queries += len(queries)
        return self._index.search(queries, k, count, probes=probes, allowed=allowed)


class Observed:
    """What the engine tells of its work."""

    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.reused: dict[str, int] = {}
        self.waited: dict[str, float] = {}

    @property
    def prompt_tokens(self) -> int:
        return sum(report.prompt_tokens for report in self.steps)

    def step(self, report: StepReport) -> None:
        self.steps.append(report)

    def admitted(self, request_id: str, waited_seconds: float, prompt_tokens: int, reused_tokens: int) -> None:
        assert request_id not in self.reused, "a request is admitted once"
        assert 0 <= reused_tokens < prompt_tokens
        self.reused[request_id], self.waited[request_id] = reused_tokens, waited_seconds


class RecordingEngine(DecodingEngine):
    """Writes down the key of every token that it generates, and how many rows each step brought to sampling."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.keys: dict[str, list[Tensor]] = defaultdict(list)
        self.rows_of_steps: list[int] = []
        self.observed = Observed()
        super().__init__(*args, **{"observer": self.observed, **options})

    def _hand_out(self, ready: _Ready[Completion], lm: Tensor, mixed: Mixed) -> list[Output]:
        self.rows_of_steps.append(len(ready.sequences))
        for sequence, key in zip(ready.sequences, ready.keys, strict=True):
            self.keys[sample_name(sequence.request_id, sequence.sample)].append(key)
        return super()._hand_out(ready, lm, mixed)


def sample_name(request_id: str, sample: int) -> str:
    """What a sample is called here: like its request, later ones with their number."""
    return f"{request_id}/{sample}" if sample else request_id


def make_engine(
    parts: Parts, step_tokens: int = 512, *, datastores: Datastores | None = None, options: Mapping[str, Any] | None = None, **limits: int
) -> RecordingEngine:
    served = datastores or parts.datastores()
    return RecordingEngine(parts.model, parts.knn_lm.tokenizer, served, parts.limits(**limits), step_tokens, **(options or {}))


def request(
    name: str,
    prompt: Sequence[int],
    sampling: SamplingParams = GREEDY,
    retrieval: RetrievalParams = LM_ALONE,
    detail: DetailParams | None = None,
    **stopping: Any,
) -> GenerationRequest:
    return GenerationRequest(name, tuple(prompt), sampling, StoppingParams(**stopping), retrieval, detail or DetailParams())


@dataclass
class Answer:
    """All that one sample of a request was given; the first one's holds the failure of the request."""

    events: list[TokenEvent] = field(default_factory=list)
    finish: FinishEvent | None = None
    scores: ScoreResult | None = None
    neighbors: RetrieveResult | None = None
    failure: EngineFailed | None = None

    @property
    def tokens(self) -> list[int]:
        return [event.token_id for event in self.events]

    @property
    def text(self) -> str:
        assert self.finish is not None
        return "".join(event.text for event in self.events) + self.finish.text

    def take(self, output: Output) -> None:
        assert not any((self.finish, self.scores, self.neighbors, self.failure)), "something comes after the end"
        match output.content:
            case TokenEvent() as event:
                assert event.index == len(self.events)
                self.events.append(event)
            case FinishEvent() as finish:
                assert finish.completion_tokens == len(self.events)
                self.finish = finish
            case ScoreResult() as scores:
                self.scores = scores
            case RetrieveResult() as found:
                self.neighbors = found
            case failure:
                self.failure = failure


def drive(engine: DecodingEngine, actions: Mapping[int, Sequence[Callable[[], object]]] | None = None) -> dict[str, Answer]:
    """Step until nothing is left to do; ``actions[n]`` happens before step n (0, 1, …)."""
    pending = dict(actions or {})
    answers: dict[str, Answer] = defaultdict(Answer)
    for number in range(MOST_STEPS):
        for action in pending.pop(number, ()):
            action()
        if engine.idle:
            if not pending:
                return answers
            continue
        try:
            outputs = engine.step()
        except Exception as error:
            outputs = engine.fail_all(error)
        for output in outputs:
            sample = output.content.sample if isinstance(output.content, TokenEvent | FinishEvent) else 0
            answers[sample_name(output.request_id, sample)].take(output)
    raise AssertionError(f"not idle after {MOST_STEPS} steps")


def complete(engine: DecodingEngine, *requests: GenerationRequest) -> dict[str, Answer]:
    """All of them at once, to their end."""
    for wanted in requests:
        engine.add(wanted)
    return drive(engine)


def random_prompt(length: int, seed: int, vocabulary: int = 300) -> list[int]:
    """Tokens other than 0, the end of a text."""
    return torch.randint(1, vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
