"""One sample of a request as it grows: its text, its draws, and when it ends. Knows no model and no batch."""

from __future__ import annotations

import math
import random
from collections.abc import Set

from knnlm.tokenization import TextTokenizer
from knnlm_server.completion_evidence import EvidenceCollector
from knnlm_server.row_sampling import RowDraw
from knnlm_server.scheduler import Sequence
from knnlm_server.sequence import FinishEvent, FinishReason, GenerationRequest, Limits
from knnlm_server.served_stores import ChosenStores
from knnlm_server.text_stream import TextStream


def sample_seed(seed: int | None, sample: int) -> int | str | None:
    """What the random numbers of one sample begin with: the request's own seed for sample 0, for others one made of both."""
    return seed if seed is None or sample == 0 else f"{seed}/{sample}"


class Completion(Sequence):
    """One of a request's samples, from its prompt to its end.

    ``stores``: its datastores, held until then. ``evidence`` is gathered where it was asked for, and names at most
    ``most_documents``.
    """

    def __init__(
        self,
        request: GenerationRequest,
        sample: int,
        tokenizer: TextTokenizer,
        stores: ChosenStores | None = None,
        most_documents: int = Limits.max_evidence_documents,
    ) -> None:
        seconds = request.stopping.max_seconds
        deadline = math.inf if seconds is None else request.arrived + seconds
        super().__init__(request.request_id, request.prompt, request.tenant, deadline, sample)
        self.request, self.stores = request, stores or ChosenStores()
        self.text = TextStream(tokenizer, request.prompt, request.stopping.stop_strings)
        self.random = random.Random(sample_seed(request.sampling.seed, sample))
        self.log_prob_sum = 0.0
        by_number = {served.number: served for served, _ in self.stores.weights}
        self.evidence = EvidenceCollector(by_number, tokenizer.decode, most_documents) if request.detail.evidence else None

    @property
    def may_end(self) -> bool:
        """Whether the next token may be one that ends the completion."""
        return self.generated >= self.request.stopping.min_new_tokens

    def ends(self, eos_ids: Set[int]) -> Set[int]:
        """Tokens that end the completion."""
        stopping = self.request.stopping
        return {*stopping.stop_token_ids} if stopping.ignore_eos else {*stopping.stop_token_ids, *eos_ids}

    def next_draw(self, eos_ids: Set[int]) -> RowDraw:
        """How the next token is drawn; each call takes a new random number."""
        ends = () if self.may_end else self.ends(eos_ids)
        return RowDraw(self.request.sampling, self.tokens, self.generated, self.random.random(), ends)

    def take(self, token: int, eos_ids: Set[int]) -> tuple[str, FinishReason | None]:
        """Add the next token; return the text that is certain now, and why the completion ends with it (None: it goes on)."""
        self.tokens.append(token)
        stopping = self.request.stopping
        may_stop = self.generated >= stopping.min_new_tokens
        if may_stop and (reason := self._ended_by(token, eos_ids)) is not None:
            # A token that ends the completion is no part of its text.
            return "", reason
        text = self.text.push(token, may_stop=may_stop)
        if self.text.stopped:
            return text, FinishReason.STOP_STRING
        return text, FinishReason.LENGTH if self.generated >= stopping.max_new_tokens else None

    def finish(self, reason: FinishReason) -> FinishEvent:
        """What is said of the completion when it has ended."""
        mean = None
        if self.request.mean_log_prob:
            mean = self.log_prob_sum / self.generated if self.generated else 0.0
        evidence = None if self.evidence is None else self.evidence.result()
        return FinishEvent(reason, self.text.finish(), len(self.prompt), self.generated, self.sample, evidence, mean)

    def _ended_by(self, token: int, eos_ids: Set[int]) -> FinishReason | None:
        if token in self.request.stopping.stop_token_ids:
            return FinishReason.STOP_TOKEN
        return FinishReason.EOS if token in eos_ids and not self.request.stopping.ignore_eos else None
