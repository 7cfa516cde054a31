"""How far a build is: who is told, and adding up. Knows no stage."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told how far a stage is; ``total`` is None while it is not known."""

    def update(self, stage: str, done: int, total: int | None) -> None:
        """``done`` of ``total`` bytes, tokens or entries of ``stage`` are finished."""


class Meter:
    """Adds up what a stage has done."""

    def __init__(self, progress: Progress, stage: str, total: int) -> None:
        self._progress, self._stage, self._total, self._done = progress, stage, total, 0

    def advance(self, count: int) -> None:
        """``count`` more are finished."""
        self._done += count
        self._progress.update(self._stage, self._done, self._total)
