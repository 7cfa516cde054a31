"""Who runs the shards makes no difference: serial and process executors, what fails in a worker, and workers that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from knnlm.errors import InvalidInput, KNNLMError, NonFiniteKey, WorkerLost
from knnlm.model import ModelOutput
from knnlm_index_builder.executors import ProcessExecutor
from knnlm_index_builder.pipeline import BuildResult, build_datastore
from knnlm_index_builder.settings import BuildSettings, Resources
from tests.fake_model import FakeModel, load_fake_model
from tests.processes import children, runs, wait_until
from tests.stores import Silent, contents, environment, text_folder
from tests.tiny import tiny_corpus

SETTINGS = BuildSettings(index="IVF4,SQ8", shard_tokens=250, max_length=16)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_folder(tmp_path_factory.mktemp("corpus") / "stories", tiny_corpus(30))


def build(corpus: Path, store: Path, executor: ProcessExecutor | None, progress: Any = None, **settings: Any) -> BuildResult:
    asked = BuildSettings(**{**SETTINGS.__dict__, **settings})
    return build_datastore([corpus], store, FakeModel(), asked, progress or Silent(), Resources(executor=executor))  # type: ignore[arg-type]


class Told:
    """Progress, written down."""

    def __init__(self) -> None:
        self.encoding: list[tuple[int, int | None]] = []

    def update(self, stage: str, done: int, total: int | None) -> None:
        if stage == "encoding":
            self.encoding.append((done, total))


@pytest.mark.parametrize("keys", ["float16", "none"])
def test_processes_make_the_same_bytes(keys: str, corpus: Path, tmp_path: Path) -> None:
    told = Told()
    build(corpus, tmp_path / "serial", None, keys=keys)
    manifest = build(corpus, tmp_path / "processes", ProcessExecutor(load_fake_model, 2), told, keys=keys).manifest
    assert len(manifest.shards) > 2
    assert contents(tmp_path / "processes") == contents(tmp_path / "serial")
    assert told.encoding[-1] == (manifest.counts.entries, manifest.counts.entries)


class NotFinite(FakeModel):
    def forward(self, tokens: Any, **options: Any) -> ModelOutput:
        return ModelOutput(None, super().forward(tokens, **options).keys / 0)


class Refusing(FakeModel):
    def forward(self, tokens: Any, **options: Any) -> ModelOutput:
        raise InvalidInput("dtype", "is not for this model.")


@pytest.mark.parametrize(("model", "error"), [(NotFinite, NonFiniteKey), (Refusing, InvalidInput)])
def test_an_error_in_a_worker_is_the_same_error_here(model: type[FakeModel], error: type[KNNLMError], corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(error) as from_worker:
        build(corpus, tmp_path / "processes", ProcessExecutor(model, 1))
    with pytest.raises(error) as serial:
        build_datastore([corpus], tmp_path / "serial", model(), SETTINGS, Silent())  # type: ignore[arg-type]
    if error is InvalidInput:
        assert str(from_worker.value) == str(serial.value)
        assert from_worker.value.__dict__ == serial.value.__dict__
    build(corpus, tmp_path / "processes", None)


class Dying(FakeModel):
    def forward(self, tokens: Any, **options: Any) -> ModelOutput:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_worker_that_is_killed_is_said_and_the_build_goes_on_later(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkerLost, match=r"goes on from there.*--workers"):
        build(corpus, tmp_path / "store", ProcessExecutor(Dying, 1))
    build(corpus, tmp_path / "store", None)
    build(corpus, tmp_path / "serial", None)
    assert contents(tmp_path / "store") == contents(tmp_path / "serial")


class Slow(FakeModel):
    def forward(self, tokens: Any, **options: Any) -> ModelOutput:
        time.sleep(0.2)
        return super().forward(tokens, **options)


PARENT = """
import sys
from pathlib import Path
from tests.index_builder.test_executors import Slow, build
from knnlm_index_builder.executors import ProcessExecutor

if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]), ProcessExecutor(Slow, 2))
"""


def test_workers_end_with_the_build_that_is_killed(corpus: Path, tmp_path: Path) -> None:
    """A worker that went on would write the shards of the build that follows."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    store = tmp_path / "store"
    folders = [str(Path(__file__).parents[2]), *sys.path]
    process = subprocess.Popen(
        [sys.executable, str(script), str(corpus), str(store)], env={**environment(), "PYTHONPATH": os.pathsep.join(folders)}
    )
    try:
        wait_until(lambda: len(list(store.glob("shards/*.tmp/keys.npy"))) == 2)
        workers = children(process.pid)
        assert len(workers) >= 2
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not any(runs(pid) for pid in workers))
