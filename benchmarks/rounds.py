"""Interleaved rounds: whatever else the machine does hits all contestants alike, and medians forget the worst of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

CpuClock = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant, by the clock and of CPU (all threads of this process, unless another clock was given)."""

    wall: float
    cpu: float


def timed(run: Callable[[], object], cpu_seconds: CpuClock = time.process_time) -> Timing:
    """Run once."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    run()
    return Timing(time.perf_counter() - wall, cpu_seconds() - cpu)


def interleave(
    contestants: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: bool = True, cpu_seconds: CpuClock = time.process_time
) -> dict[str, Timing]:
    """Run all contestants in turn, ``rounds`` times, after one turn that does not count (``warm_up``); medians of each."""
    measured: dict[str, list[Timing]] = {name: [] for name in contestants}
    for turn in range(rounds + warm_up):
        for name, run in contestants.items():
            timing = timed(run, cpu_seconds)
            if turn >= warm_up:
                measured[name].append(timing)
    return {name: _median(timings) for name, timings in measured.items()}


def _median(timings: list[Timing]) -> Timing:
    return Timing(statistics.median(timing.wall for timing in timings), statistics.median(timing.cpu for timing in timings))
