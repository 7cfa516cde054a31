"""``knnlm serve`` in a process of its own, and what can be seen of it from outside: memory, processor time, open files."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.processes import command, environment

STOPPING_SECONDS = 60.0
PORTS = ("--admin-port", "--metrics-port")


@dataclass(frozen=True)
class Holdings:
    """What a process holds at a moment: ``resident`` and ``anonymous`` bytes, open ``files``, ``threads``."""

    resident: int
    anonymous: int
    files: int
    threads: int


class ServerProcess:
    """A server that takes requests at ``address``, those of operators at ``admin_address``."""

    def __init__(self, process: subprocess.Popen[str], address: str, admin_address: str, metrics_address: str) -> None:
        self.process, self.address, self.admin_address, self._metrics_address = process, address, admin_address, metrics_address

    @property
    def cpu_seconds(self) -> float:
        """Processor time of all its threads so far, to 10 ms."""
        return self._cpu_seconds("stat")

    @property
    def event_loop_cpu_seconds(self) -> float:
        """Processor time of its main thread so far, in which asyncio and gRPC's Python part run."""
        return self._cpu_seconds(f"task/{self.process.pid}/stat")

    @property
    def holdings(self) -> Holdings:
        """What it holds now."""
        numbers = dict(re.findall(r"^(VmRSS|RssAnon|Threads):\s+(\d+)", self._proc("status"), re.MULTILINE))
        files = len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))
        return Holdings(1024 * int(numbers["VmRSS"]), 1024 * int(numbers["RssAnon"]), files, int(numbers["Threads"]))

    def metrics(self) -> dict[str, float]:
        """Its metrics that have no labels, by name."""
        with urllib.request.urlopen(f"http://{self._metrics_address}/metrics", timeout=10) as response:
            text = response.read().decode()
        families = text_string_to_metric_families(text)
        return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}

    def stop(self) -> int:
        """Ask it to end (SIGTERM) and wait; its exit status."""
        self.process.terminate()
        return self.process.wait(STOPPING_SECONDS)

    def _cpu_seconds(self, name: str) -> float:
        fields = self._proc(name).rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _proc(self, name: str) -> str:
        return Path(f"/proc/{self.process.pid}/{name}").read_text()


@contextmanager
def serving(store: Path, *options: str, log: Path | None = None) -> Iterator[ServerProcess]:
    """A server of a store on free ports, until the end of the block. What it logs goes to ``log`` (None: nowhere)."""
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    line = command("serve", store, "--port", "0", *(str(word) for item in ports.items() for word in item), *options)
    with (log or Path(os.devnull)).open("w") as errors, subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment()
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            if not said.startswith("listening on "):
                raise RuntimeError(f"{' '.join(line)} ended with {process.wait()} before it took requests.")
            admin, metrics = (f"127.0.0.1:{port}" for port in ports.values())
            yield ServerProcess(process, said.removeprefix("listening on ").split()[0], admin, metrics)
        finally:
            process.terminate()


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
