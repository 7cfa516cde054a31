"""Text of documents as it can be shown without harm: nothing in it is unseen, or turns what stands beside it around."""

from __future__ import annotations

import unicodedata

KEPT = frozenset("\n\t\u200c\u200d")
"""Lines, tabs, and the joiners that some scripts and emoji are written with."""


def visible(text: str) -> str:
    """``text`` with every control character as its picture, and whatever else has no shape as its number."""
    return "".join(character if character in KEPT or character.isprintable() else _picture(character) for character in text)


def _picture(character: str) -> str:
    code = ord(character)
    if code < 0x20 or code == 0x7F:
        return chr(0x2400 + code) if code < 0x20 else "\u2421"
    return character if unicodedata.category(character) == "Zs" else f"\\u{{{code:x}}}"
