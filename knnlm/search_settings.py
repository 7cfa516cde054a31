"""How far a search looks for k neighbours: measured settings of a datastore, or a rule where it has none. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from knnlm.errors import InvalidInput

OVERFETCH = 2.0
CANDIDATES_PER_NEIGHBOR = 10
LEAST_PROBES, MOST_PROBES = 16, 256


@dataclass(frozen=True)
class SearchSetting:
    """For up to ``k`` neighbours: look into ``probes`` cells of an inverted file (0: the index has none), and measure
    the first ceil(``overfetch`` · k) candidates exactly."""

    k: int
    probes: int
    overfetch: float

    def __post_init__(self) -> None:
        if not 1 <= self.overfetch < math.inf:
            raise InvalidInput("overfetch", f"is {self.overfetch}, but must be 1 or more.")


@dataclass(frozen=True)
class SearchSettings:
    """The setting for any k. ``nlist``: cells of the index, 0 without an inverted file; ``entries`` in it;
    ``measured``: what was found to be enough, in ascending k."""

    nlist: int
    entries: int
    measured: tuple[SearchSetting, ...] = ()

    @classmethod
    def fixed(cls, nlist: int, entries: int, probes: int, overfetch: float) -> SearchSettings:
        """The same probes and over-fetch for every k, to measure them."""
        return cls(nlist, entries, (SearchSetting(entries, probes, overfetch),))

    def for_k(self, k: int, allowed: int | None = None) -> SearchSetting:
        """The setting for ``k`` neighbours out of ``allowed`` entries (None: all of them).

        Where entries are left out, as many more cells are probed, so that as many candidates are seen. Depends on
        nothing but the store and k: no other row changes it.
        """
        found = next((setting for setting in self.measured if k <= setting.k), None) or self._beyond(k)
        scarce = 1.0 if allowed is None else self.entries / max(allowed, 1)
        return SearchSetting(k, min(self.nlist, math.ceil(found.probes * scarce)), found.overfetch)

    def _beyond(self, k: int) -> SearchSetting:
        """For more neighbours than were measured: about 10·k candidates, from 16 to 256 cells; never less than for fewer."""
        wanted = math.ceil(CANDIDATES_PER_NEIGHBOR * k * self.nlist / max(self.entries, 1))
        probes = min(max(wanted, LEAST_PROBES), MOST_PROBES)
        if not self.measured:
            return SearchSetting(k, probes, OVERFETCH)
        last = self.measured[-1]
        return SearchSetting(k, max(probes, math.ceil(last.probes * k / last.k)), last.overfetch)
