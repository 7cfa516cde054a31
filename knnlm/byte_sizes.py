"""Sizes as people write them."""

from __future__ import annotations

import re

from knnlm.errors import InvalidInput

UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4, "ki": 1024, "mi": 1024**2, "gi": 1024**3, "ti": 1024**4}


def parse_bytes(field: str, text: str) -> int:
    """``8GB``, ``512MiB``, ``1000000`` as bytes; raises :class:`InvalidInput` naming ``field``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip().lower())
    size = int(float(found[1]) * UNITS[found[2] or ""]) if found else 0
    if size < 1:
        raise InvalidInput(field, f"is {text!r}, but must be a size such as 8GB, 512MiB or 1000000 (bytes).")
    return size
