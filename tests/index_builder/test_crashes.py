"""Builds, appends, removals and compactions that crash, at seeded steps: the same command goes on and ends in the bytes of a
run that nothing disturbed, and whoever opens the store meanwhile sees it as it was."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from knnlm.datastore.audit import AUDIT_LOG
from knnlm.datastore.manifest import BUILD_FOLDER, MANIFEST, Manifest
from knnlm.datastore.reader import Datastore
from knnlm.errors import StoreIncomplete, StoreNotFound
from tests.index_builder.crashing import CRASHED, Runner
from tests.stores import contents, knnlm, text_folder
from tests.tiny import tiny_corpus

SETTINGS = ("--model", "fake", "--index", "IVF2,SQ8", "--shard-tokens", "120", "--max-length", "16")
BEFORE = {"built": None, "appended": "built", "removed": "appended", "compacted": "removed", "indexed anew": "appended"}
CASES = [(name, keys) for name in BEFORE for keys in ("float16", "none") if (name, keys) != ("indexed anew", "none")]
FILES = ("open", "fsync", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
NAMES = [f"{name}, keys {keys}" for name, keys in CASES]
CRASHES, ROWS, CRASHES_IN_A_ROW = 4, 1, 4


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """With ``--crashes N``, N times as many."""
    times: int = metafunc.config.getoption("crashes")
    for name, count in (("crash", CRASHES), ("row", ROWS)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, range(count * times))


@dataclass(frozen=True)
class Case:
    """A command (``arguments``, for the store at ``store``), the folder that it begins with a copy of (None: nothing), what an
    undisturbed run makes of it, and the steps of that."""

    arguments: tuple[str | Path, ...]
    store: Path
    before: Path | None
    after: Path
    steps: list[str]

    def begin(self) -> None:
        shutil.rmtree(self.store, ignore_errors=True)
        if self.before is not None:
            shutil.copytree(self.before, self.store)


class Cases:
    """Each is made when it is asked for first, out of the one before."""

    def __init__(self, folder: Path, runner: Runner) -> None:
        self._folder, self._runner, self._made = folder, runner, dict[tuple[str, str], Case]()
        self._text = text_folder(folder / "text", tiny_corpus(3))
        self._more = text_folder(folder / "more" / "new", tiny_corpus(2, seed=5)).parent

    def __getitem__(self, wanted: tuple[str, str]) -> Case:
        if wanted not in self._made:
            self._made[wanted] = self._make(*wanted)
        return self._made[wanted]

    def _make(self, name: str, keys: str) -> Case:
        base = BEFORE[name]
        before = self[base, keys].after if base else None
        store, after = self._folder / "store", self._folder / f"{name} {keys}"
        case = Case(self._arguments(name, keys, store), store, before, after, [])
        case.begin()
        ended = self._runner.run(*case.arguments)
        assert ended.status == 0, ended.said
        store.rename(after)
        return Case(case.arguments, store, before, after, ended.steps)

    def _arguments(self, name: str, keys: str, store: Path) -> tuple[str | Path, ...]:
        return {
            "built": ("build", self._text, "--store", store, "--keys", keys, *SETTINGS),
            "appended": ("build", self._more, "--store", store, "--append"),
            "removed": ("remove", store, "--document", "story-0001.txt"),
            "compacted": ("compact", store),
            "indexed anew": ("compact", store, "--index", "IVF3,SQ8"),
        }[name]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with Runner(tmp_path_factory.mktemp("runner")) as runner:
        yield runner


@pytest.fixture(scope="module")
def cases(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return Cases(tmp_path_factory.mktemp("cases"), runner)


def steps_by_kind(steps: list[str]) -> dict[str, list[int]]:
    """Numbers of the steps, counted from 1, of each kind."""
    return {kind: [number for number, step in enumerate(steps, 1) if step == kind] for kind in sorted(set(steps))}


@pytest.mark.parametrize(("name", "keys"), CASES, ids=NAMES)
def test_after_a_crash_the_same_command_ends_in_the_same_bytes(name: str, keys: str, crash: int, cases: Cases, runner: Runner) -> None:
    """Kinds of steps are taken in turn, so that a frequent kind does not get all crashes."""
    case = cases[name, keys]
    chance = random.Random(f"{name} {keys} {crash}")
    kinds = list(steps_by_kind(case.steps).items())
    kind, numbers = kinds[(crash + chance.randrange(len(kinds)) * (crash >= len(kinds))) % len(kinds)]
    step = chance.choice(numbers)
    case.begin()
    crashed = runner.run(*case.arguments, crash_at=step)
    assert crashed.status == CRASHED, crashed.said
    require_old_or_new(case)
    again = runner.run(*case.arguments)
    assert again.status == 0, f"after a crash before {kind}, step {step}: {again.said}"
    require_undisturbed(case, f"after a crash before {kind}, step {step}")


@pytest.mark.parametrize(("name", "keys"), CASES, ids=NAMES)
def test_after_crashes_in_a_row_the_same_command_ends_in_the_same_bytes(
    name: str, keys: str, row: int, cases: Cases, runner: Runner
) -> None:
    case = cases[name, keys]
    chance = random.Random(f"{name} {keys} in a row {row}")
    case.begin()
    crashes = []
    for _ in range(CRASHES_IN_A_ROW):
        step = chance.randint(1, len(case.steps) // 2)
        ended = runner.run(*case.arguments, crash_at=step)
        if ended.status == 0:
            break
        assert ended.status == CRASHED, ended.said
        crashes.append(step)
        require_old_or_new(case)
    assert crashes
    ended = runner.run(*case.arguments)
    assert ended.status == 0, f"after crashes at {crashes}: {ended.said}"
    require_undisturbed(case, f"after crashes at {crashes}")


def test_every_kind_of_step_is_taken(cases: Cases) -> None:
    """Else the crashes would be fewer than they seem."""
    steps = {step for name, keys in CASES for step in cases[name, keys].steps}
    assert steps >= {"find_cells", "in_blocks", "write_index", "forward", "update", *FILES}


def require_old_or_new(case: Case) -> None:
    """An interrupted command leaves the store as it was, or as it is to be, for whoever opens it; a build leaves none."""
    store = case.store
    if case.before is None and not (store / MANIFEST).exists():
        with pytest.raises(StoreIncomplete if (store / BUILD_FOLDER).exists() else StoreNotFound):
            Datastore.open(store)
        return
    fingerprints = [Manifest.read(folder).fingerprint for folder in (case.before, case.after) if folder]
    assert Datastore.open(store, verify=True).manifest.fingerprint in fingerprints


def require_undisturbed(case: Case, when: str) -> None:
    """The store is what an undisturbed run makes, byte for byte, and nothing is left over."""
    found, expected = contents(case.store), contents(case.after)
    logs = [[known_of(line) for line in files.pop(AUDIT_LOG, b"").decode().splitlines()] for files in (found, expected)]
    # A run that crashed before its commit may have logged its operation already.
    assert [line for number, line in enumerate(logs[0]) if line not in logs[0][:number]] == logs[1], when
    for files in (found, expected):
        files[MANIFEST] = json.dumps({**json.loads(files[MANIFEST]), "audit": None}).encode()
    assert [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)] == [], when
    assert knnlm("verify", case.store) == 0, when


def known_of(line: str) -> dict[str, object]:
    said = json.loads(line)
    del said["time"]
    return dict(said)
