"""A real build of a real corpus, killed at random moments again and again, against one that nothing disturbed."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.processes import command, environment
from benchmarks.reports import print_facts, say
from benchmarks.session import Session
from knnlm.datastore.files import FileFacts, file_facts
from knnlm.datastore.manifest import BUILD_FOLDER, MANIFEST, Manifest
from knnlm.datastore.reader import Datastore
from knnlm_index_builder.ingest import DOCUMENTS, TOKENS, was_ingested

SHARD_TOKENS = 16_384
WORKERS = 2
LONGEST = 0.5
STARTING, READING, ENCODING, TRAINING, FILLING = "starting", "reading", "encoding", "training", "filling and merging"
TUNING, COMMITTING, DONE = "choosing search settings", "committing", "done"


def run(session: Session) -> None:
    """Kills go on, store after store, until there were as many as asked; each store must come out in the same bytes."""
    inputs, options = session.inputs, session.options
    folder, chance = session.folder / "resuming", random.Random(options.seed)
    line = command("build", inputs.text, "--model", inputs.source, "--index", "IVF256,SQ8", "--shard-tokens", str(SHARD_TOKENS))
    line += ["--workers", str(WORKERS), *(["--split-documents", inputs.cut] if inputs.cut is not None else [])]
    say(f"building undisturbed: {' '.join(line[1:])}")
    undisturbed = _run([*line, "--store", str(folder / "undisturbed")], None)
    expected = _contents(folder / "undisturbed")
    kills, lost, stores = Counter[str](), 0.0, 0
    while kills.total() < options.kills:
        store = folder / "killed"
        seconds = 0.0
        while not (store / MANIFEST).exists() or (store / BUILD_FOLDER).exists():
            moment = chance.uniform(0, LONGEST * undisturbed) if kills.total() < options.kills else None
            seconds += _run([*line, "--store", str(store)], moment)
            if moment is not None and (stage := _stage(store, len(_shards(folder / "undisturbed")))) != DONE:
                kills[stage] += 1
                say(f"killed after {moment:.1f} s, {stage}")
        if _contents(store) != expected:
            raise RuntimeError(f"{store} has other bytes than a build that nothing disturbed.")
        shutil.rmtree(store)
        lost, stores = lost + seconds - undisturbed, stores + 1
    _print(Datastore.open(folder / "undisturbed"), kills, stores, undisturbed, lost)


def _print(store: Datastore, kills: Counter[str], stores: int, undisturbed: float, lost: float) -> None:
    print_facts(
        f"resuming: {len(store):,} entries in {len(store.manifest.shards)} shards, {WORKERS} workers",
        {
            "undisturbed build, s": undisturbed,
            "SIGKILLs": kills.total(),
            **{f"… while {stage}": count for stage, count in kills.items()},
            "stores that were finished after them, all bytes equal": stores,
            "time lost in all, s": lost,
            "time lost a kill, process start included, s": lost / kills.total(),
        },
    )


def _run(line: Sequence[str], most: float | None) -> float:
    """Run a command to its end, or kill it and wait for its workers; seconds by the clock. Raises if it fails."""
    started = time.monotonic()
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        try:
            _, said = process.communicate(timeout=most)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            # Its standard error ends with the last worker.
            process.communicate()
            return time.monotonic() - started
    if process.returncode:
        raise RuntimeError(f"{' '.join(line)} ended with {process.returncode}: {said[-500:]}")
    return time.monotonic() - started


def _shards(store: Path) -> list[Path]:
    return sorted((store / "shards").glob("*/receipt.json"))


def _stage(store: Path, shards: int) -> str:
    """What a build was doing when it was killed, by what is on the disk."""
    scratch = store / BUILD_FOLDER
    if (store / MANIFEST).exists():
        return COMMITTING if scratch.exists() else DONE
    if not was_ingested(scratch):
        return READING if (scratch / TOKENS).exists() or (scratch / DOCUMENTS).exists() else STARTING
    if len(_shards(store)) < shards:
        return ENCODING
    if not (store / "index" / "00000").exists():
        return FILLING if (scratch / "index" / "trained").exists() else TRAINING
    return COMMITTING if (store / "search" / "00000.json").exists() else TUNING


def _contents(store: Path) -> tuple[str, dict[str, FileFacts]]:
    """Everything about a store but its time of creation: the manifest's fingerprint, and facts of all other files."""
    files = {path.relative_to(store).as_posix(): file_facts(path) for path in store.rglob("*") if path.is_file()}
    del files[MANIFEST]
    return Manifest.read(store).fingerprint, files
