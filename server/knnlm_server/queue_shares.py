"""How much of a queue one tenant may fill, so that there is room for the others. Knows no queue."""

from __future__ import annotations

RESERVED = 8
"""One part in so many of a bound is left to other tenants."""


def share_of(bound: int, tenant: str | None) -> int:
    """How much of ``bound`` a tenant may take; all of it where callers have no names, since then there are no others."""
    return bound - bound // RESERVED if tenant else bound
