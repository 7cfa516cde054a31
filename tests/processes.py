"""Processes of tests: their children, and waiting for what they do."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def children(pid: int) -> list[int]:
    """Processes that ``pid`` started, and that run."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def runs(pid: int) -> bool:
    """Whether a process runs; one that ended and that nobody asked after does not."""
    return Path(f"/proc/{pid}/exe").exists()


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Look until ``condition`` holds; fail when it takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.003)
