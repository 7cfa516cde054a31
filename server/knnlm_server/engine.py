"""The decoding engine: schedule, forward, retrieve, interpolate, sample, hand out. One step serves all running requests.

Runs on one thread and knows nothing of gRPC or asyncio. Prefill, decoding and whatever brings several tokens at once
are the same mechanism: each row of the slot cache brings any number of new tokens to a step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from knnlm.datastore_mix import retrieve_union
from knnlm.gated import RowWeights
from knnlm.knn_lm import KNNLanguageModel, Mixed, mix_neighbors
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel
from knnlm.thread_pools import size_thread_pools
from knnlm.tokenization import TextTokenizer
from knnlm_server.completion import Completion
from knnlm_server.datastores import Datastores
from knnlm_server.errors import EngineFailed
from knnlm_server.kv_cache import SlotCache
from knnlm_server.lookup import Lookup
from knnlm_server.prefix_blocks import BLOCK_TOKENS
from knnlm_server.row_sampling import draw_rows
from knnlm_server.scheduler import STEP_TOKENS, RowGroup, Scheduler
from knnlm_server.scorings import Scorings
from knnlm_server.sequence import (
    FinishEvent,
    FinishReason,
    GenerationRequest,
    Limits,
    RetrieveRequest,
    RetrieveResult,
    ScoreRequest,
    ScoreResult,
    TokenEvent,
)
from knnlm_server.served_stores import gated_rows, shares_of
from knnlm_server.step_meter import StepMeter
from knnlm_server.telemetry import EngineObserver, Unobserved
from knnlm_server.token_events import TokenReporter

PREFIX_BYTES = 64 * 2**20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Output:
    """Something for one request: an event, the result of scoring or of retrieval, or the error that ended it."""

    request_id: str
    content: TokenEvent | FinishEvent | ScoreResult | RetrieveResult | EngineFailed


S = TypeVar("S", Completion, Completion | Lookup)


@dataclass(frozen=True)
class _Ready(Generic[S]):
    """Rows whose text is read to its end in this step: their sequences, logits [n, vocabulary] and keys [n, dimension]."""

    sequences: list[S]
    logits: Tensor
    keys: Tensor

    @staticmethod
    def join(parts: list[_Ready[S]]) -> _Ready[S]:
        """The rows of all parts, in their order."""
        if len(parts) == 1:
            return parts[0]
        sequences = [sequence for part in parts for sequence in part.sequences]
        return _Ready(sequences, torch.cat([part.logits for part in parts]), torch.cat([part.keys for part in parts]))

    def rows(self, rows: list[int]) -> _Ready[S]:
        """Some of the rows."""
        return _Ready([self.sequences[row] for row in rows], self.logits[rows], self.keys[rows])


@dataclass(frozen=True)
class _Drawn:
    """A row's next token, and the one that the base model alone would have drawn; or what went wrong with that row."""

    token: int | Exception
    alone: int | Exception


def _said(token: int | Exception) -> int:
    if isinstance(token, Exception):
        raise token
    return token


def _completions(ready: _Ready[Completion | Lookup], lm: Tensor, mixed: Mixed) -> tuple[_Ready[Completion], Tensor, Mixed]:
    """The rows that get a token."""
    sequences = [sequence for sequence in ready.sequences if isinstance(sequence, Completion)]
    if len(sequences) == len(ready.sequences):
        return _Ready(sequences, ready.logits, ready.keys), lm, mixed
    rows = [row for row, sequence in enumerate(ready.sequences) if isinstance(sequence, Completion)]
    return _Ready(sequences, ready.logits[rows], ready.keys[rows]), lm[rows], mixed.rows(rows)


