"""``python -m benchmarks [NAME …]``; docs/benchmarks.md describes them."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from benchmarks import building, comparing, indexing, memory, opening, resuming, serving
from benchmarks.reports import say
from benchmarks.session import Options, Session
from knnlm import console

BENCHMARKS: dict[str, Callable[[Session], None]] = {
    "building": building.run,
    "indexing": indexing.run,
    "comparing": comparing.run,
    "memory": memory.run,
    "opening": opening.run,
    "resuming": resuming.run,
    "serving": serving.run,
}


def main() -> None:
    """Run what is asked for, in the order above."""
    names, options = _parse()
    console.quiet_transformers()
    say(f"{len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    with tempfile.TemporaryDirectory(prefix="knnlm-bench-") as folder:
        session = Session(options, Path(folder))
        for name, run in BENCHMARKS.items():
            if name in names:
                started = time.monotonic()
                run(session)
                say(f"{name}: {time.monotonic() - started:.0f} s\n")


def _parse() -> tuple[list[str], Options]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Costs of the product beside bare floors; docs/benchmarks.md."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which of {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--model", help="Hugging Face causal LM (default: the demo's)")
    parser.add_argument("--corpus", type=Path, help="text of the datastore (default: the demo's)")
    parser.add_argument("--held-out", type=Path, help="text to be compared on (default: the demo's)")
    parser.add_argument("--split-documents", help="regular expression at whose matches documents begin, in both")
    parser.add_argument("--store", type=Path, help="indexing, comparing, serving: a datastore that is there already")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds, of which medians are taken (default 7)")
    parser.add_argument("--entries", type=int, help="indexing, building: use that many at most; opening: make up that many")
    parser.add_argument("--kills", type=int, default=12, help="resuming: how often the build is killed (default 12)")
    parser.add_argument("--stream-interval", type=float, help="serving: seconds between messages of a stream (default: the server's)")
    parser.add_argument("--seed", type=int, default=0, help="resuming: of the moments")
    found = parser.parse_args()
    if unknown := sorted({*found.names} - {*BENCHMARKS}):
        parser.error(f"there is no benchmark {', '.join(unknown)}; choose from {', '.join(BENCHMARKS)}.")
    if (found.corpus is None) != (found.held_out is None):
        parser.error("--corpus and --held-out belong together: text of one kind says nothing about text of another.")
    return found.names or list(BENCHMARKS), Options(
        found.model,
        found.corpus,
        found.held_out,
        found.split_documents,
        found.store,
        found.rounds,
        found.entries,
        found.kills,
        found.seed,
        found.stream_interval,
    )


if __name__ == "__main__":
    main()
