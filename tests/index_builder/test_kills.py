"""Real processes of real builds that are killed or interrupted: nothing of them stays but their finished work."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from knnlm.datastore.audit import AUDIT_LOG
from knnlm.datastore.manifest import BUILD_FOLDER
from tests.index_builder.crash_cases import require_undisturbed
from tests.processes import children, runs, wait_until
from tests.stores import contents, environment, knnlm, text_folder
from tests.tiny import tiny_corpus

KILLED = ("build", "append", "compact")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """With ``--crashes N``, N times as many kills."""
    if "kill" in metafunc.fixturenames:
        metafunc.parametrize("kill", range(metafunc.config.getoption("crashes")))


@dataclass(frozen=True)
class Work:
    """A command, the store that it is for, the folder that it begins with a copy of, and what it makes of that."""

    arguments: tuple[str | Path, ...]
    store: Path
    before: Path | None
    after: Path

    def begin(self) -> None:
        shutil.rmtree(self.store, ignore_errors=True)
        if self.before is not None:
            shutil.copytree(self.before, self.store)

    def start(self) -> subprocess.Popen[str]:
        """In a process, and a group of processes, of its own; as in a terminal, wherever the tests run."""
        line = [sys.executable, "-m", "knnlm", *map(str, self.arguments)]
        return subprocess.Popen(
            line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment(), text=True, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip


def alone(work: Work) -> list[str | Path]:
    """Its command without worker processes, which are no setting of the store."""
    return [part for part in work.arguments if part not in ("--workers", "2")]


@pytest.fixture(scope="module")
def works(tiny_gpt2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Work]:
    """Each undisturbed run is made in this process, by one worker."""
    folder = tmp_path_factory.mktemp("kills")
    store = folder / "store"
    text = text_folder(folder / "text", tiny_corpus(16))
    more = text_folder(folder / "more" / "new", tiny_corpus(8, seed=5)).parent
    settings = ("--index", "IVF4,SQ8", "--shard-tokens", "500", "--max-length", "16", "--batch-size", "64")
    lines: dict[str, tuple[str | Path, ...]] = {
        "build": ("build", text, "--model", tiny_gpt2_path, "--store", store, "--workers", "2", *settings),
        "append": ("build", more, "--store", store, "--append", "--batch-size", "64"),
        "compact": ("compact", store),
    }
    made: dict[str, Work] = {}
    before = None
    for name, line in lines.items():
        if name == "compact":
            assert knnlm("remove", store, "--document", "story-0003.txt") == 0
            before = shutil.copytree(store, folder / "removed")
        after = folder / f"after {name}"
        made[name] = Work(line, store, before, after)
        assert knnlm(*alone(made[name])) == 0
        before = shutil.copytree(store, after)
    return made


class Watched:
    """The files that were ever seen in a folder, scratch files among them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._before = self._now()
        self.seen: set[Path] = set()

    def look(self) -> int:
        """How many new ones there were until now."""
        self.seen |= self._now() - self._before
        return len(self.seen)

    def _now(self) -> set[Path]:
        return {Path(folder, name) for folder, _, names in os.walk(self._folder) for name in names}


def wait_for_work(process: subprocess.Popen[str], store: Path, files: int) -> None:
    watched = Watched(store)
    wait_until(lambda: watched.look() >= files or process.poll() is not None)
    assert process.poll() is None, process.communicate()


def wait_for_end(processes: Sequence[int]) -> None:
    wait_until(lambda: not any(runs(process) for process in processes))


@pytest.mark.parametrize("name", KILLED)
def test_after_a_kill_the_same_command_ends_in_the_same_bytes(
    name: str, kill: int, works: dict[str, Work], capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed when a number of files was seen, which a finished run has more of. Stopped before, it holds its lock; then
    nothing does."""
    work = works[name]
    work.begin()
    new = contents(work.after).keys() - (contents(work.before).keys() if work.before else set()) - {AUDIT_LOG}
    process = work.start()
    try:
        wait_for_work(process, work.store, random.Random(f"{name} {kill}").randint(1, len(new)))
        process.send_signal(signal.SIGSTOP)
        workers = children(process.pid)
        assert knnlm(*work.arguments) == 1
        assert f"is writing {work.store}; wait for it." in capsys.readouterr().err
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    wait_for_end(workers)
    assert knnlm(*alone(work)) == 0
    require_undisturbed(work, f"after kill {kill} of {name}")


@pytest.mark.parametrize("moment", ["while workers start", "while they work"])
def test_an_interrupted_build_says_so_and_goes_on_later(moment: str, works: dict[str, Work]) -> None:
    """As Ctrl-C does it: to all processes of the group."""
    work = works["build"]
    work.begin()
    process = work.start()
    try:
        if moment == "while workers start":
            wait_until(lambda: len(children(process.pid)) > 1 or process.poll() is not None)
        else:
            wait_until(lambda: any(work.store.glob("shards/*/receipt.json")) or process.poll() is not None)
        workers = children(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, said
    assert said.splitlines()[-2:] == [
        f"What is finished stays in {work.store}; the same command goes on from there.",
        "error: interrupted.",
    ]
    assert "Traceback" not in said
    wait_for_end(workers)
    assert (work.store / BUILD_FOLDER).exists()
    assert knnlm(*alone(work)) == 0
    require_undisturbed(work, f"interrupted {moment}")
