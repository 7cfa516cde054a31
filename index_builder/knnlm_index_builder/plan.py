"""What an operation was begun with, flat, so that a difference can be named."""

from __future__ import annotations

from typing import Any

from knnlm.errors import StoreMismatch

PLAN_NAMES = {"corpus": "the text (xxh3 of its content)", "operation": "what is done"}


def require_same(found: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    """Raise :class:`StoreMismatch` naming each setting of ``wanted`` that is another in ``found``."""
    differences = [
        f"{PLAN_NAMES.get(name, name)} is {found.get(name)!r} there and {value!r} now"
        for name, value in wanted.items()
        if found.get(name) != value
    ]
    if differences:
        raise StoreMismatch(f"{what}: {'; '.join(differences)}. Choose another --store, or the same input and settings.")
