"""The load test itself, short, with a tiny model in float64, in which every answer must be the one that a prompt gets alone."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import load
from knnlm.model import HFLanguageModel
from tests.stores import build, environment, text_folder
from tests.tiny import tiny_corpus

SECONDS = "1"


@pytest.fixture(scope="module")
def store(gpt2: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load")
    build(text_folder(folder / "corpus", tiny_corpus(30)), folder / "store", gpt2)
    return folder / "store"


def run(store: Path, *options: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "benchmarks.load", "--store", str(store), "--seconds", SECONDS, *options]
    return subprocess.run(line, env={**environment(), "COLUMNS": "200"}, capture_output=True, text=True, timeout=300)


def test_nothing_is_lost_under_load(store: Path) -> None:
    done = run(store, "--exact", "--minutes", "0.02", "--clients", "24", "--max-concurrent", "4", "--max-waiting-requests", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout
    for phase in ("one at a time", "capacity", "50% of it", "80% of it", "120% of it", "reloads", "24 clients", "SIGTERM"):
        assert re.search(rf"^{phase}: [1-9]\d* requests in ", said, re.MULTILINE), said
    for status in ("OK", "CANCELLED", "RESOURCE_EXHAUSTED QUEUE_FULL", "UNAVAILABLE"):
        assert status in said
    same, known = map(int, re.search(r"(\d+) of (\d+) answers to known prompts had the tokens", said).groups())  # type: ignore[union-attr]
    assert same == known > 0
    assert re.search(r"^[1-9]\d* requests, 0 things wrong$", said, re.MULTILINE)


def test_what_is_wrong_is_named_and_ends_with_status_1(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that is killed under load."""

    async def kill(run: load.Run) -> None:
        await asyncio.sleep(0.3)
        run.server.process.kill()

    monkeypatch.setattr(load, "LOADS", ())
    monkeypatch.setattr(load, "_reload", kill)
    assert load.main(["--store", str(store), "--seconds", SECONDS, "--max-concurrent", "2"]) == 1
    said = capsys.readouterr().out
    assert re.search(r"WRONG reloads: a request \(.*\) ended with UNAVAILABLE", said)
    assert "WRONG reloads: the server ended with status -9" in said
