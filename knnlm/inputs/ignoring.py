"""The rules of ``.gitignore`` files, as git applies them to files that it does not track."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

from knnlm.errors import CorpusError

GITIGNORE = ".gitignore"
BELOW = "ps_d"
"""pathspec's name for the slash after a folder that a pattern names."""


class IgnoreRules:
    """What the ``.gitignore`` files of a folder and of those above it leave out."""

    def __init__(self, levels: tuple[tuple[int, Sequence[GitIgnoreSpecPattern]], ...] = ()) -> None:
        self._levels = levels

    def with_file(self, depth: int, content: bytes, place: str) -> IgnoreRules:
        """These rules and those of a file found ``depth`` folders below the first. Raises :class:`CorpusError`."""
        text = os.fsdecode(content.removeprefix(b"\xef\xbb\xbf"))
        lines = [line.removesuffix("\r") for line in text.split("\n")]
        try:
            patterns = [GitIgnoreSpecPattern(line) for line in reversed(lines)]
        except ValueError as error:
            raise CorpusError(f"{place}: {error}; correct it, or read all files with --no-gitignore.") from None
        return IgnoreRules((*self._levels, (depth, patterns)))

    def ignores(self, parts: tuple[str, ...], *, folder: bool) -> bool:
        """Whether a file or folder at this path below the first folder is left out, where the folder that it is in is not."""
        for depth, patterns in reversed(self._levels):
            path = "/".join(parts[depth:]) + "/" * folder
            for pattern in patterns:
                if pattern.include is not None and _names(pattern, path):
                    return pattern.include
        return False


def _names(pattern: GitIgnoreSpecPattern, path: str) -> bool:
    """Whether a pattern names this very path: those of pathspec take all that is below a folder, too.

    To git that makes a difference: with ``d`` and then ``!/e/``, the folder ``e/d`` is left out.
    """
    for match in pattern.regex.finditer(path) if pattern.regex is not None else ():
        at_end = match.end() == len(path)
        if at_end if match.groupdict().get(BELOW) else not (at_end and path.endswith("/")):
            return True
    return False
