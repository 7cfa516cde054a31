"""Interleaved rounds: whatever else the machine does hits all contestants alike, and medians forget the worst of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Medians over the rounds of one contestant: wall and CPU seconds (all threads of this process)."""

    wall: float
    cpu: float


def interleave(contestants: dict[str, Callable[[], object]], rounds: int, warm_up: bool = True) -> dict[str, Timing]:
    """Run all contestants in turn, ``rounds`` times, after one turn that does not count."""
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for turn in range(rounds + warm_up):
        for name, run in contestants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if turn >= warm_up:
                measured[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: Timing(statistics.median(wall for wall, _ in pairs), statistics.median(cpu for _, cpu in pairs))
        for name, pairs in measured.items()
    }
