"""The decoding engine in this process, without gRPC, asyncio or a thread of its own, and where its time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from knnlm.index import Candidates
from knnlm.opening import OpenedKNNLM
from knnlm.sampling import SamplingParams
from knnlm_server.datastores import Datastores
from knnlm_server.engine import DecodingEngine
from knnlm_server.sequence import FinishEvent, GenerationRequest, Limits, RetrievalParams, StoppingParams
from knnlm_server.telemetry import StepReport

OFF = RetrievalParams(0.0, 1, 1.0)
REST = "schedule, hand out"


class EngineAlone:
    """Steps an engine until all prompts have as many tokens as asked, nobody else being served."""

    def __init__(self, opened: OpenedKNNLM, rows: int) -> None:
        mixture, index = opened.knn_lm.mixture, opened.searchable.retriever.index
        self._mixture = RetrievalParams(mixture.weight, mixture.k, mixture.temperature)
        datastores = Datastores(opened.model, opened.knn_lm.tokenizer)
        datastores.serve("default", opened.searchable)
        limits = Limits(context=opened.model.context, max_concurrent=rows)
        self._engine = DecodingEngine(opened.model, opened.knn_lm.tokenizer, datastores, limits, observer=self)
        self._search: Callable[..., Candidates] = index.search
        index.search = self._timed_search  # type: ignore[method-assign]  # its time is no part of the engine's report
        self._steps: list[StepReport] = []
        self._search_seconds = 0.0

    def run(self, prompts: Sequence[Sequence[int]], tokens: int, *, retrieval: bool) -> dict[str, float]:
        """All prompts at once, greedy, to their end; seconds by what the engine did, which sum to those of its steps."""
        self._steps, self._search_seconds = [], 0.0
        stopping = StoppingParams(max_new_tokens=tokens, ignore_eos=True)
        wanted = self._mixture if retrieval else OFF
        for number, prompt in enumerate(prompts):
            self._engine.add(GenerationRequest(str(number), tuple(prompt), SamplingParams(temperature=0.0), stopping, wanted))
        finished = 0
        while not self._engine.idle:
            finished += sum(isinstance(output.content, FinishEvent) for output in self._engine.step())
        assert finished == len(prompts)
        return self._parts()

    def _parts(self) -> dict[str, float]:
        seconds = {
            part: sum(getattr(step, f"{part}_seconds") for step in self._steps) for part in ("forward", "retrieval", "mix", "sample")
        }
        parts = {
            "forward": seconds["forward"],
            "search": self._search_seconds,
            "re-rank": seconds["retrieval"] - self._search_seconds,
            "mix": seconds["mix"],
            "sample": seconds["sample"],
        }
        return {**parts, REST: sum(step.seconds for step in self._steps) - sum(parts.values())}

    def _timed_search(self, *arguments: Any, **options: Any) -> Candidates:
        started = time.perf_counter()
        try:
            return self._search(*arguments, **options)
        finally:
            self._search_seconds += time.perf_counter() - started

    def step(self, report: StepReport) -> None:
        """See :meth:`~knnlm_server.telemetry.EngineObserver.step`."""
        self._steps.append(report)

    def admitted(self, request_id: str, waited_seconds: float, prompt_tokens: int, reused_tokens: int) -> None:
        """See :meth:`~knnlm_server.telemetry.EngineObserver.admitted`."""
