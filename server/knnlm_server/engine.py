"""The decoding engine: schedule, forward, retrieve, interpolate, sample, hand out. One step serves all running requests.

Runs on one thread and knows nothing of gRPC or asyncio. Prefill, decoding and whatever brings several tokens at once
are the same mechanism: each row of the slot cache brings any number of new tokens to a step.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from knnlm.datastore.reader import Datastore
from knnlm.knn_lm import KNNLanguageModel, Mixed
from knnlm.model import HFLanguageModel
from knnlm.sampling import sample
from knnlm_server.errors import EngineFailed
from knnlm_server.kv_cache import SlotCache
from knnlm_server.scheduler import STEP_TOKENS, RowGroup, Scheduler, Sequence
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
from knnlm_server.store_watch import StoreWatch
from knnlm_server.text_stream import TextStream
from knnlm_server.token_events import TokenReporter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Output:
    """Something for one request: an event, the result of scoring, or the error that ended it."""

    request_id: str
    content: TokenEvent | FinishEvent | ScoreResult | RetrieveResult | EngineFailed


@dataclass
class _Generation:
    """What the engine keeps of a request beside its tokens."""

    sequence: Sequence
    text: TextStream
    random: random.Random


@dataclass(frozen=True)
class _Ready:
    """Rows that get a token in this step: their sequences, logits [n, vocabulary] and keys [n, dimension]."""

    sequences: list[Sequence]
    logits: Tensor
    keys: Tensor


class DecodingEngine:
    """Generates for many requests at once. :meth:`add` and :meth:`cancel` between steps, :meth:`step` until idle.

    ``step_tokens``: tokens that one step reads at most; longer prompts take several steps.
    """

    def __init__(
        self, knn_lm: KNNLanguageModel, model: HFLanguageModel, store: Datastore, limits: Limits, step_tokens: int = STEP_TOKENS
    ) -> None:
        self._knn_lm, self._model, self._store, self._limits, self._step_tokens = knn_lm, model, store, limits, step_tokens
        self._watch = StoreWatch(store)
        self._tokenizer = knn_lm.tokenizer
        self._generations: dict[str, _Generation] = {}
        self._scorings = Scorings()
        self._reporter = TokenReporter(self._tokenizer, store, "default")
        self._start_over()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self._scheduler.idle and not self._scorings

    def add(self, request: GenerationRequest) -> None:
        """Queue a request; raises :class:`~knnlm_server.errors.QueueFull`."""
        sequence = Sequence(request)
        text = TextStream(self._tokenizer, request.prompt, request.stopping.stop_strings)
        generation = _Generation(sequence, text, random.Random(request.sampling.seed))
        self._scheduler.add(sequence)
        self._generations[request.request_id] = generation

    def add_score(self, request: ScoreRequest) -> None:
        """Queue a text to be scored; its windows take turns with decoding steps."""
        self._scorings.add(request, self._knn_lm, self._store.manifest.windowing)

    def cancel(self, request_id: str) -> None:
        """Forget a request, wherever it is; its row is free for the next step. Unknown ids are done already."""
        generation = self._generations.pop(request_id, None)
        if generation is not None:
            self._scheduler.finish(generation.sequence)
        self._scorings.cancel(request_id)

    def step(self) -> list[Output]:
        """One forward pass for each group of rows, one search for all, one token for each row that is ready."""
        outputs: list[Output] = []
        # Before anything is searched: what a step finds, its evidence may show.
        self._watch.look()
        parts = [part for group in self._scheduler.schedule() if (part := self._forward(group)) is not None]
        if parts:
            ready = _Ready(
                [sequence for part in parts for sequence in part.sequences],
                torch.cat([part.logits for part in parts]),
                torch.cat([part.keys for part in parts]),
            )
            outputs += self._hand_out(ready, self._mix(ready))
        # Last, since what a step has in hand is lost if decoding breaks; scoring fails for its own request alone.
        scored = self._scorings.step()
        return outputs if scored is None else [*outputs, Output(*scored)]

    def fail_all(self, error: Exception) -> list[Output]:
        """Give up all requests after ``error`` broke a step as a whole, and begin anew with an empty cache."""
        ids = [*self._generations, *self._scorings.request_ids]
        self._start_over()
        return [Output(request_id, EngineFailed.of(error)) for request_id in ids]

    def _start_over(self) -> None:
        self._cache = SlotCache(self._model.layers, self._limits.max_concurrent, self._limits.context)
        self._scheduler = Scheduler(self._cache, self._limits, self._step_tokens)
        self._generations.clear()
        self._scorings.clear()

    def _forward(self, group: RowGroup) -> _Ready | None:
        """Run the rows of a group; return those whose prompt is now read to its end."""
        device = self._model.device
        starts = torch.tensor([s.computed for s in group.sequences])
        counts = torch.tensor(group.counts)
        widest = max(group.counts)
        tokens = torch.zeros((len(counts), widest), dtype=torch.int64)
        for row, (sequence, count) in enumerate(zip(group.sequences, group.counts, strict=True)):
            tokens[row, :count] = torch.tensor(sequence.tokens[sequence.computed : sequence.computed + count])
        positions, mask = self._cache.place(group.start, starts.to(device), counts.to(device))
        ready = [row for row, s in enumerate(group.sequences) if s.remaining == group.counts[row]]
        columns = torch.unique(counts[ready] - 1)
        out = self._model.forward(
            tokens.to(device), logits=bool(ready), columns=columns.to(device), positions=positions,
            attention_mask=self._model.attention_mask(mask), cache=self._cache,
        )  # fmt: skip
        sequences = list(group.sequences)
        self._scheduler.computed(group)
        if out.logits is None:
            return None
        rows, last = torch.tensor(ready), counts[ready] - 1
        logits = out.logits[rows.to(device), torch.searchsorted(columns, last).to(device)]
        keys = out.keys[rows.to(device), last.to(device)]
        return _Ready([sequences[row] for row in ready], logits.float().cpu(), keys.float().cpu())

    def _mix(self, ready: _Ready) -> tuple[Tensor, Mixed]:
        lm = ready.logits.log_softmax(-1)
        wanted = [sequence.request.retrieval for sequence in ready.sequences]
        mixed = self._knn_lm.mix(
            lm, ready.keys,
            k=torch.tensor([r.k for r in wanted]),
            temperature=torch.tensor([r.temperature for r in wanted], dtype=torch.float64),
            weight=torch.tensor([r.weight for r in wanted], dtype=torch.float64),
        )  # fmt: skip
        return lm, mixed

    def _hand_out(self, ready: _Ready, distributions: tuple[Tensor, Mixed]) -> list[Output]:
        lm, mixed = distributions
        greedy = mixed.log_probs.argmax(-1).tolist()
        outputs: list[Output] = []
        for row, sequence in enumerate(ready.sequences):
            request_id = sequence.request.request_id
            try:
                outputs += self._next_token(row, self._generations[request_id], greedy[row], lm, mixed)
            except Exception as error:  # whatever goes wrong with one row ends that request alone
                logger.exception("request %s failed", request_id)
                self.cancel(request_id)
                outputs.append(Output(request_id, EngineFailed.of(error)))
        return outputs

    def _next_token(self, row: int, generation: _Generation, greedy: int, lm: Tensor, mixed: Mixed) -> Iterator[Output]:
        sequence, request = generation.sequence, generation.sequence.request
        token = self._choose(row, generation, greedy, lm, mixed)
        sequence.tokens.append(token)
        count, stopping = sequence.generated, request.stopping
        may_stop = count >= stopping.min_new_tokens
        reason = self._stop_reason(token, request) if may_stop else None
        # A token that ends the completion is no part of its text.
        text = "" if reason else generation.text.push(token, may_stop=may_stop)
        if generation.text.stopped:
            reason = FinishReason.STOP_STRING
        elif reason is None and count >= stopping.max_new_tokens:
            reason = FinishReason.LENGTH
        event = self._event(row, sequence, token, text, lm, mixed)
        outputs = [Output(request.request_id, event)]
        if reason is not None:
            self.cancel(request.request_id)
            finish = FinishEvent(reason, generation.text.finish(), len(request.prompt), count)
            outputs.append(Output(request.request_id, finish))
        return iter(outputs)

    def _choose(self, row: int, generation: _Generation, greedy: int, lm: Tensor, mixed: Mixed) -> int:
        sequence, request = generation.sequence, generation.sequence.request
        params = request.sampling
        uniform = generation.random.random()
        ends = self._ends(request) if sequence.generated < request.stopping.min_new_tokens else frozenset()
        if params.temperature == 0.0 and params.repetition_penalty == 1.0 and not ends:
            return greedy
        log_probs = mixed.log_probs[row]
        if ends:
            forbidden = torch.tensor(sorted(ends))
            log_probs = log_probs.index_fill(0, forbidden, -torch.inf)
            if not bool(log_probs.isfinite().any()):  # at weight 1, all neighbours may say that the text ends here
                log_probs = lm[row].index_fill(0, forbidden, -torch.inf)
        return sample(log_probs, params, sequence.tokens, uniform)

    def _ends(self, request: GenerationRequest) -> frozenset[int]:
        stops = frozenset(request.stopping.stop_token_ids)
        return stops if request.stopping.ignore_eos else stops | self._model.eos_ids

    def _stop_reason(self, token: int, request: GenerationRequest) -> FinishReason | None:
        if token in request.stopping.stop_token_ids:
            return FinishReason.STOP_TOKEN
        return FinishReason.EOS if token in self._model.eos_ids and not request.stopping.ignore_eos else None

    def _event(self, row: int, sequence: Sequence, token: int, text: str, lm: Tensor, mixed: Mixed) -> TokenEvent:
        request = sequence.request
        details = self._reporter.details(row, token, request.detail, request.retrieval, lm, mixed)
        return TokenEvent(index=sequence.generated - 1, text=text, **details)
