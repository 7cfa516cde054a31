"""Cutting text at a regular expression while it is read, as if all of it lay in memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from knnlm.errors import InvalidInput

MARGIN = 1 << 16
"""Characters that a match may span, with all that it looks at."""


def compile_cut(pattern: str) -> re.Pattern[str]:
    """The multi-line regular expression of ``split_documents``. Raises :class:`InvalidInput`."""
    try:
        return re.compile(pattern, re.MULTILINE)
    except re.error as error:
        raise InvalidInput("split_documents", f"{pattern!r} is no regular expression: {error}.") from None


def split(chunks: Iterable[str], cut: re.Pattern[str], margin: int = MARGIN) -> Iterator[str]:
    """Pieces of a text that comes in chunks; a piece begins at each match, and together they are the text.

    The same as :meth:`re.Pattern.finditer` over the whole text, where a match with all that it looks at spans no more
    than ``margin`` characters (at least 1) from its start in both directions. In memory: a piece, the margins, a chunk.
    """
    splitter = _Splitter(cut, margin)
    for chunk in chunks:
        splitter.text += chunk
        yield from splitter.certain(len(splitter.text) - margin)
        splitter.forget()
    yield from splitter.certain(len(splitter.text))
    yield splitter.rest()


class _Splitter:
    """The part of the text that is still needed; all positions count from its start."""

    def __init__(self, cut: re.Pattern[str], margin: int) -> None:
        self._cut, self._margin = cut, margin
        self.text = ""
        self._piece: list[str] = []  # of the piece being read, what is no longer in text
        self._from = 0  # where the rest of that piece begins
        self._search = 0  # where the next match is looked for; before it, margin characters are kept for looking behind
        self._last = 0  # where the piece begins, while that is known here; a match there is not another one

    def certain(self, limit: int) -> Iterator[str]:
        """Pieces that end at matches which end at ``limit`` or before, where more text could not change them."""
        for match in self._cut.finditer(self.text, self._search):
            if match.end() > limit:
                limit = min(limit, match.start())
                break
            # Search goes on from a match's end: an empty match is found once more there, and is the same one.
            if match.start() > self._last:
                yield self._take(match.start())
                self._last = match.start()
            self._search = match.end()
        self._search = max(self._search, limit)

    def forget(self) -> None:
        """Drop what no match needs any more."""
        done = self._search - self._margin
        if done <= 0:
            return
        if done > self._from:
            self._piece.append(self.text[self._from : done])
            self._from = done
        self.text = self.text[done:]
        self._from, self._search, self._last = self._from - done, self._search - done, max(self._last - done, -1)

    def rest(self) -> str:
        """The last piece."""
        return self._take(len(self.text))

    def _take(self, end: int) -> str:
        piece = "".join([*self._piece, self.text[self._from : end]])
        self._piece.clear()
        self._from = end
        return piece
