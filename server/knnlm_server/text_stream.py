"""A completion's text as it grows: characters are never cut, and what may yet become a stop string is held back."""

from __future__ import annotations

from collections.abc import Sequence

from knnlm.tokenization import IncrementalDetokenizer, TextTokenizer


class TextStream:
    """Turns tokens into text that is certain.

    ``prompt``: the tokens before, of which the last few decide about spaces. Stop strings themselves are never
    released, nor what follows them. The one that is complete first decides (of several that end together the
    longest), so the text is the same wherever the borders of tokens lie.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt: Sequence[int], stop_strings: Sequence[str] = ()) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer, prompt)
        self._stop_strings = tuple(stop_strings)
        self._pending = ""
        self._spared = 0  # characters of the pending text in which no stop string may end
        self.stopped = False

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Add a token; return what is certain now. :attr:`stopped` tells that a stop string was met.

        With ``may_stop`` False (fewer tokens than asked for at least) stop strings that are complete with this token are
        text like any other; one that is only begun may still stop.
        """
        return self._release(self._detokenizer.push(token_id), may_stop=may_stop, final=False)

    def finish(self) -> str:
        """The text that was held back, when no further token comes."""
        return "" if self.stopped else self._release(self._detokenizer.finish(), may_stop=True, final=True)

    def _release(self, text: str, *, may_stop: bool, final: bool) -> str:
        self._pending += text
        if not may_stop:
            self._spared = len(self._pending)
        found = [(at + len(stop), at) for stop in self._stop_strings if (at := self._find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._pending[: min(found)[1]]
        held = 0 if final else max((_overlap(self._pending, stop) for stop in self._stop_strings), default=0)
        cut = len(self._pending) - held
        released, self._pending, self._spared = self._pending[:cut], self._pending[cut:], max(0, self._spared - cut)
        return released

    def _find(self, stop: str) -> int:
        return self._pending.find(stop, max(0, self._spared + 1 - len(stop)))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
