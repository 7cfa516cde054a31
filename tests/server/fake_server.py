"""A server around the fake engine as a process of its own: ``python -m tests.server.fake_server PORT [HOLD_AFTER]``.

Prints ``listening on HOST:PORT`` when it takes requests. Completions are "ab!"; with HOLD_AFTER they stop coming after
so many tokens.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from knnlm_server import app
from tests.server.fake_engine import FakeEngine

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def process(port: int, hold_after: int | None = None) -> Iterator[subprocess.Popen[str]]:
    """The process, ready for requests; killed at the end if it still runs."""
    arguments = [str(port), *([] if hold_after is None else [str(hold_after)])]
    command = [sys.executable, "-m", "tests.server.fake_server", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline().startswith("listening on ")
            yield server
        finally:
            server.kill()


def main(port: int, hold_after: int | None) -> None:
    asyncio.run(
        app.serve(
            lambda: FakeEngine(hold_after=hold_after),
            "127.0.0.1",
            port,
            grace=0,
            on_ready=lambda server: print(f"listening on {server.address}", flush=True),
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
