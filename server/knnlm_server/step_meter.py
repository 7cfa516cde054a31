"""What a step of the engine did and where its time went. Knows no engine: rows and tokens are counts, parts are names."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from knnlm_server.telemetry import StepReport


class StepMeter:
    """Adds up seconds by the name of a part, and counts of rows and tokens. Parts may be measured on several threads."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = defaultdict(float)
        self._counts: Counter[str] = Counter()

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Count the time that the block takes for ``part``: step, forward, retrieval, mix, sample or score."""
        start = self._clock()
        try:
            yield
        finally:
            self._seconds[part] += self._clock() - start

    def count(self, name: str, number: int) -> None:
        """Add to prompt_tokens, decoded_rows or searched_rows."""
        self._counts[name] += number

    def report(
        self, *, running: int, waiting: int, waiting_tokens: int, cache_tokens: int, scoring: int, scoring_tokens: int
    ) -> StepReport:
        """All of one step, which is forgotten with it."""
        seconds, counts = self._seconds, self._counts
        self._seconds, self._counts = defaultdict(float), Counter()
        return StepReport(
            seconds=seconds["step"],
            forward_seconds=seconds["forward"],
            retrieval_seconds=seconds["retrieval"],
            mix_seconds=seconds["mix"],
            sample_seconds=seconds["sample"],
            score_seconds=seconds["score"],
            prompt_tokens=counts["prompt_tokens"],
            decoded_rows=counts["decoded_rows"],
            searched_rows=counts["searched_rows"],
            skipped_rows=counts["decoded_rows"] - counts["searched_rows"],
            running=running,
            waiting=waiting,
            waiting_tokens=waiting_tokens,
            cache_tokens=cache_tokens,
            scoring=scoring,
            scoring_tokens=scoring_tokens,
        )
