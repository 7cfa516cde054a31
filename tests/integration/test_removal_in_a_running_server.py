"""A document is removed by one process while a server in another one generates from it."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from knnlm.datastore.removal import remove_documents
from knnlm.model import HFLanguageModel
from knnlm_server.client import GenerationClient
from knnlm_server.sequence import TokenEvent
from tests.integration.long_model import LONG, long_model
from tests.stores import build, environment, knnlm, text_folder
from tests.tiny import tiny_corpus

DOCUMENTS, NEIGHBORS = 30, 24
WITHIN_SECONDS = 1.0
PATIENCE = 120.0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model that can go on for long."""
    folder = tmp_path_factory.mktemp("long")
    path = long_model(folder / "model")
    corpus = text_folder(folder / "corpus", tiny_corpus(DOCUMENTS))
    build(corpus, folder / "store", HFLanguageModel.load(path), index="IVF8,SQ8", max_length=64)
    return folder / "store"


@pytest.fixture
def target(store: Path) -> Iterator[str]:
    line = [sys.executable, "-m", "knnlm", "serve", str(store), "--port", "0", "--weight", "0.5", "--k", str(NEIGHBORS)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment())
    try:
        assert process.stdout is not None
        found = re.fullmatch(r"listening on (\S+:\d+)\n", process.stdout.readline())
        assert found
        yield found[1]
    finally:
        process.kill()
        process.communicate()


@dataclass
class Stream:
    """What a request was told, and when; read on a thread of its own until it is told to stop."""

    target: str
    prompt: str
    arrived: list[tuple[float, set[str], int]] = field(default_factory=list)
    failure: Exception | None = None
    stop: threading.Event = field(default_factory=threading.Event)

    def read(self) -> None:
        try:
            with GenerationClient(self.target) as client:
                options = {"max_new_tokens": LONG, "seed": 1, "ignore_eos": True, "neighbors": NEIGHBORS, "knn_temperature": 100.0}
                for event in client.stream(self.prompt, **options):  # type: ignore[arg-type]
                    if isinstance(event, TokenEvent):
                        self.arrived.append((time.monotonic(), {n.document_id for n in event.neighbors}, len(event.neighbors)))
                    if self.stop.is_set():
                        return
        except Exception as error:
            self.failure = error

    def until(self, count: int, after: float = 0.0) -> None:
        """Wait for ``count`` tokens that arrived later than ``after``."""
        end = time.monotonic() + PATIENCE
        while sum(at > after for at, _, _ in self.arrived[-2 * count :]) < count:
            assert self.failure is None, self.failure
            assert time.monotonic() < end
            time.sleep(0.01)


def test_within_a_second_no_token_is_owed_to_a_removed_document(store: Path, target: str) -> None:
    streams = [Stream(target, prompt) for prompt in ("The farmer", "A sailor sold")]
    threads = [threading.Thread(target=stream.read, daemon=True) for stream in streams]
    for thread in threads:
        thread.start()
    for stream in streams:
        stream.until(40)
    counted = Counter(name for stream in streams for _, named, _ in list(stream.arrived) for name in named)
    gone = {name for name, _ in counted.most_common(2)}
    assert knnlm("remove", store, *(word for name in sorted(gone) for word in ("--document", name))) == 0
    removed = time.monotonic()
    for stream in streams:
        stream.until(60, removed + WITHIN_SECONDS)
        stream.stop.set()
    for thread in threads:
        thread.join(PATIENCE)
    for stream in streams:
        assert stream.failure is None
        # Where nothing was removed, these documents are among the neighbours all the time.
        before = [named for at, named, _ in stream.arrived[:40]]
        assert sum(bool(named & gone) for named in before) > 20
        later = [(named, count) for at, named, count in stream.arrived if at > removed + WITHIN_SECONDS]
        assert len(later) >= 60
        assert not any(named & gone for named, _ in later)
        assert {count for _, count in later} == {NEIGHBORS}
    # One who comes later never sees them, nor what was removed while nobody asked.
    another = next(name for name, _ in counted.most_common() if name not in gone)
    remove_documents(store, [another])
    time.sleep(WITHIN_SECONDS)
    with GenerationClient(target) as client:
        completion = client.generate("The farmer", max_new_tokens=40, seed=1, ignore_eos=True, neighbors=NEIGHBORS, knn_temperature=100.0)
    named = [{neighbor.document_id for neighbor in token.neighbors} for token in completion.tokens]
    assert len(named) == 40
    assert not any(names & {*gone, another} for names in named)
