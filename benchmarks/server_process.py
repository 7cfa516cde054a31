"""``knnlm serve`` in a process of its own, and what can be seen of it from outside: memory, processor time, open files."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import command, environment

STOPPING_SECONDS = 60.0


@dataclass(frozen=True)
class Holdings:
    """What a process holds at a moment: ``resident`` and ``anonymous`` bytes, open ``files``, ``threads``."""

    resident: int
    anonymous: int
    files: int
    threads: int


class ServerProcess:
    """A server that takes requests at ``address``."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self.process, self.address = process, address

    @property
    def cpu_seconds(self) -> float:
        """Processor time of all its threads so far, to 10 ms."""
        fields = self._proc("stat").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def holdings(self) -> Holdings:
        """What it holds now."""
        numbers = dict(re.findall(r"^(VmRSS|RssAnon|Threads):\s+(\d+)", self._proc("status"), re.MULTILINE))
        files = len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))
        return Holdings(1024 * int(numbers["VmRSS"]), 1024 * int(numbers["RssAnon"]), files, int(numbers["Threads"]))

    def stop(self) -> int:
        """Ask it to end (SIGTERM) and wait; its exit status."""
        self.process.terminate()
        return self.process.wait(STOPPING_SECONDS)

    def _proc(self, name: str) -> str:
        return Path(f"/proc/{self.process.pid}/{name}").read_text()


@contextmanager
def serving(store: Path, *options: str, log: Path | None = None) -> Iterator[ServerProcess]:
    """A server of a store on free ports, until the end of the block. What it logs goes to ``log`` (None: nowhere)."""
    line = command("serve", store, "--port", "0", *options)
    with (log or Path(os.devnull)).open("w") as errors, subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment()
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            if not said.startswith("listening on "):
                raise RuntimeError(f"{' '.join(line)} ended with {process.wait()} before it took requests.")
            yield ServerProcess(process, said.removeprefix("listening on ").split()[0])
        finally:
            process.terminate()
