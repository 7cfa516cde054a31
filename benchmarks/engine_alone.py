"""The decoding engine in this process, without gRPC, asyncio or threads, and where its time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from knnlm.opening import OpenedKNNLM
from knnlm.sampling import SamplingParams
from knnlm_server.engine import DecodingEngine
from knnlm_server.sequence import FinishEvent, GenerationRequest, Limits, RetrievalParams, StoppingParams

OFF = RetrievalParams(0.0, 1, 1.0)


class Stopwatch:
    """Seconds by the clock in calls of methods, by the name of what they do."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Count the seconds of ``owner.method`` under ``name`` from now on."""
        call: Callable[..., Any] = getattr(owner, method)
        self.seconds.setdefault(name, 0.0)

        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                self.seconds[name] += time.perf_counter() - started

        setattr(owner, method, timed)


class EngineAlone:
    """Steps an engine until all prompts have as many tokens as asked, nobody else being served.

    ``seconds``: by the clock since it was made or :meth:`reset`, of all runs together and of their parts.
    """

    def __init__(self, opened: OpenedKNNLM, rows: int) -> None:
        self._mixture = opened.knn_lm.mixture
        self._engine = DecodingEngine(opened.knn_lm, opened.model, opened.store, Limits(context=opened.model.context, max_concurrent=rows))
        self._watch = Stopwatch()
        retriever = opened.knn_lm.retriever
        self._watch.watch(opened.model, "forward", "forward")
        self._watch.watch(retriever, "retrieve", "retrieval")
        self._watch.watch(retriever.index, "search", "search")
        self._watch.watch(self._engine, "step", "step")

    def run(self, prompts: Sequence[Sequence[int]], tokens: int, *, retrieval: bool) -> None:
        """All prompts at once, greedy, to their end."""
        mixture = self._mixture
        wanted = RetrievalParams(mixture.weight, mixture.k, mixture.temperature) if retrieval else OFF
        stopping = StoppingParams(max_new_tokens=tokens, ignore_eos=True)
        for number, prompt in enumerate(prompts):
            self._engine.add(GenerationRequest(str(number), tuple(prompt), SamplingParams(temperature=0.0), stopping, wanted))
        finished = 0
        while not self._engine.idle:
            finished += sum(isinstance(output.content, FinishEvent) for output in self._engine.step())
        assert finished == len(prompts)

    def reset(self) -> None:
        """Begin to count anew."""
        self._watch.seconds = dict.fromkeys(self._watch.seconds, 0.0)

    @property
    def parts(self) -> dict[str, float]:
        """Seconds since :meth:`reset`, all runs together: they sum to those of the steps."""
        seconds = self._watch.seconds
        rest = seconds["step"] - seconds["forward"] - seconds["retrieval"]
        return {
            "forward": seconds["forward"],
            "search": seconds["search"],
            "re-rank": seconds["retrieval"] - seconds["search"],
            "mix, sample and the rest of a step": rest,
        }
