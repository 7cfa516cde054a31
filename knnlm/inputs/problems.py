"""What of the input is not read: problems, fatal or counted and named, and what is left out on purpose."""

from __future__ import annotations

from knnlm.errors import CorpusError, InvalidInput
from knnlm.inputs.options import OnError

NAMED = 20


class LeftOut:
    """What is left out without being a problem: ``names`` of files by reason."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Note something that is not read."""
        self.names.setdefault(reason, []).append(name)

    def copy(self) -> LeftOut:
        """The same, to which more is added apart."""
        twin = LeftOut()
        twin.names = {reason: list(names) for reason, names in self.names.items()}
        return twin

    def __str__(self) -> str:
        """The counts in words: ``2 binary files``."""
        return ", ".join(f"{len(names)} {reason}" for reason, names in self.names.items())


class Problems:
    """Problems of one reading of a corpus.

    ``counts``: how many there are of each kind. ``first``: the first :data:`NAMED` as sentences with file and place.
    """

    def __init__(self, on_error: OnError) -> None:
        if on_error not in ("stop", "skip"):
            raise InvalidInput("on_error", f"is {on_error!r}, but must be stop or skip.")
        self._on_error = on_error
        self.counts: dict[str, int] = {}
        self.first: list[str] = []

    @property
    def total(self) -> int:
        """How many problems of any kind."""
        return sum(self.counts.values())

    @property
    def are_fatal(self) -> bool:
        """Whether the first problem ends the reading."""
        return self._on_error == "stop"

    def found(self, kind: str, what: str) -> None:
        """Count and name a problem; ``what`` says file, place and finding. Raises :class:`CorpusError` if it is fatal."""
        if self.are_fatal:
            raise CorpusError(f"{what}; correct it, or leave what can't be read out with --on-error skip.")
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if len(self.first) < NAMED:
            self.first.append(f"{what}.")

    def copy(self) -> Problems:
        """The same problems, to which others are added apart."""
        twin = Problems(self._on_error)
        twin.counts, twin.first = dict(self.counts), list(self.first)
        return twin

    def __str__(self) -> str:
        """The counts in words: ``2 broken JSON, 1 not UTF-8``."""
        return ", ".join(f"{count} {kind}" for kind, count in self.counts.items())
