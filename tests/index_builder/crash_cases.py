"""What is interrupted in the tests of crashes and full disks: each operation on a store, and what must hold on the way and at
the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from knnlm.datastore.audit import AUDIT_LOG
from knnlm.datastore.manifest import BUILD_FOLDER, MANIFEST, Manifest
from knnlm.datastore.reader import Datastore
from knnlm.errors import StoreIncomplete, StoreNotFound
from tests.index_builder.crashing import Runner
from tests.stores import contents, knnlm, text_folder
from tests.tiny import tiny_corpus

SETTINGS = ("--model", "fake", "--index", "IVF2,SQ8", "--shard-tokens", "120", "--max-length", "16")
BEFORE = {"built": None, "appended": "built", "removed": "appended", "compacted": "removed", "indexed anew": "appended"}
CASES = [(name, keys) for name in BEFORE for keys in ("float16", "none") if (name, keys) != ("indexed anew", "none")]
NAMES = [f"{name}, keys {keys}" for name, keys in CASES]


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
            shutil.copytree(self.before, self.store, dirs_exist_ok=True)


class Cases:
    """Each is made when it is asked for first, out of the one before. All commands work on a store at one path, :attr:`store`."""

    def __init__(self, folder: Path, runner: Runner) -> None:
        self.store = folder / "store"
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
        store, after = self.store, self._folder / f"{name} {keys}"
        case = Case(self._arguments(name, keys, store), store, before, after, [])
        case.begin()
        ended = self._runner.run(*case.arguments)
        assert ended.status == 0, ended.said
        shutil.copytree(store, after)
        return Case(case.arguments, store, before, after, ended.steps)

    def _arguments(self, name: str, keys: str, store: Path) -> tuple[str | Path, ...]:
        return {
            "built": ("build", self._text, "--store", store, "--keys", keys, *SETTINGS),
            "appended": ("build", self._more, "--store", store, "--append"),
            "removed": ("remove", store, "--document", "story-0001.txt"),
            "compacted": ("compact", store),
            "indexed anew": ("compact", store, "--index", "IVF3,SQ8"),
        }[name]


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with Runner(tmp_path_factory.mktemp("runner")) as runner:
        yield runner


@pytest.fixture(scope="session")
def cases(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return Cases(tmp_path_factory.mktemp("cases"), runner)


def require_old_or_new(case: Case) -> None:
    """An interrupted command leaves the store as it was, or as it is to be, for whoever opens it; a build leaves none."""
    store = case.store
    if case.before is None and not (store / MANIFEST).exists():
        with pytest.raises(StoreIncomplete if (store / BUILD_FOLDER).exists() else StoreNotFound):
            Datastore.open(store)
        return
    fingerprints = [Manifest.read(folder).fingerprint for folder in (case.before, case.after) if folder]
    assert Datastore.open(store, verify=True).manifest.fingerprint in fingerprints


class Ending(Protocol):
    """``store``: of a command that came to its end; ``after``: what an undisturbed run makes."""

    @property
    def store(self) -> Path: ...

    @property
    def after(self) -> Path: ...


def require_undisturbed(case: Ending, when: str) -> None:
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
