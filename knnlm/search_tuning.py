"""Search settings chosen by measurement: for each k, the cheapest that stays within a total variation of exact search.

Cost is what a query reads, never a time, so that the same store gives the same settings on any machine and any day.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from knnlm.index import ExactIndex, FaissIndex, NeighborIndex
from knnlm.mixture import Mixture
from knnlm.search_measurement import Searched, SearchMeasurement
from knnlm.search_positions import Positions
from knnlm.search_settings import SearchPoint, SearchSetting, SearchTuning

KS = (16, 64, 256, 1024)
OVERFETCHES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0)
MOST_CANDIDATES = 4096
"""To which over-fetch may go beyond 4: few neighbours need more of it, and codes are chosen coarse for many."""
TARGET = 0.005
UNCHANGED_LEVELS = 3
MANY_CELLS = 64


def tune(
    searched: Searched, positions: Positions, ks: Sequence[int] = KS, *,
    temperature: float = Mixture().temperature, target: float = TARGET,
) -> SearchTuning:  # fmt: skip
    """Measure settings for each of ``ks`` at ``positions`` and choose; see :func:`tuned`."""
    if compares_every_key(searched.index):
        return _without_choice(searched, temperature, target, "nothing to choose: the index compares every key")
    return tuned(SearchMeasurement(searched, positions, ks, temperature), target)


def tuned(measurement: SearchMeasurement, target: float = TARGET) -> SearchTuning:
    """The settings that ``measurement`` gives, with the curve.

    Chosen is the cheapest whose mean total variation is within ``target`` by a standard error, so that other positions
    find it within the target as well; if there is none, the one of the least total variation.
    """
    searched = measurement.searched
    if not measurement.ks:
        return _without_choice(searched, measurement.temperature, target, "not measured: there are too few entries")
    curve = _curve(measurement, target)
    chosen = [_choose(list(points), target) for _, points in groupby(curve, key=lambda point: point.k)]
    return SearchTuning(
        distance=searched.distance,
        source=f"{measurement.positions.source}; against {measurement.reference}",
        queries=len(measurement.positions),
        target=target,
        temperature=measurement.temperature,
        entries=searched.live_entries,
        nlist=searched.index.nlist,
        met=all(point.total_variation <= target for point in chosen),
        settings=[SearchSetting(point.k, point.probes, point.overfetch) for point in chosen],
        curve=curve,
    )


def compares_every_key(index: NeighborIndex) -> bool:
    """Whether the index has no codes and no cells, so that every setting finds the same."""
    return isinstance(index, ExactIndex) or (isinstance(index, FaissIndex) and index.facts.factory == "Flat")


def _without_choice(searched: Searched, temperature: float, target: float, source: str) -> SearchTuning:
    return SearchTuning(
        searched.distance, source, 0, target, temperature, searched.live_entries, searched.index.nlist, met=True, settings=[], curve=[]
    )


def _curve(measurement: SearchMeasurement, target: float) -> list[SearchPoint]:
    """Points with more and more probes, for each k until more can't be cheaper than what meets the target, or change
    nothing any more; then with three quarters of the probes that would be chosen."""
    searched = measurement.searched
    levels: dict[int, list[list[SearchPoint]]] = {k: [] for k in measurement.ks}
    for probes in _probes(searched.index.nlist):
        wanted = [k for k in measurement.ks if not _finished(levels[k], searched, SearchSetting(k, probes, 1.0), target)]
        for k, points in _level(measurement, probes, wanted, target).items():
            levels[k].append(points)
    doubled = {k: [point for points in levels[k] for point in points] for k in measurement.ks}
    between = {k: math.ceil(0.75 * _choose(points, target).probes) for k, points in doubled.items()}
    curve = [point for points in doubled.values() for point in points]
    for probes in sorted({*between.values()} - {point.probes for point in curve}):
        wanted = [k for k in measurement.ks if between[k] == probes]
        curve += [point for points in _level(measurement, probes, wanted, target).values() for point in points]
    return sorted(curve, key=lambda point: (point.k, point.probes, point.overfetch))


def _level(measurement: SearchMeasurement, probes: int, ks: list[int], target: float) -> dict[int, list[SearchPoint]]:
    """For each of ``ks``, points of more and more over-fetch, until the target is met or more changes nothing."""
    if not ks:
        return {}
    choices = {k: _overfetches(k, measurement.searched) for k in ks}
    point_at = measurement.at(probes, math.ceil(max(k * choices[k][-1] for k in ks)))
    levels: dict[int, list[SearchPoint]] = {k: [] for k in ks}
    for k, points in levels.items():
        for overfetch in choices[k]:
            points.append(point_at(k, overfetch))
            if _is_within(points[-1], target) or _unchanged(points, 2):
                break
    return levels


def _overfetches(k: int, searched: Searched) -> list[float]:
    """What may be chosen for ``k``: without stored keys nothing is measured again, so there is nothing to over-fetch for."""
    if searched.keys is None:
        return [1.0]
    return [overfetch for overfetch in OVERFETCHES if overfetch <= 4 or overfetch * k <= MOST_CANDIDATES]


def _probes(nlist: int) -> list[int]:
    """1 (4 where there are many cells), doubled and doubled, and all cells; 0 alone for an index without cells."""
    first = 2 if nlist >= MANY_CELLS else 0
    return [0] if not nlist else [*(1 << power for power in range(first, (nlist - 1).bit_length())), nlist]


def _finished(levels: list[list[SearchPoint]], searched: Searched, cheapest_next: SearchSetting, target: float) -> bool:
    within = [point.bytes_read for points in levels for point in points if _is_within(point, target)]
    if within:
        return searched.bytes_read(cheapest_next) >= min(within)
    # Cells that hold none of the neighbours change nothing; several doublings in a row, and no others will.
    return _unchanged([points[-1] for points in levels], UNCHANGED_LEVELS)


def _unchanged(points: list[SearchPoint], count: int) -> bool:
    """Whether the last ``count`` points say the same."""
    last = [(point.total_variation, point.recall) for point in points[-count:]]
    return len(last) == count and len(set(last)) == 1


def _is_within(point: SearchPoint, target: float) -> bool:
    return point.total_variation + point.standard_error <= target


def _choose(points: list[SearchPoint], target: float) -> SearchPoint:
    within = [point for point in points if _is_within(point, target)]
    if within:
        return min(within, key=lambda point: (point.bytes_read, point.total_variation, point.probes))
    return min(points, key=lambda point: (point.total_variation, point.bytes_read))
