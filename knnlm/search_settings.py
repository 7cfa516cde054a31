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
class SearchPoint:
    """What a setting (``k``, ``probes``, ``overfetch``) gave at the sampled positions, against the reference.

    ``total_variation`` of the kNN next-token distributions, 0 to 1: the mean over positions, its ``standard_error``, the
    95th percentile and the largest. ``recall``: mean share of the reference's neighbours that were found.
    ``cross_entropy_change``: by how many nats a value costs more, in a mixture with uniform tokens for base LM.
    ``bytes_read``: for one query, the cost by which settings are compared.
    """

    k: int
    probes: int
    overfetch: float
    total_variation: float
    standard_error: float
    total_variation_p95: float
    total_variation_max: float
    recall: float
    cross_entropy_change: float
    bytes_read: int


@dataclass(frozen=True)
class SearchTuning:
    """Settings that were chosen by measurement, and what was measured.

    ``settings``: the cheapest that meet ``target`` (mean total variation), in ascending k; ``met`` False if some k has
    none, and its best one stands there. ``curve``: every point measured, by k, probes and over-fetch. ``source``: at which
    positions, against what reference; ``queries``: how many. ``distance``: ``exact`` or ``index``, as a profile says it.
    ``temperature`` T of the distributions. ``entries`` could be found when this was measured, in ``nlist`` cells.
    """

    distance: str
    source: str
    queries: int
    target: float
    temperature: float
    entries: int
    nlist: int
    met: bool
    settings: list[SearchSetting]
    curve: list[SearchPoint]

    def point(self, setting: SearchSetting) -> SearchPoint:
        """The point of the curve where ``setting`` was measured. Raises :class:`InvalidInput` if it is none."""
        for point in self.curve:
            if (point.k, point.probes, point.overfetch) == (setting.k, setting.probes, setting.overfetch):
                return point
        raise InvalidInput("settings", f"hold k {setting.k}, probes {setting.probes}, over-fetch {setting.overfetch}, not on the curve.")


@dataclass(frozen=True)
class SearchSettings:
    """The setting for any k. ``nlist``: cells of the index, 0 without an inverted file; ``entries`` that could be found in
    it when it was measured (all, by rule); ``measured``: what was found to be enough, in ascending k."""

    nlist: int
    entries: int
    measured: tuple[SearchSetting, ...] = ()

    @classmethod
    def fixed(cls, nlist: int, entries: int, probes: int, overfetch: float) -> SearchSettings:
        """The same probes and over-fetch for every k, to measure them."""
        return cls(nlist, entries, tuple(SearchSetting(k, probes, overfetch) for k in (1, entries)))

    @classmethod
    def tuned(cls, tuning: SearchTuning) -> SearchSettings:
        """As measured."""
        return cls(tuning.nlist, tuning.entries, tuple(tuning.settings))

    def for_k(self, k: int, allowed: int | None = None) -> SearchSetting:
        """The setting for ``k`` neighbours out of ``allowed`` entries (None: all of them).

        Where entries are left out, as many more cells are probed, so that as many candidates are seen. Depends on
        nothing but the store and k: no other row changes it.
        """
        found = self._measured_for(k) or self._beyond(k)
        scarce = 1.0 if allowed is None else max(1.0, self.entries / max(allowed, 1))
        return SearchSetting(k, min(self.nlist, math.ceil(found.probes * scarce)), found.overfetch)

    def _measured_for(self, k: int) -> SearchSetting | None:
        """The setting of the next larger k that was measured, None if there is none.

        Fewer neighbours are a finer choice, so probes and over-fetch are no less than those of the next smaller k; below
        the smallest, as many candidates are measured as for that one.
        """
        at = next((number for number, setting in enumerate(self.measured) if k <= setting.k), None)
        if at is None:
            return None
        found = self.measured[at]
        if found.k == k:
            return found
        if at == 0:
            return SearchSetting(k, found.probes, found.overfetch * found.k / k)
        smaller = self.measured[at - 1]
        return SearchSetting(k, max(found.probes, smaller.probes), max(found.overfetch, smaller.overfetch))

    def _beyond(self, k: int) -> SearchSetting:
        """For more neighbours than were measured: about 10·k candidates, from 16 to 256 cells; never less than for fewer."""
        wanted = math.ceil(CANDIDATES_PER_NEIGHBOR * k * self.nlist / max(self.entries, 1))
        probes = min(max(wanted, LEAST_PROBES), MOST_PROBES)
        if not self.measured:
            return SearchSetting(k, probes, OVERFETCH)
        last = self.measured[-1]
        return SearchSetting(k, max(probes, math.ceil(last.probes * k / last.k)), last.overfetch)
