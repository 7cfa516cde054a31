"""Commands in processes of their own: how much memory each stage takes, and how far a build has come on the disk."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SECONDS_BETWEEN_SAMPLES = 0.01
STAGE = re.compile(r"(\w[\w ]*): [\d,]+")
ENDING = "ending"


@dataclass(frozen=True)
class Sample:
    """Bytes that a process holds at a moment: ``anonymous`` ones are its own, ``resident`` ones count mapped files, too."""

    at: float
    anonymous: int
    resident: int


@dataclass(frozen=True)
class Watched:
    """A command that has ended: ``seconds`` by the clock, samples of its memory, in order, by the stage it was in, and the
    most that the kernel ever saw resident."""

    seconds: float
    samples: dict[str, list[Sample]]
    peak_resident: int

    def peak(self, *stages: str) -> int:
        """The most anonymous bytes in any of ``stages`` (none named: in all)."""
        return max(sample.anonymous for name, samples in self.samples.items() if not stages or name in stages for sample in samples)

    def last(self, stage: str) -> int:
        """Anonymous bytes at the end of a stage."""
        return self.samples[stage][-1].anonymous


def command(*arguments: str | Path) -> list[str]:
    """The command ``knnlm`` with these arguments, for a process of its own."""
    return [sys.executable, "-m", "knnlm", *map(str, arguments)]


def environment() -> dict[str, str]:
    """Of a process that says at once what it says, nothing of its tokenizers, and whose idle threads leave the cores to others."""
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}


def watch(line: Sequence[str]) -> Watched:
    """Run a command to its end, looking at its memory a hundred times a second. Raises if it fails.

    What it says of its progress comes during a stage and at its end, so a moment belongs to the stage that is named next.
    """
    started = time.monotonic()
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        said: list[tuple[float, str]] = []
        listener = threading.Thread(target=_listen, args=(process, said))
        listener.start()
        samples, peak = _samples(process)
        listener.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(line)} ended with {process.returncode}: {said[-1][1] if said else ''}")
    stages = [(at, found[1]) for at, text in said if (found := STAGE.match(text))]
    by_stage: dict[str, list[Sample]] = {}
    for sample in samples:
        stage = next((name for at, name in stages if at >= sample.at), ENDING)
        by_stage.setdefault(stage, []).append(sample)
    return Watched(time.monotonic() - started, by_stage, peak)


def _listen(process: subprocess.Popen[str], said: list[tuple[float, str]]) -> None:
    assert process.stderr is not None
    for text in process.stderr:
        said.append((time.monotonic(), text))


def _samples(process: subprocess.Popen[str]) -> tuple[list[Sample], int]:
    samples, peak = list[Sample](), 0
    while process.poll() is None:
        found = _memory(process.pid)
        if found:
            samples.append(Sample(time.monotonic(), found["RssAnon"], found["VmRSS"]))
            peak = found["VmHWM"]
        time.sleep(SECONDS_BETWEEN_SAMPLES)
    return samples, peak


def _memory(process: int) -> dict[str, int]:
    """What the kernel says of a process's memory, in bytes; nothing for one that has ended."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {name: 1024 * int(number) for name, number in re.findall(r"^(RssAnon|VmRSS|VmHWM):\s+(\d+) kB$", text, re.MULTILINE)}
