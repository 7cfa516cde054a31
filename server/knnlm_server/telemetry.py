"""What an engine tells about its work, for whoever counts it. Knows no engine and no metrics library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class StepReport:
    """One step of an engine. Seconds by the clock; rows and tokens of this step; what runs and waits after it.

    ``retrieval_seconds``: search and re-ranking. ``prompt_tokens``: of prompts, computed in this step. ``decoded_rows``
    got a token; of these, ``searched_rows`` had their neighbours searched and ``skipped_rows`` had not (weight 0, or the
    gate of their datastore said that it is not worth it).
    ``cache_tokens``: tokens that the rows of the cache hold.
    """

    seconds: float
    forward_seconds: float
    retrieval_seconds: float
    mix_seconds: float
    sample_seconds: float
    score_seconds: float
    prompt_tokens: int
    decoded_rows: int
    searched_rows: int
    skipped_rows: int
    running: int
    waiting: int
    waiting_tokens: int
    cache_tokens: int


class EngineObserver(Protocol):
    """Is told of every step and every admission, on the engine's thread; must return at once and raise nothing."""

    def step(self, report: StepReport) -> None:
        """A step is done."""

    def admitted(self, request_id: str, waited_seconds: float, prompt_tokens: int, reused_tokens: int) -> None:
        """A request got a row after waiting so long; so many of its prompt's tokens need not be computed again."""


class Unobserved:
    """Listens to nothing."""

    def step(self, report: StepReport) -> None:
        """See :meth:`EngineObserver.step`."""

    def admitted(self, request_id: str, waited_seconds: float, prompt_tokens: int, reused_tokens: int) -> None:
        """See :meth:`EngineObserver.admitted`."""