class DecodingEngine:
    """Generates for many requests at once. :meth:`add` and :meth:`cancel` between steps, :meth:`step` until idle.

    ``step_tokens``: tokens that one step reads at most; longer prompts take several steps. ``prefix_bytes``: for beginnings
    of prompts that are kept for others that share them (0: none are), in blocks of ``block_tokens``. ``observer`` is told
    of each step. ``overlap``: search for one half of the decoding rows while the other half runs through the model, with the
    same results; off, since on 2 cores it took 1.3 times the CPU-seconds (8 and 32 rows, 1.2 M entries). ``clock``: seconds
    in which requests say when they arrived.
    """

    def __init__(
        self,
        model: HFLanguageModel,
        tokenizer: TextTokenizer,
        datastores: Datastores,
        limits: Limits,
        step_tokens: int = STEP_TOKENS,
        *,
        prefix_bytes: int = PREFIX_BYTES,
        block_tokens: int = BLOCK_TOKENS,
        overlap: bool = False,
        observer: EngineObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model, self._tokenizer, self._datastores, self._limits, self._step_tokens = model, tokenizer, datastores, limits, step_tokens
        self._prefix_bytes, self._block_tokens = prefix_bytes, block_tokens
        self._observer, self._clock, self._meter = observer or Unobserved(), clock, StepMeter()
        self._observer_failed = False
        self._worker = ThreadPoolExecutor(1, "knnlm-search", size_thread_pools, (torch.get_num_threads(),)) if overlap else None
        self._eos_ids = model.eos_ids
        self._requests: dict[str, list[Completion | Lookup]] = {}  # of each request what has not ended
        self._scorings = Scorings(limits)
        self._reporter = TokenReporter(tokenizer, datastores.numbered)
        self._start_over()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self._scheduler.idle and not self._scorings

    def add(self, request: GenerationRequest) -> None:
        """Queue a request, which keeps the datastores that it chooses now.

        Raises :class:`~knnlm_server.errors.QueueFull` and :class:`~knnlm_server.errors.DatastoreNotLoaded`.
        """
        stores = self._datastores.choose(request.retrieval)
        documents = self._limits.max_evidence_documents
        self._add(request.request_id, [Completion(request, n, self._tokenizer, stores, documents) for n in range(request.samples)])

    def add_retrieve(self, request: RetrieveRequest) -> None:
        """Queue a context whose neighbours are wanted; as :meth:`add`."""
        self._add(request.request_id, [Lookup(request, self._datastores.choose(request.retrieval))])

    def _add(self, request_id: str, sequences: Sequence[Completion | Lookup]) -> None:
        self._scheduler.add(sequences)
        self._requests[request_id] = list(sequences)

    def add_score(self, request: ScoreRequest) -> None:
        """Queue a text to be scored; its windows take turns with decoding steps. Raises as :meth:`add`."""
        retrieval = request.retrieval
        stores = self._datastores.choose(retrieval)
        mixture = Mixture(retrieval.k, retrieval.temperature, retrieval.weight)
        knn_lm = KNNLanguageModel(self._model, self._tokenizer, stores.mix, mixture, stores.gate)
        self._scorings.add(request, knn_lm, self._datastores.windowing(request.retrieval), stores)

    def look(self) -> None:
        """Take over what was removed from datastores; every step does, so this is for the time between requests."""
        self._datastores.look()

    def cancel(self, request_id: str) -> None:
        """Forget a request, wherever it is; its rows are free for the next step. Unknown ids are done already."""
        for completion in self._requests.pop(request_id, ()):
            self._scheduler.finish(completion)
        self._scorings.cancel(request_id)

    def step(self) -> list[Output]:
        """One forward pass for each group of rows, one search for all, one token for each row that is ready."""
        with self._meter.measure("step"):
            # Before anything is searched: what a step finds, its evidence may show.
            self.look()
            outputs = self._end_expired()
            groups = self._scheduler.schedule()
            self._tell_admissions(groups)
            outputs += self._overlapped(groups) if self._worker is not None else self._one_by_one(groups)
            # Last, since what a step has in hand is lost if decoding breaks; scoring fails for its own request alone.
            with self._meter.measure("score"):
                scored = self._scorings.step()
        self._tell_step()
        return outputs if scored is None else [*outputs, Output(*scored)]

    def _one_by_one(self, groups: list[RowGroup[Completion | Lookup]]) -> list[Output]:
        """All forward passes, then one search for all rows that are ready."""
        parts = [part for group in groups if (part := self._forward(group)) is not None]
        if not parts:
            return []
        ready = _Ready.join(parts)
        return self._next_tokens(ready, lambda: self._mix(ready))

    def _overlapped(self, groups: list[RowGroup[Completion | Lookup]]) -> list[Output]:
        """Search for the rows of one forward pass while the next one runs; decoding rows come in two halves."""
        assert self._worker is not None
        parts = [part for group in groups for half in group.halves() if (part := self._forward_and_search(half)) is not None]
        return [output for ready, mixing in parts for output in self._next_tokens(ready, mixing.result)]

    def _forward_and_search(
        self, group: RowGroup[Completion | Lookup]
    ) -> tuple[_Ready[Completion | Lookup], Future[tuple[Tensor, Mixed]]] | None:
        assert self._worker is not None
        ready = self._forward(group)
        return None if ready is None else (ready, self._worker.submit(self._mix, ready))

    def fail_all(self, error: Exception) -> list[Output]:
        """Give up all requests after ``error`` broke a step as a whole, and begin anew with an empty cache."""
        ids = [*self._requests, *self._scorings.request_ids]
        self._start_over()
        return [Output(request_id, EngineFailed.of(error)) for request_id in ids]

    def _start_over(self) -> None:
        self._cache = SlotCache(
            self._model.layers, self._limits.max_concurrent, self._limits.context, self._prefix_bytes, self._block_tokens
        )
        self._scheduler: Scheduler[Completion | Lookup] = Scheduler(self._cache, self._limits, self._step_tokens)
        self._requests.clear()
        self._scorings.clear()

    def _end_expired(self) -> list[Output]:
        """End what has run out of time with what there is."""
        over = [sequence for sequence in self._scheduler.expired(self._clock()) if isinstance(sequence, Completion)]
        return [output for completion in over for output in self._end(completion, FinishReason.TIME)]

    def _end(self, completion: Completion, reason: FinishReason) -> list[Output]:
        """End one sample, and its request where it is the last; an error ends the request."""
        samples = self._requests.get(completion.request_id, [])
        if completion not in samples:
            return []
        try:
            finish = completion.finish(reason)
        except Exception as error:
            return self._fail(completion.request_id, error)
        samples.remove(completion)
        if not samples:
            del self._requests[completion.request_id]
        self._scheduler.finish(completion)
        return [Output(completion.request_id, finish)]

    def _fail(self, request_id: str, error: Exception) -> list[Output]:
        """End a request with all of its samples: whatever goes wrong with one row ends that request alone."""
        if request_id not in self._requests:
            return []  # another of its samples failed before, and that was said
        logger.error("request %s failed", request_id, exc_info=error)
        self.cancel(request_id)
        return [Output(request_id, EngineFailed.of(error))]

    def _tell_admissions(self, groups: list[RowGroup[Completion | Lookup]]) -> None:
        """Tell of requests whose first sample begins to be read with this step."""
        for completion in (completion for group in groups for completion in group.sequences if not completion.started):
            completion.started = True
            if completion.sample == 0:
                told = completion.request_id, self._clock() - completion.request.arrived, len(completion.prompt), completion.reused
                self._tell(lambda observer, told=told: observer.admitted(*told))  # type: ignore[misc]

    def _tell_step(self) -> None:
        waiting = self._scheduler.waiting_requests
        report = self._meter.report(
            running=len(self._scheduler.running), waiting=len(waiting), waiting_tokens=sum(waiting.values()),
            cache_tokens=sum(sequence.computed for sequence in self._scheduler.running),
        )  # fmt: skip
        self._tell(lambda observer: observer.step(report))

    def _tell(self, what: Callable[[EngineObserver], None]) -> None:
        """An observer that raises harms nobody; its first error is logged."""
        try:
            what(self._observer)
        except Exception:
            if not self._observer_failed:
                logger.exception("the engine's observer failed; its counts are not complete")
            self._observer_failed = True

    def _forward(self, group: RowGroup[Completion | Lookup]) -> _Ready[Completion | Lookup] | None:
        """Run the rows of a group; return those whose prompt is now read to its end."""
        self._meter.count("prompt_tokens", sum(count for s, count in zip(group.sequences, group.counts, strict=True) if not s.generated))
        with self._meter.measure("forward"):
            return self._run(group)

    def _run(self, group: RowGroup[Completion | Lookup]) -> _Ready[Completion | Lookup] | None:
        device, sequences, counts, widest = self._model.device, list(group.sequences), group.counts, max(group.counts)
        starts = torch.tensor([sequence.computed for sequence in sequences])
        positions, mask = self._cache.place(group.start, starts.to(device), torch.tensor(counts).to(device))
        # Rows with fewer tokens than the widest are filled up with any.
        new = [s.tokens[s.computed : s.computed + count] + [0] * (widest - count) for s, count in zip(sequences, counts, strict=True)]
        ready = [row for row, sequence in enumerate(sequences) if sequence.remaining == counts[row]]
        columns = sorted({counts[row] - 1 for row in ready})
        out = self._model.forward(
            torch.tensor(new).to(device), logits=bool(ready), columns=torch.tensor(columns, device=device), positions=positions,
            attention_mask=self._model.attention_mask(mask), cache=self._cache,
        )  # fmt: skip
        self._scheduler.computed(group)
        if out.logits is None:
            return None
        if widest == 1 and len(ready) == len(sequences):
            return _Ready(sequences, out.logits[:, 0].float().cpu(), out.keys[:, 0].float().cpu())
        last = [counts[row] - 1 for row in ready]
        logits, keys = out.logits[ready, [columns.index(column) for column in last]], out.keys[ready, last]
        return _Ready([sequences[row] for row in ready], logits.float().cpu(), keys.float().cpu())

    def _mix(self, ready: _Ready[Completion | Lookup]) -> tuple[Tensor, Mixed]:
        """The base LM's log-probabilities and the mixture of each row: one search for each datastore that is used."""
        wanted = [sequence.request.retrieval for sequence in ready.sequences]
        temperature = torch.tensor([r.temperature for r in wanted], dtype=torch.float64)
        stores = [sequence.stores for sequence in ready.sequences]
        with self._meter.measure("mix"):
            lm = ready.logits.log_softmax(-1)
            asked = torch.tensor([r.weight for r in wanted], dtype=torch.float64)
            weights = RowWeights(asked, lm, gated_rows(stores, [sequence.tokens for sequence in ready.sequences]))
        # A step without a search has no time of one.
        with self._meter.measure("retrieval") if bool(weights.searched.any()) else nullcontext():
            k = torch.where(weights.searched, torch.tensor([r.k for r in wanted]), 0)
            neighbors = retrieve_union(ready.keys, k, shares_of(stores))
        with self._meter.measure("mix"):
            return lm, mix_neighbors(lm, neighbors, temperature=temperature, weights=weights)

    def _next_tokens(self, ready: _Ready[Completion | Lookup], mix: Callable[[], tuple[Tensor, Mixed]]) -> list[Output]:
        """A token for each completion that is ready, and its neighbours for each lookup; ``mix`` gives their distributions."""
        outputs: list[Output] = []
        try:
            lm, mixed = mix()
        except Exception:  # whose retrieval fails is seen row by row: it ends those requests alone
            outputs, good = self._without_failing(ready)
            if not good.sequences:
                return outputs
            ready = good
            lm, mixed = self._mix(ready)
        for row, sequence in enumerate(ready.sequences):
            if isinstance(sequence, Lookup):
                outputs += self._answer(sequence.request, row, mixed)
        drawn, lm, mixed = _completions(ready, lm, mixed)
        self._meter.count("decoded_rows", len(drawn.sequences))
        self._meter.count("searched_rows", int(mixed.searched.sum()))
        with self._meter.measure("sample"):
            return outputs + self._hand_out(drawn, lm, mixed)

    def _answer(self, request: RetrieveRequest, row: int, mixed: Mixed) -> list[Output]:
        """The neighbours of a context, whose request ends with them."""
        try:
            found = self._reporter.neighbors(mixed.neighbors.row(row), request.retrieval.temperature, request.neighbors)
        except Exception as error:
            return self._fail(request.request_id, error)
        self.cancel(request.request_id)
        return [Output(request.request_id, RetrieveResult(found))]

    def _without_failing(self, ready: _Ready[Completion | Lookup]) -> tuple[list[Output], _Ready[Completion | Lookup]]:
        """Try each row's retrieval alone: the end of those requests that fail, and the rows that don't."""
        outputs: list[Output] = []
        good = []
        for row, completion in enumerate(ready.sequences):
            try:
                self._mix(ready.rows([row]))
            except Exception as error:
                outputs += self._fail(completion.request_id, error)
            else:
                good.append(row)
        return outputs, ready.rows(good)

    def _hand_out(self, ready: _Ready[Completion], lm: Tensor, mixed: Mixed) -> list[Output]:
        outputs: list[Output] = []
        for row, (completion, drawn) in enumerate(zip(ready.sequences, self._choose(ready, lm, mixed), strict=True)):
            if completion not in self._requests.get(completion.request_id, ()):
                continue  # another sample of its request failed in this step
            try:
                outputs += self._next_token(row, completion, drawn, lm, mixed)
            except Exception as error:
                outputs += self._fail(completion.request_id, error)
        return outputs

    def _next_token(self, row: int, completion: Completion, drawn: _Drawn, lm: Tensor, mixed: Mixed) -> list[Output]:
        token = _said(drawn.token)
        text, reason = completion.take(token, self._eos_ids)
        if completion.request.mean_log_prob:
            completion.log_prob_sum += float(mixed.log_probs[row, token])
        if completion.evidence is not None:
            found = mixed.neighbors.row(row) if mixed.searched[row] else None
            temperature = completion.request.retrieval.temperature
            completion.evidence.add(token, _said(drawn.alone), found, temperature, mixed.knn_share(row, token))
        event = Output(completion.request_id, self._event(row, completion, token, text, lm, mixed))
        return [event] if reason is None else [event, *self._end(completion, reason)]

    def _choose(self, ready: _Ready[Completion], lm: Tensor, mixed: Mixed) -> list[_Drawn]:
        """The next token of each row."""
        rows = [completion.next_draw(self._eos_ids) for completion in ready.sequences]
        drawn = draw_rows(mixed.log_probs, lm, rows)
        # What would have been without retrieval is a question of those alone that asked and searched.
        asked = [row for row, c in enumerate(ready.sequences) if c.evidence is not None and mixed.searched[row]]
        alone = dict(zip(asked, draw_rows(lm[asked], lm[asked], [rows[row] for row in asked]) if asked else (), strict=True))
        return [_Drawn(token, alone.get(row, token)) for row, token in enumerate(drawn)]

    def _event(self, row: int, completion: Completion, token: int, text: str, lm: Tensor, mixed: Mixed) -> TokenEvent:
        request = completion.request
        details = self._reporter.details(row, token, request.detail, request.retrieval, lm, mixed)
        return TokenEvent(index=completion.generated - 1, text=text, sample=completion.sample, **details)
