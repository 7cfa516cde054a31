"""What commands print: tables and progress on a terminal, plain lines elsewhere, JSON when asked. Knows no command."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

SECONDS_BETWEEN_LINES = 5.0

WIDTH_OF_NO_TERMINAL = 130


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=WIDTH_OF_NO_TERMINAL)


out = _console(stderr=False)
messages = _console(stderr=True)


def quiet_transformers() -> None:
    """Keep the progress bars and warnings of transformers out of a command's output."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def print_json(content: Mapping[str, Any]) -> None:
    """One JSON object on standard output; not-a-number and infinite values become null."""
    sys.stdout.write(json.dumps(finite(content), ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """For JSON: not-a-number and infinite values become None."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))) else value


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: bool = True) -> Table:
    """A table to be printed; all columns but the first are set right unless ``right`` is False."""
    grid = Table(title=title or None, title_justify="left")
    for number, column in enumerate(columns):
        grid.add_column(column, justify="right" if number and right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    return grid


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")


class ProgressReporter:
    """Shows stages: bars with rate and remaining time on a terminal, else a line every few seconds and at each end."""

    def __init__(self, bars: Progress | None) -> None:
        self._bars = bars
        self._stage: str | None = None
        self._task: Any = None
        self._started = self._said = 0.0
        self._first = self._last = 0
        self._total: int | None = None

    def update(self, stage: str, done: int, total: int | None) -> None:
        """``done`` of ``total`` tokens or entries of ``stage`` are finished (``total`` None: not known yet)."""
        if stage != self._stage:
            self.finish()
            self._stage, self._started, self._said, self._first = stage, time.monotonic(), time.monotonic(), done
            if self._bars:
                self._task = self._bars.add_task(stage, total=total)
        self._last, self._total = done, total
        if self._bars:
            self._bars.update(self._task, completed=done, total=total)
        elif time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            self._say()

    def finish(self) -> None:
        """End the stage that is running."""
        if self._stage is None:
            return
        if self._bars:
            self._bars.update(self._task, total=self._last, completed=self._last)
        else:
            self._say()
        self._stage = None

    def _say(self) -> None:
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = (self._last - self._first) / seconds
        whole = "" if self._total is None else f" of {self._total:,}"
        missing = (self._total or 0) - self._last
        left = f", about {missing / rate:.0f} s left" if missing > 0 and rate else ""
        speed = f", {rate:,.0f}/s" if rate else ""
        messages.print(f"{self._stage}: {self._last:,}{whole}{speed}{left}")


@contextmanager
def progress() -> Iterator[ProgressReporter]:
    """A reporter on standard error, so that standard output holds results only."""
    if not messages.is_terminal:
        reporter = ProgressReporter(None)
        yield reporter
        reporter.finish()
        return
    bars = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(),
        TimeElapsedColumn(), TimeRemainingColumn(), console=messages,
    )  # fmt: skip
    with bars:
        reporter = ProgressReporter(bars)
        yield reporter
        reporter.finish()


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number with what it counts: ``1 shard``, ``1,200 entries`` (``plural`` where it is not the noun with an s)."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def size(count: float) -> str:
    """Bytes for people: ``12.3 MB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
