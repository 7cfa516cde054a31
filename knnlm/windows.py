"""Windows over documents: which tokens a forward pass reads, and which of them it predicts.

Building and evaluation use this one definition, so a key in the datastore and a query at evaluation mean the same.
Knows no model: it works on lengths alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from knnlm.errors import InvalidInput


@dataclass(frozen=True)
class Windowing:
    """``max_length``: tokens a window may hold; ``stride``: tokens that a window predicts at most."""

    max_length: int
    stride: int

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise InvalidInput("max_length", f"is {self.max_length}, but a window needs at least 2 tokens.")
        if not 1 <= self.stride <= self.max_length:
            raise InvalidInput("stride", f"is {self.stride}, but must be from 1 to the max length of {self.max_length}.")

    @classmethod
    def for_context(cls, context: int, max_length: int | None = None, stride: int | None = None) -> Windowing:
        """Defaults: the model's context up to 1024 tokens, and a stride of half of that.

        Raises :class:`InvalidInput` if ``max_length`` is more than the model's ``context``.
        """
        if max_length is not None and max_length > context:
            raise InvalidInput("max_length", f"is {max_length}, but the model's context is {context} tokens.")
        length = min(context, 1024) if max_length is None else max_length
        return cls(length, max(1, length // 2) if stride is None else stride)


@dataclass(frozen=True)
class Window:
    """Positions within one document.

    The model reads tokens ``[start, end - 1)`` and predicts tokens ``[first_target, end)``, each from the position
    before it. Token ``first_target`` is predicted at column ``first_target - 1 - start`` of the window.
    """

    start: int
    first_target: int
    end: int

    @property
    def input_length(self) -> int:
        """Tokens that the model reads."""
        return self.end - 1 - self.start

    @property
    def target_count(self) -> int:
        """Tokens that the window predicts; their columns are the last ones of the window."""
        return self.end - self.first_target


def windows(length: int, windowing: Windowing) -> Iterator[Window]:
    """The windows of a document of ``length`` tokens, in order; every token but the first is a target exactly once.

    With stride s and maximum length m, tokens fall into blocks [j·s, (j+1)·s). Block j is read from position
    max(0, min((j+1)·s - m, j·s - 1)), so a target has at least m - s tokens of context where the document has them.

    >>> list(windows(5, Windowing(max_length=4, stride=2)))
    [Window(start=0, first_target=1, end=2), Window(start=0, first_target=2, end=4), Window(start=2, first_target=4, end=5)]
    """
    for block in range(-(-length // windowing.stride)):
        if (window := block_window(length, block, windowing)) is not None:
            yield window


def block_window(length: int, block: int, windowing: Windowing) -> Window | None:
    """The window that predicts one block of a document of ``length`` tokens; None where it is the first token alone."""
    step, most = windowing.stride, windowing.max_length
    start = block * step
    first_target, end = max(start, 1), min(start + step, length)
    return Window(max(0, min(start + step - most, start - 1)), first_target, end) if first_target < end else None


@dataclass(frozen=True)
class PlacedWindow:
    """A window and where it belongs: ``origin`` is position 0 of its document in a token stream, ``row`` the place of
    its first target among the results."""

    window: Window
    origin: int
    row: int


WINDOWS_AT_ONCE = 4096


def length_batches(placed: Iterable[PlacedWindow], batch_tokens: int) -> Iterator[list[PlacedWindow]]:
    """Batches of windows that read the same number of tokens, at most ``batch_tokens`` (but at least one window) each.

    Equal lengths mean no padding; bitwise equal keys for any batch size rest on it. Windows are taken 4,096 at a time,
    so memory is bounded, and batches of one length come after each other.
    """
    source = iter(placed)
    while group := list(islice(source, WINDOWS_AT_ONCE)):
        by_length: dict[int, list[PlacedWindow]] = {}
        for item in group:
            by_length.setdefault(item.window.input_length, []).append(item)
        for length, items in sorted(by_length.items()):
            size = max(1, batch_tokens // length)
            for start in range(0, len(items), size):
                yield items[start : start + size]
