"""The decoding engine: schedule, forward, retrieve, interpolate, sample, hand out. One step serves all running requests.

Runs on one thread and knows nothing of gRPC or asyncio. Prefill, decoding and whatever brings several tokens at once
are the same mechanism: each row of the slot cache brings any number of new tokens to a step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from knnlm.datastore.reader import Datastore
from knnlm.knn_lm import KNNLanguageModel, Mixed
from knnlm.model import HFLanguageModel
from knnlm.sampling import sample
from knnlm_server.completion import Completion
from knnlm_server.errors import EngineFailed
from knnlm_server.kv_cache import SlotCache
from knnlm_server.prefix_blocks import BLOCK_TOKENS
from knnlm_server.scheduler import STEP_TOKENS, RowGroup, Scheduler
from knnlm_server.scorings import Scorings
from knnlm_server.sequence import (
    FinishEvent,
    FinishReason,
    GenerationRequest,
    Limits,
    RetrieveResult,
    ScoreRequest,
    ScoreResult,
    TokenEvent,
)
from knnlm_server.step_meter import StepMeter
from knnlm_server.store_watch import StoreWatch
from knnlm_server.telemetry import EngineObserver, Unobserved
from knnlm_server.token_events import TokenReporter

PREFIX_BYTES = 64 * 2**20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Output:
    """Something for one request: an event, the result of scoring, or the error that ended it."""

    request_id: str
    content: TokenEvent | FinishEvent | ScoreResult | RetrieveResult | EngineFailed


@dataclass(frozen=True)
class _Ready:
    """Rows that get a token in this step: their sequences, logits [n, vocabulary] and keys [n, dimension]."""

    sequences: list[Completion]
    logits: Tensor
    keys: Tensor

    @staticmethod
    def join(parts: list[_Ready]) -> _Ready:
        """The rows of all parts, in their order."""
        if len(parts) == 1:
            return parts[0]
        sequences = [sequence for part in parts for sequence in part.sequences]
        return _Ready(sequences, torch.cat([part.logits for part in parts]), torch.cat([part.keys for part in parts]))

    def rows(self, rows: list[int]) -> _Ready:
        """Some of the rows."""
        return _Ready([self.sequences[row] for row in rows], self.logits[rows], self.keys[rows])


class DecodingEngine:
    """Generates for many requests at once. :meth:`add` and :meth:`cancel` between steps, :meth:`step` until idle.

    ``step_tokens``: tokens that one step reads at most; longer prompts take several steps. ``prefix_bytes``: for beginnings
    of prompts that are kept for others that share them (0: none are), in blocks of ``block_tokens``. ``observer`` is told
    of each step. ``clock``: seconds in which requests say when they arrived.
    """

    def __init__(
        self,
        knn_lm: KNNLanguageModel,
        model: HFLanguageModel,
        store: Datastore,
        limits: Limits,
        step_tokens: int = STEP_TOKENS,
        *,
        prefix_bytes: int = PREFIX_BYTES,
        block_tokens: int = BLOCK_TOKENS,
        observer: EngineObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._knn_lm, self._model, self._store, self._limits, self._step_tokens = knn_lm, model, store, limits, step_tokens
        self._prefix_bytes, self._block_tokens = prefix_bytes, block_tokens
        self._observer, self._clock, self._meter = observer or Unobserved(), clock, StepMeter()
        self._observer_failed = False
        self._watch = StoreWatch(store)
        self._tokenizer, self._eos_ids = knn_lm.tokenizer, model.eos_ids
        self._requests: dict[str, list[Completion]] = {}  # of each request the samples that have not ended
        self._scorings = Scorings()
        self._reporter = TokenReporter(self._tokenizer, store, "default")
        self._start_over()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self._scheduler.idle and not self._scorings

    def add(self, request: GenerationRequest) -> None:
        """Queue a request; raises :class:`~knnlm_server.errors.QueueFull`."""
        samples = [Completion(request, number, self._tokenizer) for number in range(request.samples)]
        self._scheduler.add(samples)
        self._requests[request.request_id] = samples

    def add_score(self, request: ScoreRequest) -> None:
        """Queue a text to be scored; its windows take turns with decoding steps."""
        self._scorings.add(request, self._knn_lm, self._store.manifest.windowing)

    def cancel(self, request_id: str) -> None:
        """Forget a request, wherever it is; its rows are free for the next step. Unknown ids are done already."""
        for completion in self._requests.pop(request_id, ()):
            self._scheduler.finish(completion)
        self._scorings.cancel(request_id)

    def step(self) -> list[Output]:
        """One forward pass for each group of rows, one search for all, one token for each row that is ready."""
        with self._meter.measure("step"):
            # Before anything is searched: what a step finds, its evidence may show.
            self._watch.look()
            outputs = self._end_expired()
            groups = self._scheduler.schedule()
            self._tell_admissions(groups)
            parts = [part for group in groups if (part := self._forward(group)) is not None]
            if parts:
                outputs += self._next_tokens(_Ready.join(parts))
            # Last, since what a step has in hand is lost if decoding breaks; scoring fails for its own request alone.
            with self._meter.measure("score"):
                scored = self._scorings.step()
        self._tell_step()
        return outputs if scored is None else [*outputs, Output(*scored)]

    def fail_all(self, error: Exception) -> list[Output]:
        """Give up all requests after ``error`` broke a step as a whole, and begin anew with an empty cache."""
        ids = [*self._requests, *self._scorings.request_ids]
        self._start_over()
        return [Output(request_id, EngineFailed.of(error)) for request_id in ids]

    def _start_over(self) -> None:
        self._cache = SlotCache(
            self._model.layers, self._limits.max_concurrent, self._limits.context, self._prefix_bytes, self._block_tokens
        )
        self._scheduler: Scheduler[Completion] = Scheduler(self._cache, self._limits, self._step_tokens)
        self._requests.clear()
        self._scorings.clear()

    def _end_expired(self) -> list[Output]:
        """End what has run out of time with what there is."""
        return [output for completion in self._scheduler.expired(self._clock()) for output in self._end(completion, FinishReason.TIME)]

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

    def _tell_admissions(self, groups: list[RowGroup[Completion]]) -> None:
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

    def _forward(self, group: RowGroup[Completion]) -> _Ready | None:
        """Run the rows of a group; return those whose prompt is now read to its end."""
        self._meter.count("prompt_tokens", sum(count for s, count in zip(group.sequences, group.counts, strict=True) if not s.generated))
        with self._meter.measure("forward"):
            return self._run(group)

    def _run(self, group: RowGroup[Completion]) -> _Ready | None:
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

    def _mix(self, ready: _Ready) -> tuple[Tensor, Mixed]:
        with self._meter.measure("retrieval"):
            return self._search_and_mix(ready)

    def _search_and_mix(self, ready: _Ready) -> tuple[Tensor, Mixed]:
        lm = ready.logits.log_softmax(-1)
        wanted = [sequence.request.retrieval for sequence in ready.sequences]
        mixed = self._knn_lm.mix(
            lm, ready.keys,
            k=torch.tensor([r.k for r in wanted]),
            temperature=torch.tensor([r.temperature for r in wanted], dtype=torch.float64),
            weight=torch.tensor([r.weight for r in wanted], dtype=torch.float64),
        )  # fmt: skip
        return lm, mixed

    def _next_tokens(self, ready: _Ready) -> list[Output]:
        """A token for each row that is ready."""
        outputs: list[Output] = []
        try:
            lm, mixed = self._mix(ready)
        except Exception:  # whose retrieval fails is seen row by row: it ends those requests alone
            outputs, good = self._without_failing(ready)
            if not good.sequences:
                return outputs
            ready = good
            lm, mixed = self._mix(ready)
        self._meter.count("decoded_rows", len(ready.sequences))
        self._meter.count("searched_rows", sum(completion.request.retrieval.weight > 0 for completion in ready.sequences))
        with self._meter.measure("sample"):
            return outputs + self._hand_out(ready, lm, mixed)

    def _without_failing(self, ready: _Ready) -> tuple[list[Output], _Ready]:
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

    def _hand_out(self, ready: _Ready, lm: Tensor, mixed: Mixed) -> list[Output]:
        outputs: list[Output] = []
        for row, (completion, token) in enumerate(zip(ready.sequences, self._choose(ready, lm, mixed), strict=True)):
            if completion not in self._requests.get(completion.request_id, ()):
                continue  # another sample of its request failed in this step
            try:
                if isinstance(token, Exception):
                    raise token
                outputs += self._next_token(row, completion, token, lm, mixed)
            except Exception as error:
                outputs += self._fail(completion.request_id, error)
        return outputs

    def _next_token(self, row: int, completion: Completion, token: int, lm: Tensor, mixed: Mixed) -> list[Output]:
        text, reason = completion.take(token, self._eos_ids)
        if completion.request.mean_log_prob:
            completion.log_prob_sum += float(mixed.log_probs[row, token])
        event = Output(completion.request_id, self._event(row, completion, token, text, lm, mixed))
        return [event] if reason is None else [event, *self._end(completion, reason)]

    def _choose(self, ready: _Ready, lm: Tensor, mixed: Mixed) -> list[int | Exception]:
        """The next token of each row, or what went wrong with that row alone."""
        greedy = mixed.log_probs.argmax(-1).tolist()
        chosen: list[int | Exception] = []
        for row, completion in enumerate(ready.sequences):
            try:
                chosen.append(self._choose_one(row, completion, greedy[row], lm, mixed))
            except Exception as error:
                chosen.append(error)
        return chosen

    def _choose_one(self, row: int, completion: Completion, greedy: int, lm: Tensor, mixed: Mixed) -> int:
        params, uniform = completion.request.sampling, completion.random.random()
        ends = set() if completion.may_end else completion.ends(self._eos_ids)
        if params.temperature == 0.0 and params.repetition_penalty == 1.0 and not ends:
            return greedy
        log_probs = mixed.log_probs[row]
        if ends:
            forbidden = torch.tensor(sorted(ends))
            log_probs = log_probs.index_fill(0, forbidden, -torch.inf)
            if not bool(log_probs.isfinite().any()):  # at weight 1, all neighbours may say that the text ends here
                log_probs = lm[row].index_fill(0, forbidden, -torch.inf)
        return sample(log_probs, params, completion.tokens, uniform)

    def _event(self, row: int, completion: Completion, token: int, text: str, lm: Tensor, mixed: Mixed) -> TokenEvent:
        request = completion.request
        details = self._reporter.details(row, token, request.detail, request.retrieval, lm, mixed)
        return TokenEvent(index=completion.generated - 1, text=text, sample=completion.sample, **details)
